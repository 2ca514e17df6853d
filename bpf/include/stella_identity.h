/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Who did it: the names of programs, processes and cgroups, taken when the event happens.
 *
 * A process that lives for some milliseconds is gone before anybody looks, and its cgroup with it. So the first
 * event of a program or in a cgroup leaves the name here, read from the kernel's own structures; the record carries
 * the key, and the collector puts the names into the batch that needs them. What was found is remembered with
 * the task, so the following events cost a comparison.
 *
 * The maps forget what was not used for longest. The collector looks within milliseconds, and remembers more.
 */
#pragma once

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct stella_program);
} stella_programs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct stella_cgroup);
} stella_cgroups SEC(".maps");

/* In a section of their own: user space writes the configuration over the begin of .rodata. */
static const struct stella_program no_program SEC(".rodata.none") = {};
static const struct stella_cgroup no_cgroup SEC(".rodata.none") = {};

#define WALK_DEPTH 64

/* Put `/name` before what stands at path[at..]; returns where it begins, or `at` when there is no room. */
static __always_inline __u32 prepend(char *path, __u32 at, const void *name, __u32 length)
{
	if (length > 255 || length + 1 > at)
		return at;
	__u32 begin = (at - length) & (STELLA_WALK_MAX - 1);
	bpf_probe_read_kernel(&path[begin], length & 255, name);
	begin = (begin - 1) & (STELLA_WALK_MAX - 1);
	path[begin] = '/';
	return begin;
}

struct walked {
	char path[STELLA_WALK_ROOM];
};

/* Write the path of `where` (struct path *) so that it ends at path[STELLA_WALK_MAX]; returns its begin, flags above
 * it. It starts at the root of the mount namespace, as d_path(9) would have it for a process in no chroot.
 * This and what follows are global functions, so that the verifier looks at each once and not for each caller. */
__u32 stella_walk(__u64 where, struct walked *w)
{
	struct path *begins = (void *)where;
	struct dentry *dentry = BPF_CORE_READ(begins, dentry);
	struct vfsmount *mnt = BPF_CORE_READ(begins, mnt);
	__u32 at = STELLA_WALK_MAX;
	__u32 flags = BPF_CORE_READ(dentry, d_inode, i_nlink) ? 0 : STELLA_WALK_UNLINKED;
	if (!w)
		return 0;
	char *path = w->path;
	for (int i = 0; i < WALK_DEPTH; i++) {
		if (dentry == BPF_CORE_READ(mnt, mnt_root)) {
			struct mount *mount = (void *)mnt - bpf_core_field_offset(struct mount, mnt);
			struct mount *up = BPF_CORE_READ(mount, mnt_parent);
			if (up == mount)
				goto whole;
			dentry = BPF_CORE_READ(mount, mnt_mountpoint);
			mnt = (void *)up + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		__u32 length = BPF_CORE_READ(dentry, d_name.len);
		const void *name = BPF_CORE_READ(dentry, d_name.name);
		struct dentry *parent = BPF_CORE_READ(dentry, d_parent);
		__u32 begin = prepend(path, at, name, length);
		if (begin == at)
			break;
		at = begin;
		if (parent == dentry) {
			flags |= STELLA_WALK_DETACHED;
			goto whole;
		}
		dentry = parent;
	}
	flags |= STELLA_WALK_CUT;
whole:
	if (at == STELLA_WALK_MAX) {
		at = STELLA_WALK_MAX - 1;
		path[at] = '/';
	}
	return at | flags << 16;
}

/* The same for a cgroup's directory (struct kernfs_node *). */
__u32 stella_walk_cgroup(__u64 kernfs, struct walked *w)
{
	struct kernfs_node *node = (void *)kernfs;
	__u32 at = STELLA_WALK_MAX, flags = STELLA_WALK_CUT;
	if (!w)
		return 0;
	char *path = w->path;
	for (int i = 0; i < WALK_DEPTH; i++) {
		struct kernfs_node *parent = kernfs_parent_of(node);
		if (!parent) {
			flags = 0;
			break;
		}
		/* The length is not stored; a name has 255 bytes at the most. */
		const char *name = BPF_CORE_READ(node, name);
		char piece[65];
		__u32 length = 0;
		for (int k = 0; k < 4; k++) {
			long n = bpf_probe_read_kernel_str(piece, sizeof(piece), name + length);
			if (n <= 0)
				break;
			length += n - 1;
			if (n < sizeof(piece))
				break;
		}
		__u32 begin = prepend(path, at, name, length);
		if (begin == at)
			break;
		at = begin;
		node = parent;
	}
	if (at == STELLA_WALK_MAX) {
		at = STELLA_WALK_MAX - 1;
		path[at] = '/';
	}
	return at | flags << 16;
}

static __always_inline __u64 mixed(__u64 h, __u64 word)
{
	h = (h ^ word) * 0x9e3779b97f4a7c15ULL;
	return h ^ h >> 29;
}

/* The key of the program that `task` (struct task_struct *) runs. The same file under the same path has the same key; a file that was
 * written to, replaced, or is seen through another mount has another one. */
__u64 stella_program_of(__u64 task)
{
	struct file *file = BPF_CORE_READ((struct task_struct *)task, mm, exe_file);
	if (!file)
		return STELLA_PROGRAM_KERNEL;
	struct inode *inode = BPF_CORE_READ(file, f_inode);
	__u64 number = BPF_CORE_READ(inode, i_ino);
	__u32 device = BPF_CORE_READ(inode, i_sb, s_dev);
	__u64 key = mixed((__u64)BPF_CORE_READ(file, f_path.dentry), (__u64)BPF_CORE_READ(file, f_path.mnt));
	key = mixed(mixed(mixed(key, number), device), changed_ns_of(inode));
	if (key <= STELLA_PROGRAM_UNKNOWN)
		key += 3;
	struct stella_program *known = bpf_map_lookup_elem(&stella_programs, &key);
	if (known && known->ready)
		return key;
	bpf_map_update_elem(&stella_programs, &key, &no_program, BPF_NOEXIST);
	known = bpf_map_lookup_elem(&stella_programs, &key);
	if (!known)
		return key;
	/* Two CPUs may do this at the same time: they write the same. */
	known->inode = number;
	known->device = device;
	__u32 begin = stella_walk((__u64)file + bpf_core_field_offset(struct file, f_path), (void *)known->path);
	known->path_at = begin & (2 * STELLA_WALK_MAX - 1);
	known->flags = begin >> 16;
	known->ready = 1;
	return key;
}

/* See that the path of `cgroup` (struct cgroup *) is there under its id. */
int stella_know_cgroup(__u64 cgroup, __u64 id)
{
	struct stella_cgroup *known = bpf_map_lookup_elem(&stella_cgroups, &id);
	if (known && known->ready)
		return 0;
	bpf_map_update_elem(&stella_cgroups, &id, &no_cgroup, BPF_NOEXIST);
	known = bpf_map_lookup_elem(&stella_cgroups, &id);
	if (!known)
		return 0;
	__u32 begin = stella_walk_cgroup((__u64)BPF_CORE_READ((struct cgroup *)cgroup, kn), (void *)known->path);
	known->path_at = begin & (2 * STELLA_WALK_MAX - 1);
	known->flags = begin >> 16;
	known->ready = 1;
	return 0;
}

/* The pids controller's cgroup: what names a container where no cgroup v2 does. */
static __always_inline struct cgroup *v1_cgroup_of(struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct cgroup_subsys_state *state = NULL;
	__u32 at = bpf_core_enum_value(enum cgroup_subsys_id, pids_cgrp_id) * sizeof(void *);
	bpf_probe_read_kernel(&state, sizeof(state), (void *)set + bpf_core_field_offset(struct css_set, subsys) + at);
	return BPF_CORE_READ(state, cgroup);
}
