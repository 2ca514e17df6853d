"""Numbers of system calls: those that `system_calls` names, on the machines that we run on.

From the kernel's own headers (asm/unistd_64.h, asm-generic/unistd.h), as of Linux 6.1.  A call that a machine does
not have has no number there.
"""

from __future__ import annotations

from typing import Final

#: AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of linux/audit.h, by the machine's name in uname(2).
ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
#: The last call that the headers know.  It is the same everywhere: calls that are newer are numbered alike.
LAST: Final = 450
# fmt: off
NUMBERS: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
        "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "mincore": 27, "madvise": 28, "dup": 32,
        "dup2": 33, "nanosleep": 35, "getpid": 39, "socket": 41, "connect": 42, "sendto": 44, "recvfrom": 45,
        "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "getsockname": 51, "getpeername": 52,
        "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58, "execve":
        59, "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "fcntl": 72, "flock": 73, "fsync": 74,
        "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "chdir": 80, "rename": 82, "mkdir": 83, "rmdir": 84,
        "unlink": 87, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit":
        97, "getrusage": 98, "sysinfo": 99, "times": 100, "ptrace": 101, "getuid": 102, "syslog": 103, "getgid":
        104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "setsid": 112, "getgroups": 115,
        "getresuid": 118, "getresgid": 120, "getsid": 124, "capget": 125, "capset": 126, "rt_sigtimedwait": 128,
        "sigaltstack": 131, "uselib": 134, "personality": 135, "ustat": 136, "statfs": 137, "fstatfs": 138,
        "sysfs": 139, "getpriority": 140, "setpriority": 141, "mlock": 149, "munlock": 150, "vhangup": 153,
        "modify_ldt": 154, "pivot_root": 155, "_sysctl": 156, "prctl": 157, "arch_prctl": 158, "adjtimex": 159,
        "setrlimit": 160, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166,
        "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172,
        "ioperm": 173, "create_module": 174, "init_module": 175, "delete_module": 176, "get_kernel_syms": 177,
        "query_module": 178, "quotactl": 179, "nfsservctl": 180, "afs_syscall": 183, "gettid": 186, "time": 201,
        "futex": 202, "sched_getaffinity": 204, "lookup_dcookie": 212, "getdents64": 217, "set_tid_address":
        218, "restart_syscall": 219, "fadvise64": 221, "clock_settime": 227, "clock_gettime": 228,
        "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
        "tgkill": 234, "vserver": 236, "kexec_load": 246, "waitid": 247, "add_key": 248, "request_key": 249,
        "keyctl": 250, "ioprio_set": 251, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263,
        "renameat": 264, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270, "ppoll": 271,
        "unshare": 272, "set_robust_list": 273, "get_robust_list": 274, "utimensat": 280, "epoll_pwait": 281,
        "timerfd_create": 283, "timerfd_settime": 286, "eventfd2": 290, "epoll_create1": 291, "dup3": 292,
        "pipe2": 293, "inotify_init1": 294, "preadv": 295, "perf_event_open": 298, "recvmmsg": 299,
        "fanotify_init": 300, "fanotify_mark": 301, "prlimit64": 302, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "clock_adjtime": 305, "sendmmsg": 307, "setns": 308, "getcpu": 309,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "renameat2": 316,
        "seccomp": 317, "getrandom": 318, "memfd_create": 319, "kexec_file_load": 320, "bpf": 321,
        "userfaultfd": 323, "membarrier": 324, "statx": 332, "rseq": 334, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount":
        429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
        "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "faccessat2": 439, "process_madvise": 440,
        "epoll_pwait2": 441, "mount_setattr": 442, "quotactl_fd": 443, "landlock_create_ruleset": 444,
        "landlock_add_rule": 445, "landlock_restrict_self": 446, "memfd_secret": 447, "futex_waitv": 449,
    },
    "aarch64": {
        "getcwd": 17, "lookup_dcookie": 18, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait":
        22, "dup": 23, "dup3": 24, "fcntl": 25, "inotify_init1": 26, "ioctl": 29, "ioprio_set": 30, "flock": 32,
        "mkdirat": 34, "unlinkat": 35, "renameat": 38, "umount2": 39, "mount": 40, "pivot_root": 41,
        "nfsservctl": 42, "statfs": 43, "fstatfs": 44, "ftruncate": 46, "faccessat": 48, "chdir": 49, "chroot":
        51, "fchmod": 52, "fchmodat": 53, "openat": 56, "close": 57, "vhangup": 58, "pipe2": 59, "quotactl": 60,
        "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
        "pwrite64": 68, "preadv": 69, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat":
        80, "fsync": 82, "fdatasync": 83, "timerfd_create": 85, "timerfd_settime": 86, "utimensat": 88, "acct":
        89, "capget": 90, "capset": 91, "personality": 92, "exit": 93, "exit_group": 94, "waitid": 95,
        "set_tid_address": 96, "unshare": 97, "futex": 98, "set_robust_list": 99, "get_robust_list": 100,
        "nanosleep": 101, "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "syslog": 116, "ptrace": 117,
        "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "kill": 129, "tgkill": 131,
        "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigtimedwait": 137, "rt_sigreturn":
        139, "setpriority": 140, "getpriority": 141, "reboot": 142, "getresuid": 148, "getresgid": 150, "times":
        153, "getsid": 156, "setsid": 157, "getgroups": 158, "uname": 160, "sethostname": 161, "setdomainname":
        162, "getrlimit": 163, "setrlimit": 164, "getrusage": 165, "umask": 166, "prctl": 167, "getcpu": 168,
        "gettimeofday": 169, "settimeofday": 170, "adjtimex": 171, "getpid": 172, "getppid": 173, "getuid": 174,
        "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "socket": 198,
        "socketpair": 199, "bind": 200, "connect": 203, "getsockname": 204, "getpeername": 205, "sendto": 206,
        "recvfrom": 207, "setsockopt": 208, "getsockopt": 209, "shutdown": 210, "sendmsg": 211, "recvmsg": 212,
        "brk": 214, "munmap": 215, "mremap": 216, "add_key": 217, "request_key": 218, "keyctl": 219, "clone":
        220, "execve": 221, "mmap": 222, "fadvise64": 223, "swapon": 224, "swapoff": 225, "mprotect": 226,
        "mlock": 228, "munlock": 229, "mincore": 232, "madvise": 233, "perf_event_open": 241, "recvmmsg": 243,
        "wait4": 260, "prlimit64": 261, "fanotify_init": 262, "fanotify_mark": 263, "name_to_handle_at": 264,
        "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "sendmmsg": 269, "process_vm_readv": 270,
        "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "renameat2": 276, "seccomp": 277,
        "getrandom": 278, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "membarrier": 283, "statx": 291,
        "rseq": 293, "kexec_file_load": 294, "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter":
        426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
        "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435, "close_range": 436, "openat2": 437,
        "pidfd_getfd": 438, "faccessat2": 439, "process_madvise": 440, "epoll_pwait2": 441, "mount_setattr":
        442, "quotactl_fd": 443, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
        "landlock_restrict_self": 446, "memfd_secret": 447, "futex_waitv": 449,
    },
}
# fmt: on
