"""bcc's opensnoop in its shape: a perf buffer, a callback for each event, one printed line.

    python3 bcc_opens.py PID        Debian's Python, with python3-bpfcc; ends with SIGINT

bcc's own opensnoop needs kprobes or fentry, which not every kernel has; this one hooks the tracepoint.
"""

import sys
from typing import Any

from bcc import BPF

TEXT = r"""
#include <linux/limits.h>
struct data { u64 ts; u32 pid; char comm[16]; char path[NAME_MAX]; };
BPF_PERF_OUTPUT(events);
BPF_PERCPU_ARRAY(scratch, struct data, 1);
TRACEPOINT_PROBE(syscalls, sys_enter_openat)
{
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    int zero = 0;
    struct data *d = scratch.lookup(&zero);
    if (pid != WANTED || !d)
        return 0;
    d->ts = bpf_ktime_get_ns();
    d->pid = pid;
    bpf_get_current_comm(d->comm, sizeof(d->comm));
    bpf_probe_read_user_str(d->path, sizeof(d->path), (void *)args->filename);
    events.perf_submit(args, d, sizeof(*d));
    return 0;
}
"""


def main() -> None:
    """Print the opens of one process."""
    program = BPF(text=TEXT.replace("WANTED", str(int(sys.argv[1]))))
    lost = 0

    def on_event(_: int, data: Any, __: int) -> None:
        event = program["events"].event(data)
        comm, path = event.comm.decode("utf-8", "replace"), event.path.decode("utf-8", "replace")
        print("%-6d %-16s %4d %3d %s" % (event.pid, comm, 0, 0, path))  # noqa: UP031  # as opensnoop has it

    def on_loss(count: int) -> None:
        nonlocal lost
        lost += count

    program["events"].open_perf_buffer(on_event, page_cnt=64, lost_cb=on_loss)
    try:
        while True:
            program.perf_buffer_poll()
    except KeyboardInterrupt:
        sys.stdout.flush()
        print(f"lost {lost}", file=sys.stderr)


if __name__ == "__main__":
    main()
