/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Where kernels differ: each helper says since when, and reads either shape.
 */
#pragma once

/* struct kernfs_node: `parent` became `__parent` in 6.15 (633488947ef6). */
struct kernfs_node___old {
	struct kernfs_node *parent;
} __attribute__((preserve_access_index));
struct kernfs_node___new {
	struct kernfs_node *__parent;
} __attribute__((preserve_access_index));

static __always_inline struct kernfs_node *kernfs_parent_of(struct kernfs_node *node)
{
	struct kernfs_node___new *new = (void *)node;
	if (bpf_core_field_exists(new->__parent))
		return BPF_CORE_READ(new, __parent);
	struct kernfs_node___old *old = (void *)node;
	return BPF_CORE_READ(old, parent);
}

/* struct inode: `i_ctime` became `__i_ctime` in 6.6 (13bc24457850), and two numbers in 6.11 (3aa63a569c64). */
struct timespec64 {
	__s64 tv_sec;
	long tv_nsec;
} __attribute__((preserve_access_index));
struct inode___split {
	__s64 i_ctime_sec;
	__u32 i_ctime_nsec;
} __attribute__((preserve_access_index));
struct inode___private {
	struct timespec64 __i_ctime;
} __attribute__((preserve_access_index));
struct inode___plain {
	struct timespec64 i_ctime;
} __attribute__((preserve_access_index));

static __always_inline __u64 changed_ns_of(struct inode *inode)
{
	struct inode___split *split = (void *)inode;
	/* Since 6.13 the top bit of the nanoseconds says that somebody has asked for them (multigrain timestamps). */
	if (bpf_core_field_exists(split->i_ctime_sec))
		return BPF_CORE_READ(split, i_ctime_sec) * 1000000000ULL +
		       (BPF_CORE_READ(split, i_ctime_nsec) & ~(1U << 31));
	struct inode___private *private = (void *)inode;
	if (bpf_core_field_exists(private->__i_ctime))
		return BPF_CORE_READ(private, __i_ctime.tv_sec) * 1000000000ULL +
		       BPF_CORE_READ(private, __i_ctime.tv_nsec);
	struct inode___plain *plain = (void *)inode;
	return BPF_CORE_READ(plain, i_ctime.tv_sec) * 1000000000ULL + BPF_CORE_READ(plain, i_ctime.tv_nsec);
}
