"""The system calls that the collector may make.  Everything else is refused (`stella_shared.system_call_filter`).

Found by tracing it under the system tests, and rounded up to what C library, Python and event loop may take instead
on another machine or in another release.  `deploy/seccomp/collector.json` is made of the same lists.
"""

from __future__ import annotations

from typing import Final

#: By what they are for; a name that a machine does not have means nothing there.
GROUPS: Final = {
    "Files that are there: the object, configuration, /proc, cgroup trees, programs and libraries": """
                 openat openat2 open close close_range read readv pread64 preadv lseek fstat stat lstat
        newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents64
        getcwd fcntl ioctl dup dup2 dup3 flock chdir fadvise64 inotify_init1
    """,
    "Files of its own: pins, the name of the run, the log, questions to the reader": """
                 write writev pwrite64 mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir
        ftruncate fsync fdatasync chmod fchmod fchmodat umask utimensat memfd_create
    """,
    "Memory": """
                 mmap mprotect munmap mremap madvise brk mincore membarrier mlock munlock
    """,
    "Threads, time, and the event loop": """
                 futex futex_waitv set_robust_list get_robust_list rseq set_tid_address arch_prctl gettid
        sched_yield sched_getaffinity getcpu clock_gettime clock_getres gettimeofday time
        clock_nanosleep nanosleep restart_syscall epoll_create1 epoll_ctl epoll_wait epoll_pwait
        epoll_pwait2 poll ppoll select pselect6 eventfd2 timerfd_create timerfd_settime pipe pipe2
    """,
    "The bus, and the socket to the reader": """
                 socket socketpair connect bind getsockname getpeername getsockopt setsockopt sendto sendmsg
        sendmmsg recvfrom recvmsg recvmmsg shutdown
    """,
    "Signals, and the process that reads files": """
                 rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack kill tgkill fork vfork
        execve wait4 waitid exit exit_group pidfd_open pidfd_send_signal setsid
    """,
    "Who we are, and what the machine is": """
                 getpid getppid getpgrp getsid getuid geteuid getgid getegid getgroups getresuid getresgid
        uname sysinfo getrandom getrusage getrlimit prlimit64 getpriority times
    """,
    "Giving up more": """
                 prctl capget capset seccomp landlock_create_ruleset landlock_add_rule
        landlock_restrict_self         setrlimit setpriority
    """,
    "What it is for": """
                 bpf perf_event_open
    """,
}
#: `clone` is allowed too, without namespaces; `clone3`, whose flags no filter can see, says that it does not exist.
ALLOWED: Final = frozenset(name for group in GROUPS.values() for name in group.split())
#: Ceases to be allowed when no probe will have to be attached any more.
ATTACHING: Final = frozenset({"perf_event_open"})
#: What a container engine calls between putting its filter on and starting the collector.
STARTING: Final = frozenset({"fchdir", "fchown", "setgid", "setgroups", "setuid", "setresgid", "setresuid"})
