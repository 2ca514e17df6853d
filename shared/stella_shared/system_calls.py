"""System calls that no part of a node without privileges has a use for, and whoever takes one over might.

The other parts are made of libraries that may change what they call, so a list of what is allowed would break them;
this one bounds what a hole in one of them is good for.
"""

from __future__ import annotations

from typing import Final

#: By what they open.
GROUPS: Final = {
    "Other processes' memory and files": """
                 ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd
    """,
    "The kernel's own programs, events and memory": """
                 bpf perf_event_open userfaultfd init_module finit_module delete_module kexec_load
        kexec_file_load lookup_dcookie syslog
    """,
    "Ways past the paths and calls that others watch": """
                 io_uring_setup io_uring_enter io_uring_register open_by_handle_at name_to_handle_at
        fanotify_init fanotify_mark memfd_secret
    """,
    "Mounts, roots and namespaces": """
                 mount umount2 move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr pivot_root
        chroot unshare setns
    """,
    "Keys of the kernel": """
                 add_key request_key keyctl
    """,
    "The machine": """
                 reboot swapon swapoff acct quotactl quotactl_fd sethostname setdomainname settimeofday
        clock_settime adjtimex clock_adjtime vhangup
    """,
    "Old doors": """
                 personality modify_ldt iopl ioperm ioprio_set uselib ustat sysfs _sysctl nfsservctl
        create_module get_kernel_syms query_module vserver afs_syscall
    """,
}
REFUSED: Final = frozenset(name for group in GROUPS.values() for name in group.split())
