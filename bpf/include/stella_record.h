/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * What the kernel side and user space share: records in the ring, lanes, configuration.
 *
 * User space decodes these in stella_shared/kernel_records.py and stella_collector/kernel.py; a test compares both
 * with the BTF of the built object, so a change here that is not made there fails.
 * Little-endian, natural alignment, no padding that is not named.
 */
#pragma once

#define STELLA_LANE_KINDS 4
enum stella_lane_kind {
	STELLA_LANE_SYSCALL = 0, /* syscall tracepoints: preemption off, never nested on a CPU */
	STELLA_LANE_EXEC = 1,	 /* tp_btf/sched_process_exec: one program, guarded against itself */
	STELLA_LANE_SOCK = 2,	 /* tp_btf/inet_sock_set_state: the same, often in softirq */
	STELLA_LANE_UPROBE = 3,	 /* uprobes: preemptible, so numbers may reach the ring out of order */
};

enum stella_record_type {
	STELLA_FILE_OPEN = 1,
	STELLA_PROCESS_EXEC = 2,
	STELLA_TCP_STATE = 3,
	STELLA_NET_CONNECT = 4,
	STELLA_SSL_OP = 5,
	STELLA_FUNCTION_CALL = 6,
	STELLA_THROTTLE = 7,
};

enum stella_status { /* of a string or an address that was read from memory */
	STELLA_OK = 0,
	STELLA_TRUNCATED = 1,
	STELLA_FAULT = 2,
	STELLA_ABSENT = 3,
};

#define STELLA_PATH_MAX 4096
#define STELLA_NAME_MAX 512
#define STELLA_ARGV_MAX 2048
#define STELLA_UNIX_PATH_MAX 108
#define STELLA_STACK_MAX 8
#define STELLA_ANCESTORS_MAX 6
/* A path that was walked in the kernel, from its end; what is longer loses its begin. */
#define STELLA_WALK_MAX 512
#define STELLA_WALK_ROOM (STELLA_WALK_MAX + 256)
#define STELLA_SYMBOL_MAX 200
#define STELLA_SYMBOL_SHORT 64

struct stella_header {
	__u64 ts_ns;	 /* CLOCK_BOOTTIME */
	__u64 seq;	 /* number of this record in its lane */
	__u64 cgroup_id; /* of the socket for tcp_state; see STELLA_CGROUP_V1 */
	__u64 start_ns;	 /* start of the process, CLOCK_BOOTTIME: with tgid, its identity */
	__u64 program;	 /* key of stella_programs, or enum stella_program_key */
	__u32 tgid;
	__u32 tid;
	__u32 uid;
	__u32 lane; /* cpu * STELLA_LANE_KINDS + kind */
	__u16 type;
	__u16 call; /* which entry point: enum stella_call */
	__u32 size; /* of the whole record, this header included */
	char comm[16];
};

enum stella_call {
	STELLA_CALL_OPEN = 0,
	STELLA_CALL_OPENAT = 1,
	STELLA_CALL_OPENAT2 = 2,
	STELLA_CALL_EXEC = 3,
	STELLA_CALL_SET_STATE = 4,
	STELLA_CALL_CONNECT = 5,
	STELLA_CALL_ACCEPT = 6,
	STELLA_CALL_ACCEPT4 = 7,
	STELLA_CALL_U_CONNECT = 8,
	STELLA_CALL_U_ACCEPT = 9,
	STELLA_CALL_U_ACCEPT4 = 10,
	STELLA_CALL_SSL_READ = 11,
	STELLA_CALL_SSL_WRITE = 12,
	STELLA_CALL_SSL_READ_EX = 13,
	STELLA_CALL_SSL_WRITE_EX = 14,
	STELLA_CALL_FUNCTION = 15,
	STELLA_CALL_THROTTLE = 16,
};

enum stella_program_key { /* keys that name no program */
	STELLA_PROGRAM_NONE = 0,   /* no process is named */
	STELLA_PROGRAM_KERNEL = 1, /* a thread of the kernel's own */
	STELLA_PROGRAM_UNKNOWN = 2, /* there was no memory to look */
};

/* Ids in a cgroup v1 hierarchy, where a task has no cgroup v2 of its own, have this added. */
#define STELLA_CGROUP_V1 (1ULL << 62)

enum stella_walked { /* what a walked path belongs to */
	STELLA_WALKED_NOTHING = 0,
	STELLA_WALKED_FILE = 1,	     /* the file that was opened */
	STELLA_WALKED_DIRECTORY = 2, /* the directory that a relative path starts from */
};

enum stella_walk_flag {
	STELLA_WALK_CUT = 1,	  /* the begin is missing */
	STELLA_WALK_UNLINKED = 2, /* the file has no name any more */
	STELLA_WALK_DETACHED = 4, /* it stands in no directory: memfd, pipe */
};

struct stella_file_open {
	__s64 result; /* fd, or -errno */
	__u64 flags;
	__u64 resolve; /* openat2 only */
	__u64 inode;   /* of the walked file */
	__u32 mode;
	__s32 dfd;
	__u32 device;	 /* major << 20 | minor, of the walked file */
	__u16 path_len; /* without the terminating zero */
	__u16 walked_len;
	__u8 path_status;
	__u8 walked; /* enum stella_walked */
	__u8 walked_flags;
	__u8 frames;
	__u32 lpm_prefixlen; /* must stand right before the path: both are the key of the prefix tries */
	/* path_len bytes of path, walked_len bytes of walked path, frames * struct stella_frame follow */
};

struct stella_ancestor {
	__u64 start_ns;
	__u32 pid;
	__u32 reserved;
	char comm[16];
};

struct stella_process_exec {
	__u64 inode; /* of the program's file */
	__u32 device;
	__u32 argv_total; /* bytes the process was given */
	__u16 filename_len;
	__u16 interpreter_len;
	__u16 argv_len;
	__u16 directory_len; /* where a relative filename starts from */
	__u8 filename_status;
	__u8 argv_status;
	__u8 directory_flags;
	__u8 ancestors_count;
	__u32 frames;
	struct stella_ancestor ancestors[STELLA_ANCESTORS_MAX]; /* the parent first */
	/* filename, interpreter, argv (zero-separated), directory, frames * struct stella_frame follow */
};

/* What a program key means. Written once, in place; `ready` comes last. */
struct stella_program {
	__u64 inode;
	__u32 device;
	__u16 path_at; /* the path stands at path[path_at .. STELLA_WALK_MAX) */
	__u8 flags;    /* enum stella_walk_flag */
	__u8 ready;
	char path[STELLA_WALK_ROOM];
};

/* The path of a cgroup from the root of its hierarchy. The same rules. */
struct stella_cgroup {
	__u16 path_at;
	__u8 flags;
	__u8 ready;
	__u32 reserved;
	char path[STELLA_WALK_ROOM];
};

enum stella_attribution {
	STELLA_ATTR_NONE = 0,	 /* softirq on somebody's time: the process is not known */
	STELLA_ATTR_CURRENT = 1, /* the running process made this transition */
	STELLA_ATTR_OWNER = 2,	 /* remembered: who connected, listened on or accepted this socket */
};

struct stella_tcp_state {
	__u16 family;
	__u16 sport;
	__u16 dport;
	__u8 old_state;
	__u8 new_state;
	__u8 saddr[16];
	__u8 daddr[16];
	__u32 attribution;
	__u32 reserved;
};

struct stella_net_connect {
	__s64 result; /* 0 or fd, or -errno */
	__s32 fd;
	__u16 family;
	__u16 port; /* of the peer, host order */
	__u16 local_port;
	__u16 path_len; /* AF_UNIX */
	__u8 address_status;
	__u8 abstract; /* AF_UNIX: the name has no file */
	__u8 frames;   /* of user stack that follow the path */
	__u8 reserved;
	__u8 address[16]; /* IPv4 stands in the first four bytes */
	__u8 local_address[16];
	/* path, then frames * struct stella_frame follow */
};

struct stella_frame { /* the kernel's struct bpf_stack_build_id */
	__s32 status; /* 1: build_id and offset hold; 2: offset is an address; 0: none */
	__u8 build_id[20];
	__u64 offset;
};

struct stella_ssl_op {
	__s64 result;
	__u64 bytes;
	__u32 library; /* index into the batch's list of libraries */
	__u32 reserved;
};

struct stella_function_call {
	__u64 offset; /* of the function in its file */
	__u64 count;  /* calls that this record stands for */
	__u64 first_ns; /* of the first and the last of them, where calls are counted; else 0 */
	__u64 last_ns;
	__u32 library; /* index into the batch's list of libraries: the binary's name */
	__u16 symbol_len;
	__u8 build_id_len;
	__u8 frames;
	__u8 build_id[20];
	__u32 symbol_total; /* bytes the symbol has in the file */
	/* frames * struct stella_frame, then symbol_len bytes of symbol follow */
};

/* ---- what is not a record ---- */

#define STELLA_FUNCTION_STACK 1
struct stella_function { /* one watched function; the index of its row is its probe's cookie */
	__u64 offset;
	__u32 library;
	__u16 symbol_len;
	__u8 build_id_len; /* 0: none, or one of more than 20 bytes */
	__u8 flags;
	__u8 build_id[20];
	__u32 symbol_total;
	char symbol[STELLA_SYMBOL_MAX]; /* zeros behind it */
};

struct stella_flush { /* what a flush of the counters did */
	__u64 written; /* records */
	__u64 left;    /* not 0: no room in the ring, so some counters wait */
};

struct stella_file_id {
	__u64 inode;
	__u64 changed_ns;
	__u32 device; /* the kernel's dev_t: major << 20 | minor */
	__u32 generation;
};
enum stella_seen_state {
	STELLA_SEEN_ONCE = 1,
	STELLA_SEEN_EACH = 2, /* user space wants to know of each process */
};
enum stella_notice_kind {
	STELLA_NOTICE_EXEC = 1,
	STELLA_NOTICE_MAP = 2,
};
struct stella_notice { /* a process has begun to run this file */
	__u64 ts_ns;
	struct stella_file_id file;
	__u32 tgid;
	__u32 kind;
	__u16 path_at; /* the path stands at path[path_at .. STELLA_WALK_MAX) */
	__u8 flags;    /* enum stella_walk_flag */
	__u8 reserved[5];
	char path[STELLA_WALK_ROOM];
};

struct stella_mapped_question {
	__u64 address;
};
struct stella_mapped {
	__u64 inode;
	__u32 device;
	__u32 found;
};

/* One lane's counters. User space maps the array of them; a collector that dies leaves it pinned. */
struct stella_lane {
	__u64 taken;	     /* numbers handed out: the next one is this */
	__u64 lost_ring_full; /* numbers whose record found no room */
	__u64 lost_rate_limit;
	__u64 lost_inflight; /* numbers whose entry could not be remembered until the exit */
	__u64 filtered_target;
	__u64 filtered_path;
	__u64 filtered_network;
	__u64 reserved[9]; /* a lane has its own cache lines */
};

/* A limit began to cost records, or stopped to. Names no process. */
struct stella_throttle {
	__u64 since_ns; /* when it began */
	__u64 until_ns; /* of a stop: when the last record was dropped */
	__u64 dropped;	/* of a stop: records that it cost, all lanes together */
	__u64 limit_per_second;
	__u32 scope; /* enum stella_throttle_scope */
	__u32 stop;
};
enum stella_throttle_scope {
	STELLA_THROTTLE_NODE = 0,
	STELLA_THROTTLE_CGROUP = 1, /* the header's */
};

/* What the configuration asks for; a reload writes it anew. */
struct stella_config {
	__u32 scoped; /* there are targets: only they are recorded */
	__u32 path_allow;
	__u32 path_deny;
	__u32 network_allow;
	__u32 network_deny;
	__u32 kernel_paths;	     /* walk the path of every opened file, not of relative ones only */
	__u64 max_events_per_window; /* 0: no limit; a window is 100 ms */
	__u64 max_cgroup_events_per_window;
	__u32 v1_hierarchy;	     /* id of the cgroup v1 hierarchy of the pids controller; 0: there is none */
	__u32 stacks;		     /* bit n: events of enum stella_record_type n have the caller's stack */
};

/* Written while running: what the targets are. */
struct stella_scope {
	__u64 cgroup_levels; /* bit n: some target cgroup stands n levels below the root */
	__u64 namespaces;    /* how many namespace targets there are */
};
