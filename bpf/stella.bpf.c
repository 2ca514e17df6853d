// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * The probes. Each does the same five things, in this order:
 *   remember (what an entry has and the exit has not) → filter early → take a number → fill → submit.
 *
 * A number is taken from the lane of this CPU and program kind before there is room for the record, so a
 * record that finds no room leaves a hole that user space cannot overlook. What the filters drop takes no
 * number; it is counted in the lane. Nothing else ever disappears.
 *
 * Strings of user space are read on the exit side: at entry the page may not be there yet (it reads as
 * nothing), at exit the kernel itself has just read it, and the result is known. A process can still change
 * its string in between; the evidence says how the path was obtained.
 *
 * Records are submitted with BPF_RB_NO_WAKEUP: waking a reader costs the traced program far more than the
 * record does. The collector looks by itself.
 */
#include "stella_types.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "stella_record.h"
#include "stella_drift.h"
#include "stella_identity.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define AT_FDCWD -100
#define ROOT_CGROUP 1
#define MAX_CGROUP_DEPTH 12
#define STELLA_STACK_BYTES (STELLA_STACK_MAX * sizeof(struct stella_frame))
#define RATE_WINDOW_NS 100000000ULL
#define RATE_WINDOWS_PER_SECOND 10
/* A throttle has ended when it has cost nothing for this long. */
#define THROTTLE_QUIET_NS 300000000ULL

/* Maps of one element that user space writes: by name, so that nothing of the compiler's stands beside them. */
volatile struct stella_config config SEC(".data.config") = {};
struct stella_scope scope = {};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 262144);
} stella_ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, STELLA_LANE_KINDS);
	__type(key, __u32);
	__type(value, struct stella_lane);
} stella_lanes SEC(".maps");

/* Target cgroups by id; namespaces by inode number. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} stella_targets SEC(".maps");

struct path_key {
	__u32 prefixlen;
	char path[252]; /* the most a trie takes */
};
struct address_key {
	__u32 prefixlen;
	__u8 address[16]; /* IPv4 as ::ffff:a.b.c.d */
};
#define PREFIX_TRIE(name, key_type)                                                                          \
	struct {                                                                                             \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);                                                         \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                                        \
		__uint(max_entries, 1024);                                                                   \
		__type(key, key_type);                                                                       \
		__type(value, __u8);                                                                         \
	} name SEC(".maps")
PREFIX_TRIE(path_allow, struct path_key);
PREFIX_TRIE(path_deny, struct path_key);
PREFIX_TRIE(network_allow, struct address_key);
PREFIX_TRIE(network_deny, struct address_key);

/* What an entry leaves for its exit (one of a kind is open per task at a time), and who the task is. */
struct inflight {
	__u64 exec_id; /* of the task, + 1, when the three below were read; 0: never */
	__u64 start_ns;
	__u64 program;
	__u64 cgroup_id; /* whose name is known to be in stella_cgroups */
	__u16 u_net_call; /* enum stella_call + 1; 0: nothing open */
	__u16 frames; /* of the uprobe's call, or of the exec that is under way */
	__s32 u_fd;
	__u32 u_length;
	__u64 u_pointer;
	__u64 ssl_bytes[4]; /* where *_ex will put the count; all ones: nothing open; by call */
	struct stella_frame stack[STELLA_STACK_MAX];
};
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct inflight);
} stella_inflight SEC(".maps");

struct owner {
	__u64 start_ns;
	__u64 program;
	__u32 tgid;
	__u32 tid;
	__u32 uid;
	__u32 reserved;
	char comm[16];
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64); /* struct sock * */
	__type(value, struct owner);
} stella_owners SEC(".maps");

/* Events in the current window of a limit, and since when it has cost records (0: it does not). */
struct window {
	__u64 start_ns;
	__u64 used;
	__u64 throttled_ns;
	__u64 dropped_ns; /* the last one */
	__u64 dropped;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct window);
} stella_window SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64); /* cgroup id */
	__type(value, struct window);
} stella_windows SEC(".maps");

/* Where variable-length records are put together. Owned by the running program: per CPU, and one entry for
 * each program kind that cannot be interrupted by its own kind. */
struct open_record {
	struct stella_header h;
	struct stella_file_open b;
	char path[STELLA_PATH_MAX + STELLA_WALK_MAX + STELLA_STACK_BYTES];
};
struct exec_record {
	struct stella_header h;
	struct stella_process_exec b;
	char data[STELLA_NAME_MAX * 2 + STELLA_ARGV_MAX * 2];
};
struct net_record {
	struct stella_header h;
	struct stella_net_connect b;
	char path[STELLA_UNIX_PATH_MAX + 4];
};
/* Of a system call: frames stand right behind the path. Of a uprobe they stand behind all of its room. */
struct net_syscall_record {
	struct net_record n;
	char room[STELLA_STACK_BYTES];
};
union scratch {
	struct open_record open;
	struct exec_record exec;
	struct net_syscall_record net;
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2); /* 0: syscall tracepoints, 1: exec */
	__type(key, __u32);
	__type(value, union scratch);
} stella_scratch SEC(".maps");

/* Where a path is walked that goes into a record; the same owners. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct walked);
} stella_walks SEC(".maps");

/* First 12 hex digits of the ids of target containers, for those whose cgroup is made later. */
struct name_key {
	char hex[12];
	__u32 reserved;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct name_key);
	__type(value, __u8);
} stella_target_names SEC(".maps");
__u64 found_levels SEC(".data.found") = 0; /* like scope.cgroup_levels, for what was found here */

/* ---- lanes ---------------------------------------------------------------------------------------- */

static __always_inline struct stella_lane *lane_of(__u32 kind, __u32 *index)
{
	*index = bpf_get_smp_processor_id() * STELLA_LANE_KINDS + kind;
	return bpf_map_lookup_elem(&stella_lanes, index);
}

/* Only uprobes can be preempted inside a program; the other lanes have one writer at a time. */
#define COUNT(kind, counter)                                                                                 \
	({                                                                                                   \
		__u64 old_;                                                                                  \
		if ((kind) == STELLA_LANE_UPROBE)                                                            \
			old_ = __sync_fetch_and_add(&(counter), 1);                                          \
		else                                                                                         \
			old_ = (counter)++;                                                                  \
		old_;                                                                                        \
	})

/* ---- who is watched --------------------------------------------------------------------------------- */

static __always_inline bool is_target(__u64 id)
{
	return bpf_map_lookup_elem(&stella_targets, &id) != NULL;
}

static __noinline bool v1_in_scope(struct cgroup *cgroup)
{
	for (int i = 0; i < MAX_CGROUP_DEPTH && cgroup; i++) {
		if (is_target(BPF_CORE_READ(cgroup, kn, id) | STELLA_CGROUP_V1))
			return true;
		struct cgroup_subsys_state *parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return false;
}

static __always_inline bool current_in_scope(void)
{
	if (!config.scoped)
		return true;
	__u64 levels = scope.cgroup_levels | found_levels;
	for (int level = 0; level < MAX_CGROUP_DEPTH; level++) {
		if (levels & (1ULL << level)) {
			__u64 id = bpf_get_current_ancestor_cgroup_id(level);
			if (id && is_target(id))
				return true;
		}
	}
	if (levels && config.v1_hierarchy && bpf_get_current_cgroup_id() == ROOT_CGROUP) {
		struct cgroup *cgroup = v1_cgroup_of((void *)bpf_get_current_task());
		if (v1_in_scope(cgroup))
			return true;
	}
	if (scope.namespaces) {
		struct task_struct *task = (void *)bpf_get_current_task();
		__u64 inode = BPF_CORE_READ(task, nsproxy, pid_ns_for_children, ns.inum);
		if (is_target(inode))
			return true;
		inode = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
		if (is_target(inode))
			return true;
		inode = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
		if (is_target(inode))
			return true;
	}
	return false;
}

/* In softirq the running process means nothing, but the socket knows the cgroup it was made in. */
static __always_inline bool socket_in_scope(struct cgroup *cgroup)
{
	if (!config.scoped)
		return true;
	for (int i = 0; i < MAX_CGROUP_DEPTH && cgroup; i++) {
		if (is_target(BPF_CORE_READ(cgroup, kn, id)))
			return true;
		struct cgroup_subsys_state *parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return false;
}

/* Entry side: is this one watched? Counts it as filtered when it is not. */
static __always_inline bool watched(__u32 kind)
{
	if (current_in_scope())
		return true;
	__u32 index;
	struct stella_lane *lane = lane_of(kind, &index);
	if (lane)
		COUNT(kind, lane->filtered_target);
	return false;
}

static __always_inline struct inflight *own_storage(void)
{
	return bpf_task_storage_get(&stella_inflight, bpf_get_current_task_btf(), 0,
				    BPF_LOCAL_STORAGE_GET_F_CREATE);
}

static __always_inline struct inflight *remember(__u32 kind)
{
	struct inflight *f = own_storage();
	if (f)
		return f;
	__u32 index;
	struct stella_lane *lane = lane_of(kind, &index);
	if (lane) { /* a number that is never seen again */
		COUNT(kind, lane->taken);
		COUNT(kind, lane->lost_inflight);
	}
	return NULL;
}

static __always_inline struct inflight *recall(void)
{
	return bpf_task_storage_get(&stella_inflight, bpf_get_current_task_btf(), 0, 0);
}

/* ---- filters ---------------------------------------------------------------------------------------- */

/* Whether the text of a path is what the kernel walked: no `//`, `/./` or `/../` that hides where it leads.
 * What is not plain, or longer than a trie compares, is left for user space to judge. */
static __always_inline bool plain(const struct open_record *r)
{
	__u32 length = r->b.path_len;
	if (length > 252)
		return false;
	for (__u32 i = 0; i < 252; i++) {
		if (i + 1 >= length)
			break;
		if (r->path[i] != '/')
			continue;
		if (r->path[i + 1] == '/')
			return false;
		if (r->path[i + 1] != '.')
			continue;
		if (i + 2 >= length || r->path[i + 2] == '/')
			return false;
		if (r->path[i + 2] == '.' && (i + 3 >= length || r->path[i + 3] == '/'))
			return false;
	}
	return true;
}

static __always_inline bool path_wanted(struct open_record *r)
{
	if (!config.path_deny && !config.path_allow)
		return true;
	/* A relative path cannot be judged here, and a path that could not be read must not vanish. */
	if (r->b.path_status == STELLA_FAULT || r->path[0] != '/')
		return true;
	__u32 length = r->b.path_len;
	r->b.lpm_prefixlen = (length > 252 ? 252 : length) * 8;
	void *key = &r->b.lpm_prefixlen;
	if (config.path_deny && bpf_map_lookup_elem(&path_deny, key))
		return !plain(r);
	if (config.path_allow && !bpf_map_lookup_elem(&path_allow, key))
		return !plain(r);
	return true;
}

static __always_inline bool address_wanted(__u16 family, const __u8 *address)
{
	if (!config.network_deny && !config.network_allow)
		return true;
	struct address_key key = { .prefixlen = 128 };
	if (family == AF_INET) {
		key.address[10] = 0xff;
		key.address[11] = 0xff;
		__builtin_memcpy(&key.address[12], address, 4);
	} else if (family == AF_INET6) {
		__builtin_memcpy(key.address, address, 16);
	} else {
		return true;
	}
	if (config.network_deny && bpf_map_lookup_elem(&network_deny, &key))
		return false;
	if (config.network_allow && !bpf_map_lookup_elem(&network_allow, &key))
		return false;
	return true;
}

/* ---- taking a number and handing the record over ------------------------------------------------------ */

/* The task's identity, read anew after an exec. */
static __always_inline void identify(struct inflight *f)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 exec_id = task->self_exec_id + 1;
	if (f->exec_id == exec_id)
		return;
	f->start_ns = task->group_leader->start_boottime;
	f->program = stella_program_of(bpf_get_current_task());
	f->exec_id = exec_id;
}

static __always_inline __u64 current_cgroup(struct inflight *f)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 id = bpf_get_current_cgroup_id();
	if (id == ROOT_CGROUP && config.v1_hierarchy) {
		struct cgroup *cgroup = v1_cgroup_of(task);
		__u64 v1 = BPF_CORE_READ(cgroup, kn, id);
		if (v1 > ROOT_CGROUP) {
			id = v1 | STELLA_CGROUP_V1;
			if (id != f->cgroup_id)
				stella_know_cgroup((__u64)cgroup, id);
			f->cgroup_id = id;
			return id;
		}
	}
	if (id != f->cgroup_id) {
		stella_know_cgroup((__u64)BPF_CORE_READ(task, cgroups, dfl_cgrp), id);
		f->cgroup_id = id;
	}
	return id;
}

/* `f` may be NULL, when there was no memory for it: then the names are missing, and nothing else. */
static __always_inline void fill_current(struct stella_header *h, struct inflight *f)
{
	__u64 ids = bpf_get_current_pid_tgid();
	h->tgid = ids >> 32;
	h->tid = (__u32)ids;
	h->uid = (__u32)bpf_get_current_uid_gid();
	bpf_get_current_comm(h->comm, sizeof(h->comm));
	if (f) {
		identify(f);
		h->start_ns = f->start_ns;
		h->program = f->program;
		h->cgroup_id = current_cgroup(f);
	} else {
		h->start_ns = 0;
		h->program = STELLA_PROGRAM_UNKNOWN;
		h->cgroup_id = bpf_get_current_cgroup_id();
	}
}

static __always_inline void submit(struct stella_lane *lane, __u32 kind, void *record, __u64 size)
{
	if (bpf_ringbuf_output(&stella_ring, record, size, BPF_RB_NO_WAKEUP))
		COUNT(kind, lane->lost_ring_full);
}

/* ---- limits ------------------------------------------------------------------------------------------- */

struct throttle_record {
	struct stella_header h;
	struct stella_throttle b;
};

/* Tell, in a record of its own, that a limit costs records from now on, or did until some time ago. */
static __always_inline void tell_throttle(__u32 kind, const struct window *w, __u64 cgroup, __u64 limit, bool stop)
{
	struct throttle_record r = {};
	__u32 index;
	struct stella_lane *lane = lane_of(kind, &index);
	if (!lane)
		return;
	r.h.ts_ns = bpf_ktime_get_boot_ns();
	r.h.lane = index;
	r.h.seq = COUNT(kind, lane->taken);
	r.h.cgroup_id = cgroup ? cgroup : ROOT_CGROUP;
	r.h.type = STELLA_THROTTLE;
	r.h.call = STELLA_CALL_THROTTLE;
	r.h.size = sizeof(r);
	r.b.since_ns = w->throttled_ns;
	if (stop) {
		r.b.until_ns = w->dropped_ns;
		r.b.dropped = w->dropped;
	}
	r.b.limit_per_second = limit * RATE_WINDOWS_PER_SECOND;
	r.b.scope = cgroup ? STELLA_THROTTLE_CGROUP : STELLA_THROTTLE_NODE;
	r.b.stop = stop;
	submit(lane, kind, &r, sizeof(r));
}

static __always_inline bool over_limit(struct window *w, __u64 limit, __u64 now, bool *begins)
{
	/* Two CPUs may both open a window; the budget is then exceeded by their first events, no more. */
	if (now - w->start_ns >= RATE_WINDOW_NS) {
		w->start_ns = now;
		w->used = 0;
	}
	if (__sync_fetch_and_add(&w->used, 1) < limit)
		return false;
	__sync_fetch_and_add(&w->dropped, 1);
	w->dropped_ns = now;
	*begins = !w->throttled_ns && !__sync_val_compare_and_swap(&w->throttled_ns, 0, now);
	return true;
}

static __noinline bool over_rate(__u32 kind, __u64 cgroup, __u64 now)
{
	bool begins = false;
	__u64 limit = config.max_cgroup_events_per_window;
	if (limit) {
		if (!cgroup)
			cgroup = bpf_get_current_cgroup_id();
		struct window *w = bpf_map_lookup_elem(&stella_windows, &cgroup);
		if (!w) {
			struct window fresh = { .start_ns = now };
			bpf_map_update_elem(&stella_windows, &cgroup, &fresh, BPF_NOEXIST);
			w = bpf_map_lookup_elem(&stella_windows, &cgroup);
		}
		if (w && over_limit(w, limit, now, &begins)) {
			if (begins)
				tell_throttle(kind, w, cgroup, limit, false);
			return true;
		}
	}
	limit = config.max_events_per_window;
	__u32 zero = 0;
	struct window *w = bpf_map_lookup_elem(&stella_window, &zero);
	if (limit && w && over_limit(w, limit, now, &begins)) {
		if (begins)
			tell_throttle(kind, w, 0, limit, false);
		return true;
	}
	return false;
}

/* The number first. NULL: it is spent, and already counted as lost. `cgroup` 0: that of the running task. */
static __always_inline struct stella_lane *take_number_for(struct stella_header *h, __u32 kind, __u64 cgroup)
{
	__u32 index;
	struct stella_lane *lane = lane_of(kind, &index);
	if (!lane)
		return NULL; /* more CPUs than lanes: the collector sizes the array by the possible CPUs */
	h->ts_ns = bpf_ktime_get_boot_ns();
	h->lane = index;
	h->seq = COUNT(kind, lane->taken);
	if ((config.max_events_per_window || config.max_cgroup_events_per_window) &&
	    over_rate(kind, cgroup, h->ts_ns)) {
		COUNT(kind, lane->lost_rate_limit);
		return NULL;
	}
	return lane;
}

static __always_inline struct stella_lane *take_number(struct stella_header *h, __u32 kind)
{
	return take_number_for(h, kind, 0);
}

/* ---- open, openat, openat2 ---------------------------------------------------------------------------- */

/* What a call was given, as it still stands in its registers when it ends: nothing is remembered meanwhile. */
static __always_inline struct pt_regs *call_registers(void)
{
	return (struct pt_regs *)bpf_task_pt_regs(bpf_get_current_task_btf());
}

struct open_call {
	unsigned long path;
	__u64 flags, resolve;
	__u32 mode;
	__s32 dfd;
};

static __always_inline struct file *file_of(__s32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	if (fd < 0 || (__u32)fd >= BPF_CORE_READ(table, max_fds))
		return NULL;
	struct file **files = BPF_CORE_READ(table, fd);
	struct file *file = NULL;
	bpf_probe_read_kernel(&file, sizeof(file), files + fd);
	return file;
}

/* What the kernel itself knows of the opened file, behind the caller's word for it: the path of the file, or when
 * there is none that of the directory a relative path starts from. Returns the bytes that were added. */
static __always_inline __u32 add_walked(struct open_record *r, __s32 dfd, long result, __u32 length)
{
	__u32 zero = 0;
	struct walked *w = bpf_map_lookup_elem(&stella_walks, &zero);
	if (!w)
		return 0;
	struct path *where = NULL;
	struct file *file = file_of(result >= 0 ? (__s32)result : dfd);
	if (file)
		where = (void *)file + bpf_core_field_offset(struct file, f_path);
	r->b.walked = STELLA_WALKED_DIRECTORY;
	if (result >= 0 && file) {
		struct inode *inode = BPF_CORE_READ(file, f_inode);
		r->b.walked = STELLA_WALKED_FILE;
		r->b.inode = BPF_CORE_READ(inode, i_ino);
		r->b.device = BPF_CORE_READ(inode, i_sb, s_dev);
	} else if (dfd == AT_FDCWD) {
		struct task_struct *task = (void *)bpf_get_current_task();
		where = (void *)BPF_CORE_READ(task, fs) + bpf_core_field_offset(struct fs_struct, pwd);
	}
	if (!where) {
		r->b.walked = STELLA_WALKED_NOTHING;
		return 0;
	}
	__u32 begin = stella_walk((__u64)where, w);
	__u32 at = begin & (STELLA_WALK_MAX - 1);
	r->b.walked_flags = begin >> 16;
	__u32 size = (STELLA_WALK_MAX - at) & (STELLA_WALK_MAX - 1);
	bpf_probe_read_kernel(&r->path[length & (STELLA_PATH_MAX - 1)], size, &w->path[at]);
	r->b.walked_len = size;
	return size;
}

static __always_inline bool wants_stack(__u32 type)
{
	return config.stacks >> type & 1;
}

/* Write the running task's user stack, as build-ids and offsets; returns the frames that were written. */
static __always_inline __u32 stack_at(void *ctx, void *at)
{
	long n = bpf_get_stack(ctx, at, STELLA_STACK_BYTES, BPF_F_USER_STACK | BPF_F_USER_BUILD_ID);
	return n > 0 ? (__u32)n / sizeof(struct stella_frame) : 0;
}

static __always_inline int open_exit(void *ctx, __u16 call, const struct open_call *given, long result)
{
	__u32 zero = 0;
	union scratch *s = bpf_map_lookup_elem(&stella_scratch, &zero);
	if (!s)
		return 0;
	struct open_record *r = &s->open;
	long n = bpf_probe_read_user_str(r->path, STELLA_PATH_MAX, (void *)given->path);
	r->b.path_status = STELLA_OK;
	if (n <= 0) {
		r->b.path_status = STELLA_FAULT;
		n = 1;
		r->path[0] = 0;
	}
	__u32 length = (__u32)(n - 1) & (STELLA_PATH_MAX - 1);
	r->b.path_len = length;
	if (!path_wanted(r)) {
		__u32 index;
		struct stella_lane *lane = lane_of(STELLA_LANE_SYSCALL, &index);
		if (lane)
			COUNT(STELLA_LANE_SYSCALL, lane->filtered_path);
		return 0;
	}
	struct stella_lane *lane = take_number(&r->h, STELLA_LANE_SYSCALL);
	if (!lane)
		return 0;
	fill_current(&r->h, own_storage());
	r->h.type = STELLA_FILE_OPEN;
	r->h.call = call;
	r->b.result = result;
	r->b.flags = given->flags;
	r->b.mode = given->mode;
	r->b.dfd = given->dfd;
	r->b.resolve = given->resolve;
	r->b.inode = 0;
	r->b.device = 0;
	r->b.walked = STELLA_WALKED_NOTHING;
	r->b.walked_len = 0;
	r->b.walked_flags = 0;
	r->b.frames = 0;
	r->b.lpm_prefixlen = 0;
	__u32 end = length;
	bool absolute = r->b.path_status != STELLA_FAULT && r->path[0] == '/';
	if (!absolute || (config.kernel_paths && result >= 0))
		end += add_walked(r, given->dfd, result, length);
	if (end > STELLA_PATH_MAX + STELLA_WALK_MAX)
		end = STELLA_PATH_MAX + STELLA_WALK_MAX;
	__u64 size = sizeof(r->h) + sizeof(r->b) + end;
	if (wants_stack(STELLA_FILE_OPEN)) {
		r->b.frames = stack_at(ctx, &r->path[end]);
		size += r->b.frames * sizeof(struct stella_frame);
	}
	if (size > sizeof(*r))
		size = sizeof(*r);
	r->h.size = size;
	submit(lane, STELLA_LANE_SYSCALL, r, size);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_open")
int stella_open_ex(struct trace_event_raw_sys_exit *ctx)
{
	if (!watched(STELLA_LANE_SYSCALL))
		return 0;
	struct pt_regs *regs = call_registers();
	struct open_call given = {
		.dfd = -100,
		.path = PT_REGS_PARM1_CORE_SYSCALL(regs),
		.flags = PT_REGS_PARM2_CORE_SYSCALL(regs),
		.mode = PT_REGS_PARM3_CORE_SYSCALL(regs),
	};
	return open_exit(ctx, STELLA_CALL_OPEN, &given, ctx->ret);
}

SEC("tracepoint/syscalls/sys_exit_openat")
int stella_opena_ex(struct trace_event_raw_sys_exit *ctx)
{
	if (!watched(STELLA_LANE_SYSCALL))
		return 0;
	struct pt_regs *regs = call_registers();
	struct open_call given = {
		.dfd = PT_REGS_PARM1_CORE_SYSCALL(regs),
		.path = PT_REGS_PARM2_CORE_SYSCALL(regs),
		.flags = PT_REGS_PARM3_CORE_SYSCALL(regs),
		.mode = PT_REGS_PARM4_CORE_SYSCALL(regs),
	};
	return open_exit(ctx, STELLA_CALL_OPENAT, &given, ctx->ret);
}

SEC("tracepoint/syscalls/sys_exit_openat2")
int stella_open2_ex(struct trace_event_raw_sys_exit *ctx)
{
	if (!watched(STELLA_LANE_SYSCALL))
		return 0;
	struct pt_regs *regs = call_registers();
	/* The kernel has read open_how, so it is there; if it is not any more, the zeros say so. */
	struct open_how how = {};
	bpf_probe_read_user(&how, sizeof(how), (void *)PT_REGS_PARM3_CORE_SYSCALL(regs));
	struct open_call given = {
		.dfd = PT_REGS_PARM1_CORE_SYSCALL(regs),
		.path = PT_REGS_PARM2_CORE_SYSCALL(regs),
		.flags = how.flags,
		.mode = how.mode,
		.resolve = how.resolve,
	};
	return open_exit(ctx, STELLA_CALL_OPENAT2, &given, ctx->ret);
}

/* ---- exec ---------------------------------------------------------------------------------------------- */

/* Where a relative name starts from, behind everything else. Returns the bytes that were added. */
static __always_inline __u32 add_directory(struct exec_record *r, struct task_struct *task, __u32 end)
{
	__u32 one = 1;
	struct walked *w = bpf_map_lookup_elem(&stella_walks, &one);
	if (!w)
		return 0;
	struct path *where = (void *)BPF_CORE_READ(task, fs) + bpf_core_field_offset(struct fs_struct, pwd);
	__u32 begin = stella_walk((__u64)where, w);
	__u32 at = begin & (STELLA_WALK_MAX - 1);
	__u32 size = (STELLA_WALK_MAX - at) & (STELLA_WALK_MAX - 1);
	bpf_probe_read_kernel(&r->data[end & (STELLA_NAME_MAX * 2 + STELLA_ARGV_MAX - 1)], size, &w->path[at]);
	r->b.directory_len = size;
	r->b.directory_flags = begin >> 16;
	return size;
}

static __always_inline void name_ancestors(struct exec_record *r, struct task_struct *task)
{
	__u32 count = 0;
	for (int i = 0; i < STELLA_ANCESTORS_MAX; i++) {
		struct task_struct *parent = BPF_CORE_READ(task, real_parent);
		parent = BPF_CORE_READ(parent, group_leader);
		struct stella_ancestor *a = &r->b.ancestors[i];
		__builtin_memset(a, 0, sizeof(*a));
		__u32 pid = BPF_CORE_READ(parent, tgid);
		if (!parent || !pid || parent == task) /* above init is nobody */
			continue;
		a->pid = pid;
		a->start_ns = BPF_CORE_READ(parent, start_boottime);
		bpf_probe_read_kernel_str(a->comm, sizeof(a->comm),
					  (void *)parent + bpf_core_field_offset(struct task_struct, comm));
		count++;
		task = parent;
	}
	r->b.ancestors_count = count;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(stella_exec, struct task_struct *task, int old_tid, struct linux_binprm *binprm)
{
	if (!watched(STELLA_LANE_EXEC))
		return 0;
	__u32 one = 1;
	union scratch *s = bpf_map_lookup_elem(&stella_scratch, &one);
	if (!s)
		return 0;
	struct exec_record *r = &s->exec;
	struct stella_lane *lane = take_number(&r->h, STELLA_LANE_EXEC);
	if (!lane)
		return 0;
	struct inflight *f = own_storage();
	fill_current(&r->h, f);
	r->h.type = STELLA_PROCESS_EXEC;
	r->h.call = STELLA_CALL_EXEC;
	struct inode *inode = BPF_CORE_READ(task, mm, exe_file, f_inode);
	r->b.inode = BPF_CORE_READ(inode, i_ino);
	r->b.device = BPF_CORE_READ(inode, i_sb, s_dev);
	r->b.frames = 0;
	r->b.directory_len = 0;
	r->b.directory_flags = 0;
	name_ancestors(r, task);

	const char *filename = BPF_CORE_READ(binprm, filename);
	const char *interp = BPF_CORE_READ(binprm, interp);
	__u32 at = 0;
	long n = bpf_probe_read_kernel_str(r->data, STELLA_NAME_MAX, filename);
	r->b.filename_status = n <= 0 ? STELLA_FAULT : n == STELLA_NAME_MAX ? STELLA_TRUNCATED : STELLA_OK;
	if (n > 0)
		at = (__u32)(n - 1) & (STELLA_NAME_MAX - 1);
	r->b.filename_len = at;
	r->b.interpreter_len = 0;
	if (interp != filename) { /* a script: the kernel went on with this */
		n = bpf_probe_read_kernel_str(&r->data[at & (STELLA_NAME_MAX - 1)], STELLA_NAME_MAX, interp);
		if (n > 0) {
			__u32 length = (__u32)(n - 1) & (STELLA_NAME_MAX - 1);
			r->b.interpreter_len = length;
			at += length;
		}
	}
	unsigned long start = BPF_CORE_READ(task, mm, arg_start);
	unsigned long end = BPF_CORE_READ(task, mm, arg_end);
	__u64 total = end > start ? end - start : 0;
	r->b.argv_total = total;
	__u32 length = total > STELLA_ARGV_MAX ? STELLA_ARGV_MAX : total;
	r->b.argv_status = total > STELLA_ARGV_MAX ? STELLA_TRUNCATED : STELLA_OK;
	at &= STELLA_NAME_MAX * 2 - 1;
	if (length > STELLA_ARGV_MAX)
		length = STELLA_ARGV_MAX;
	if (bpf_probe_read_user(&r->data[at], length, (void *)start)) {
		r->b.argv_status = STELLA_FAULT;
		length = 0;
	}
	r->b.argv_len = length;
	__u32 tail = at + length;
	if (r->b.filename_status != STELLA_FAULT && r->data[0] != '/')
		tail += add_directory(r, task, tail);
	__u64 size = sizeof(r->h) + sizeof(r->b) + tail;
	if (f && f->frames && wants_stack(STELLA_PROCESS_EXEC)) {
		r->b.frames = f->frames > STELLA_STACK_MAX ? STELLA_STACK_MAX : f->frames;
		bpf_probe_read_kernel(&r->data[tail & (STELLA_NAME_MAX * 8 - 1)], STELLA_STACK_BYTES, f->stack);
		size += r->b.frames * sizeof(struct stella_frame);
		f->frames = 0;
	}
	if (size > sizeof(*r))
		size = sizeof(*r);
	r->h.size = size;
	submit(lane, STELLA_LANE_EXEC, r, size);
	return 0;
}

/* Who asked for the exec: afterwards the stack is another program's. */
static __always_inline int exec_entry(void *ctx)
{
	if (!wants_stack(STELLA_PROCESS_EXEC) || !current_in_scope())
		return 0;
	struct inflight *f = own_storage();
	if (f)
		f->frames = stack_at(ctx, f->stack);
	return 0;
}

SEC("tracepoint/syscalls/sys_enter_execve")
int stella_execve(struct trace_event_raw_sys_enter *ctx)
{
	return exec_entry(ctx);
}

SEC("tracepoint/syscalls/sys_enter_execveat")
int stella_execveat(struct trace_event_raw_sys_enter *ctx)
{
	return exec_entry(ctx);
}

/* ---- TCP states ---------------------------------------------------------------------------------------- */

static __always_inline void read_addresses(struct sock *sk, __u16 family, __u8 *local, __u8 *peer)
{
	if (family == AF_INET) {
		__be32 a = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
		__builtin_memcpy(local, &a, 4);
		a = BPF_CORE_READ(sk, __sk_common.skc_daddr);
		__builtin_memcpy(peer, &a, 4);
	} else if (family == AF_INET6) {
		BPF_CORE_READ_INTO((struct in6_addr *)local, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO((struct in6_addr *)peer, sk, __sk_common.skc_v6_daddr);
	}
}

static __always_inline void remember_owner(struct sock *sk)
{
	struct owner owner = {};
	__u64 ids = bpf_get_current_pid_tgid();
	owner.tgid = ids >> 32;
	owner.tid = (__u32)ids;
	owner.uid = (__u32)bpf_get_current_uid_gid();
	owner.program = STELLA_PROGRAM_UNKNOWN;
	struct inflight *f = own_storage();
	if (f) {
		identify(f);
		owner.start_ns = f->start_ns;
		owner.program = f->program;
	}
	bpf_get_current_comm(owner.comm, sizeof(owner.comm));
	__u64 key = (__u64)sk;
	bpf_map_update_elem(&stella_owners, &key, &owner, BPF_ANY);
}

struct tcp_record {
	struct stella_header h;
	struct stella_tcp_state b;
};

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(stella_tcp, const struct sock *csk, int old_state, int new_state)
{
	struct sock *sk = (struct sock *)csk;
	if (BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return 0;
	__u64 key = (__u64)sk;
	/* connect() and listen() change the state in the process that called them; everything else may run in
	 * softirq, on the time of whoever was there. */
	bool mine = old_state == TCP_CLOSE && (new_state == TCP_SYN_SENT || new_state == TCP_LISTEN);
	if (mine)
		remember_owner(sk);
	struct cgroup *cgroup = NULL;
	if (bpf_core_field_exists(sk->sk_cgrp_data))
		cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	__u32 index;
	struct stella_lane *lane = lane_of(STELLA_LANE_SOCK, &index);
	if (!lane)
		return 0;
	if (!(mine ? current_in_scope() : socket_in_scope(cgroup))) {
		COUNT(STELLA_LANE_SOCK, lane->filtered_target);
		goto out;
	}
	struct tcp_record r = {};
	r.b.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	read_addresses(sk, r.b.family, r.b.saddr, r.b.daddr);
	if (!address_wanted(r.b.family, new_state == TCP_LISTEN ? r.b.saddr : r.b.daddr)) {
		COUNT(STELLA_LANE_SOCK, lane->filtered_network);
		goto out;
	}
	__u64 owner_cgroup = mine || !cgroup ? 0 : BPF_CORE_READ(cgroup, kn, id);
	if (!take_number_for(&r.h, STELLA_LANE_SOCK, owner_cgroup))
		goto out;
	if (mine) {
		fill_current(&r.h, own_storage());
		r.b.attribution = STELLA_ATTR_CURRENT;
	} else {
		struct owner *owner = bpf_map_lookup_elem(&stella_owners, &key);
		if (owner) {
			r.h.tgid = owner->tgid;
			r.h.tid = owner->tid;
			r.h.uid = owner->uid;
			r.h.start_ns = owner->start_ns;
			r.h.program = owner->program;
			__builtin_memcpy(r.h.comm, owner->comm, sizeof(owner->comm));
			r.b.attribution = STELLA_ATTR_OWNER;
		}
		r.h.cgroup_id = cgroup ? BPF_CORE_READ(cgroup, kn, id) : 0;
		if (cgroup)
			stella_know_cgroup((__u64)cgroup, r.h.cgroup_id);
	}
	r.h.type = STELLA_TCP_STATE;
	r.h.call = STELLA_CALL_SET_STATE;
	r.h.size = sizeof(r);
	r.b.sport = BPF_CORE_READ(sk, __sk_common.skc_num);
	r.b.dport = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_dport));
	r.b.old_state = old_state;
	r.b.new_state = new_state;
	submit(lane, STELLA_LANE_SOCK, &r, sizeof(r));
out:
	if (new_state == TCP_CLOSE)
		bpf_map_delete_elem(&stella_owners, &key);
	return 0;
}

/* ---- connect, accept ------------------------------------------------------------------------------------ */

static __always_inline struct sock *socket_of(__s32 fd)
{
	struct file *file = file_of(fd);
	if (!file)
		return NULL;
	struct socket *socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

static __always_inline void name_unix(struct net_record *r, const char *name, __u32 length, bool kernel)
{
	if (!length) {
		r->b.address_status = STELLA_ABSENT; /* an unnamed peer */
		return;
	}
	if (length > STELLA_UNIX_PATH_MAX)
		length = STELLA_UNIX_PATH_MAX;
	long failed = kernel ? bpf_probe_read_kernel(r->path, length, name) :
			       bpf_probe_read_user(r->path, length, name);
	if (failed) {
		r->b.address_status = STELLA_FAULT;
		return;
	}
	r->b.abstract = r->path[0] == 0;
	r->b.path_len = length;
}

/* connect: what the caller passed, read at exit. The kernel's own copy is gone when the call failed. */
static __always_inline void peer_of_connect(struct net_record *r, __u64 pointer, __u32 length, __s32 fd)
{
	if (bpf_probe_read_user(&r->b.family, 2, (void *)pointer)) {
		r->b.address_status = STELLA_FAULT;
		r->b.family = 0;
		return;
	}
	if (r->b.family == AF_INET || r->b.family == AF_INET6) {
		__be16 port = 0;
		long failed = bpf_probe_read_user(&port, 2, (void *)(pointer + 2));
		r->b.port = __builtin_bswap16(port);
		failed |= r->b.family == AF_INET ? bpf_probe_read_user(r->b.address, 4, (void *)(pointer + 4)) :
						   bpf_probe_read_user(r->b.address, 16, (void *)(pointer + 8));
		r->b.address_status = failed ? STELLA_FAULT : STELLA_OK;
		struct sock *sk = socket_of(fd);
		if (sk) {
			__u8 ignored[16];
			r->b.local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
			read_addresses(sk, r->b.family, r->b.local_address, ignored);
		}
	} else if (r->b.family == AF_UNIX) {
		name_unix(r, (const char *)pointer + 2, length > 2 ? length - 2 : 0, false);
	}
}

/* accept: the new socket itself knows, whatever the caller asked to be told. */
static __always_inline void peer_of_accept(struct net_record *r, __s32 listener, long result)
{
	struct sock *sk = socket_of(result >= 0 ? (__s32)result : listener);
	if (!sk) {
		r->b.address_status = STELLA_FAULT;
		return;
	}
	r->b.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (r->b.family == AF_UNIX) {
		struct unix_address *address = BPF_CORE_READ((struct unix_sock *)sk, addr);
		int length = address ? BPF_CORE_READ(address, len) : 0;
		name_unix(r, (const char *)address + bpf_core_field_offset(struct unix_address, name) + 2,
			  length > 2 ? length - 2 : 0, true);
		return;
	}
	r->b.local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	read_addresses(sk, r->b.family, r->b.local_address, r->b.address);
	if (result >= 0) {
		r->b.port = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_dport));
		remember_owner(sk);
	} else {
		r->b.address_status = STELLA_ABSENT;
	}
}

static __always_inline int net_exit(void *ctx, __u16 call, long result)
{
	if (!watched(STELLA_LANE_SYSCALL))
		return 0;
	struct pt_regs *regs = call_registers();
	const __s32 fd = PT_REGS_PARM1_CORE_SYSCALL(regs);
	__u32 zero = 0;
	union scratch *s = bpf_map_lookup_elem(&stella_scratch, &zero);
	if (!s)
		return 0;
	struct net_record *r = &s->net.n;
	__builtin_memset(r, 0, sizeof(*r));
	if (call == STELLA_CALL_CONNECT)
		peer_of_connect(r, PT_REGS_PARM2_CORE_SYSCALL(regs), PT_REGS_PARM3_CORE_SYSCALL(regs), fd);
	else
		peer_of_accept(r, fd, result);
	__u32 index;
	struct stella_lane *lane = lane_of(STELLA_LANE_SYSCALL, &index);
	if (!lane)
		return 0;
	if (!r->b.address_status && !address_wanted(r->b.family, r->b.address)) {
		COUNT(STELLA_LANE_SYSCALL, lane->filtered_network);
		return 0;
	}
	if (!take_number(&r->h, STELLA_LANE_SYSCALL))
		return 0;
	fill_current(&r->h, own_storage());
	r->h.type = STELLA_NET_CONNECT;
	r->h.call = call;
	r->b.result = result;
	r->b.fd = fd;
	__u64 length = r->b.path_len;
	if (length > STELLA_UNIX_PATH_MAX)
		length = STELLA_UNIX_PATH_MAX;
	__u64 size = sizeof(r->h) + sizeof(r->b) + length;
	if (wants_stack(STELLA_NET_CONNECT)) {
		r->b.frames = stack_at(ctx, &r->path[length]);
		size += r->b.frames * sizeof(struct stella_frame);
	}
	if (size > sizeof(s->net))
		size = sizeof(s->net);
	r->h.size = size;
	submit(lane, STELLA_LANE_SYSCALL, r, size);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_connect")
int stella_conn_ex(struct trace_event_raw_sys_exit *ctx)
{
	return net_exit(ctx, STELLA_CALL_CONNECT, ctx->ret);
}

SEC("tracepoint/syscalls/sys_exit_accept")
int stella_acc_ex(struct trace_event_raw_sys_exit *ctx)
{
	return net_exit(ctx, STELLA_CALL_ACCEPT, ctx->ret);
}

SEC("tracepoint/syscalls/sys_exit_accept4")
int stella_acc4_ex(struct trace_event_raw_sys_exit *ctx)
{
	return net_exit(ctx, STELLA_CALL_ACCEPT4, ctx->ret);
}

/* ---- the same as uprobes on libc, for the caller's stack --------------------------------------------------- */

struct u_net_record {
	struct net_record n;
	struct stella_frame stack[STELLA_STACK_MAX];
};

static __always_inline int u_net_entry(void *ctx, __u16 call, __s32 fd, unsigned long pointer, __u32 length)
{
	if (!watched(STELLA_LANE_UPROBE))
		return 0;
	struct inflight *f = remember(STELLA_LANE_UPROBE);
	if (!f)
		return 0;
	f->u_net_call = call + 1;
	f->u_pointer = pointer;
	f->u_length = length;
	f->u_fd = fd;
	long n = bpf_get_stack(ctx, f->stack, sizeof(f->stack), BPF_F_USER_STACK | BPF_F_USER_BUILD_ID);
	f->frames = n > 0 ? n / sizeof(struct stella_frame) : 0;
	return 0;
}

static __always_inline int u_net_exit(__u16 call, long result)
{
	struct inflight *f = recall();
	if (!f || f->u_net_call != call + 1)
		return 0;
	f->u_net_call = 0;
	__u32 index;
	struct stella_lane *lane = lane_of(STELLA_LANE_UPROBE, &index);
	if (!lane)
		return 0;
	/* Preemptible: no per-CPU scratch here. The number is taken once the record is known to be wanted. */
	struct stella_header h = {};
	struct u_net_record *r = bpf_ringbuf_reserve(&stella_ring, sizeof(*r), 0);
	if (!r) {
		COUNT(STELLA_LANE_UPROBE, lane->taken);
		COUNT(STELLA_LANE_UPROBE, lane->lost_ring_full);
		return 0;
	}
	__builtin_memset(&r->n, 0, sizeof(r->n));
	if (call == STELLA_CALL_U_CONNECT)
		peer_of_connect(&r->n, f->u_pointer, f->u_length, f->u_fd);
	else
		peer_of_accept(&r->n, f->u_fd, result);
	if (!r->n.b.address_status && !address_wanted(r->n.b.family, r->n.b.address)) {
		COUNT(STELLA_LANE_UPROBE, lane->filtered_network);
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return 0;
	}
	if (!take_number(&h, STELLA_LANE_UPROBE)) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		return 0;
	}
	r->n.h = h;
	fill_current(&r->n.h, f);
	r->n.h.type = STELLA_NET_CONNECT;
	r->n.h.call = call;
	r->n.h.size = sizeof(*r);
	r->n.b.result = result;
	r->n.b.fd = f->u_fd;
	r->n.b.frames = f->frames > STELLA_STACK_MAX ? STELLA_STACK_MAX : f->frames;
	__builtin_memcpy(r->stack, f->stack, sizeof(r->stack));
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}

/* C's int results arrive in a 64-bit register. */
#define U_NET(name, call, length)                                                                            \
	SEC("uprobe") int stella_##name##_ue(struct pt_regs *ctx)                                            \
	{                                                                                                    \
		return u_net_entry(ctx, call, (__s32)PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), length);        \
	}                                                                                                    \
	SEC("uretprobe") int stella_##name##_ux(struct pt_regs *ctx)                                         \
	{                                                                                                    \
		return u_net_exit(call, (__s32)PT_REGS_RC(ctx));                                             \
	}
U_NET(conn, STELLA_CALL_U_CONNECT, PT_REGS_PARM3(ctx))
U_NET(acc, STELLA_CALL_U_ACCEPT, 0)
U_NET(acc4, STELLA_CALL_U_ACCEPT4, 0)

/* ---- OpenSSL: how many bytes, never which ------------------------------------------------------------------ */

struct ssl_record {
	struct stella_header h;
	struct stella_ssl_op b;
};

static __always_inline int ssl_entry(__u16 call, __u64 bytes_pointer)
{
	if (!watched(STELLA_LANE_UPROBE))
		return 0;
	struct inflight *f = remember(STELLA_LANE_UPROBE);
	if (f) /* +1, so that a fresh zeroed slot means "nothing open" */
		f->ssl_bytes[(call - STELLA_CALL_SSL_READ) & 3] = bytes_pointer + 1;
	return 0;
}

static __always_inline int ssl_exit(void *ctx, __u16 call, __s32 result)
{
	struct inflight *f = recall();
	if (!f)
		return 0;
	__u64 *slot = &f->ssl_bytes[(call - STELLA_CALL_SSL_READ) & 3];
	if (!*slot)
		return 0;
	__u64 pointer = *slot - 1;
	*slot = 0;
	struct ssl_record r = {};
	struct stella_lane *lane = take_number(&r.h, STELLA_LANE_UPROBE);
	if (!lane)
		return 0;
	fill_current(&r.h, f);
	r.h.type = STELLA_SSL_OP;
	r.h.call = call;
	r.h.size = sizeof(r);
	r.b.result = result;
	r.b.library = bpf_get_attach_cookie(ctx);
	if (call == STELLA_CALL_SSL_READ || call == STELLA_CALL_SSL_WRITE)
		r.b.bytes = result > 0 ? result : 0;
	else if (result == 1)
		bpf_probe_read_user(&r.b.bytes, sizeof(r.b.bytes), (void *)pointer);
	submit(lane, STELLA_LANE_UPROBE, &r, sizeof(r));
	return 0;
}

#define SSL(name, call, pointer)                                                                             \
	SEC("uprobe") int stella_##name##_ue(struct pt_regs *ctx)                                            \
	{                                                                                                    \
		return ssl_entry(call, pointer);                                                             \
	}                                                                                                    \
	SEC("uretprobe") int stella_##name##_ux(struct pt_regs *ctx)                                         \
	{                                                                                                    \
		return ssl_exit(ctx, call, (__s32)PT_REGS_RC(ctx));                                          \
	}
SSL(sr, STELLA_CALL_SSL_READ, 0)
SSL(sw, STELLA_CALL_SSL_WRITE, 0)
SSL(srx, STELLA_CALL_SSL_READ_EX, PT_REGS_PARM4(ctx))
SSL(swx, STELLA_CALL_SSL_WRITE_EX, PT_REGS_PARM4(ctx))

/* ---- target containers whose cgroup is made while we watch ------------------------------------------------- */

/* A container's cgroup is called by its id, with the runtime's prefix before it or not. */
static __noinline bool names_target(const char *name)
{
	static const __u8 prefixes[] = { 0, 5, 7, 8, 15 }; /* crio-, docker-/libpod-, nerdctl-, cri-containerd- */
	char head[32] = {};
	bpf_probe_read_kernel_str(head, sizeof(head), name);
	for (int i = 0; i < 5; i++) {
		__u32 at = prefixes[i] & 15;
		if (at && head[at - 1] != '-')
			continue;
		struct name_key key = {};
		for (int k = 0; k < 12; k++)
			key.hex[k] = head[at + k];
		if (bpf_map_lookup_elem(&stella_target_names, &key))
			return true;
	}
	return false;
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(stella_mkdir, struct cgroup *cgroup, const char *path)
{
	int level = BPF_CORE_READ(cgroup, level);
	int hierarchy = BPF_CORE_READ(cgroup, root, hierarchy_id);
	bool v1 = hierarchy && hierarchy == (int)config.v1_hierarchy;
	if ((hierarchy && !v1) || level <= 0 || level >= MAX_CGROUP_DEPTH)
		return 0;
	if (!names_target(BPF_CORE_READ(cgroup, kn, name)))
		return 0;
	__u64 id = BPF_CORE_READ(cgroup, kn, id) | (v1 ? STELLA_CGROUP_V1 : 0);
	__u8 one = 1;
	bpf_map_update_elem(&stella_targets, &id, &one, BPF_ANY);
	__sync_fetch_and_or(&found_levels, 1ULL << level);
	return 0;
}

/* ---- the end of a throttle, told by the collector's clock: run by it some times a second ---------------------- */

static __always_inline void end_throttle(struct window *w, __u64 cgroup, __u64 limit)
{
	__u64 now = bpf_ktime_get_boot_ns();
	if (!w->throttled_ns || now - w->dropped_ns < THROTTLE_QUIET_NS)
		return;
	/* What is dropped meanwhile counts for the next time. */
	struct window told = { .throttled_ns = w->throttled_ns, .dropped_ns = w->dropped_ns };
	told.dropped = __sync_lock_test_and_set(&w->dropped, 0);
	w->throttled_ns = 0;
	tell_throttle(STELLA_LANE_UPROBE, &told, cgroup, limit, true);
}

static long end_cgroup_throttle(void *map, __u64 *cgroup, struct window *w, void *ctx)
{
	end_throttle(w, *cgroup, config.max_cgroup_events_per_window);
	return 0;
}

SEC("syscall")
int stella_limits(void *ctx)
{
	__u32 zero = 0;
	struct window *w = bpf_map_lookup_elem(&stella_window, &zero);
	if (w)
		end_throttle(w, 0, config.max_events_per_window);
	bpf_for_each_map_elem(&stella_windows, end_cgroup_throttle, NULL, 0);
	return 0;
}

#include "functions.bpf.h"
#include "uring.bpf.h"
