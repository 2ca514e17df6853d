/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Use of io_uring: opens, connects and accepts that are asked for through a ring never pass a system call of their
 * own, so no probe of ours sees them.  They are counted here, so that silence is not taken for absence.
 * Included at the end of stella.bpf.c, whose scope it uses.  No records, no numbers.
 */
#pragma once

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct io_kiocb {
	__u8 opcode;
};

#pragma clang attribute pop

/* linux/io_uring.h */
#define URING_ACCEPT 13
#define URING_CONNECT 16
#define URING_OPENAT 18
#define URING_OPENAT2 28

struct stella_uring_counts {
	__u64 rings; /* made while we looked */
	__u64 opens;
	__u64 connects;
	__u64 accepts;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stella_uring_counts);
} stella_uring SEC(".maps");

SEC("tp_btf/io_uring_create")
int stella_uring_made(void *ctx)
{
	__u32 zero = 0;
	struct stella_uring_counts *counts = bpf_map_lookup_elem(&stella_uring, &zero);
	if (counts && current_in_scope())
		__sync_fetch_and_add(&counts->rings, 1);
	return 0;
}

/* Runs in the task that asks, or in the kernel's thread of its ring, which has its cgroup.  Since Linux 6.4 by this
 * name. */
SEC("tp_btf/io_uring_submit_req")
int BPF_PROG(stella_uring_asked, struct io_kiocb *request)
{
	__u8 what = request->opcode;
	if (what != URING_OPENAT && what != URING_OPENAT2 && what != URING_CONNECT && what != URING_ACCEPT)
		return 0;
	__u32 zero = 0;
	struct stella_uring_counts *counts = bpf_map_lookup_elem(&stella_uring, &zero);
	if (!counts || !current_in_scope())
		return 0;
	if (what == URING_CONNECT)
		__sync_fetch_and_add(&counts->connects, 1);
	else if (what == URING_ACCEPT)
		__sync_fetch_and_add(&counts->accepts, 1);
	else
		__sync_fetch_and_add(&counts->opens, 1);
	return 0;
}
