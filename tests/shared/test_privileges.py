"""Capabilities and system calls that a process gives up: tried in processes that do."""

from __future__ import annotations

import errno
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stella_collector import system_calls as collector_calls
from stella_shared import system_call_filter, system_calls
from stella_shared.system_call_numbers import ARCHITECTURES, LAST, NUMBERS

ROOT = Path(__file__).resolve().parents[2]
ALLOW, TRAP, KILL = 0x7FFF0000, 0x30000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def tried(program: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that imports what it needs."""
    head = "import ctypes, json, os, sys, threading\nfrom stella_shared import privileges, system_calls\n"
    head += "from stella_collector import system_calls as collector_calls\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    command = [sys.executable, "-c", head + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **kwargs)


def outcome(program: list[tuple[int, int, int, int]], number: int, *, arch: int, argument: int = 0) -> int:
    """Interpret the filter as the kernel does (linux/filter.h), for the few instructions that it is made of."""
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        match code:
            case 0x20:
                accumulator = {0: number, 4: arch, 16: argument}[value]
            case 0x06:
                return value
            case _:
                holds = {
                    0x15: accumulator == value,
                    0x25: accumulator > value,
                    0x35: accumulator >= value,
                    0x45: bool(accumulator & value),
                }[code]
                at += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_call_gets_what_its_list_says(machine: str) -> None:
    """Every number there is: allowed exactly when listed, refused exactly when listed, unknown beyond the last."""
    arch, numbers = ARCHITECTURES[machine], NUMBERS[machine]
    allowed = {numbers[name] for name in collector_calls.ALLOWED if name in numbers} | {numbers["clone"]}
    refused = {numbers[name] for name in system_calls.REFUSED if name in numbers}
    only = system_call_filter.allowing(collector_calls.ALLOWED, machine=machine)
    others = system_call_filter.refusing(system_calls.REFUSED, machine=machine, can_answer=False)
    for number in range(LAST + 1):
        if number != numbers["clone3"]:
            assert outcome(only, number, arch=arch) == (ALLOW if number in allowed else TRAP), number
            assert outcome(others, number, arch=arch) == (EPERM if number in refused else ALLOW), number
    for program in (only, others):
        for number in (numbers["clone3"], LAST + 1, 0x40000000, 2**32 - 1):
            assert ENOSYS == outcome(program, number, arch=arch)
        assert KILL == outcome(program, numbers["read"], arch=0x40000003)
        for flag in (0x20000, 0x10000000, 0x40000000):
            assert outcome(program, numbers["clone"], arch=arch, argument=flag) in (TRAP, EPERM)


def test_the_numbers_are_those_of_the_kernels_headers() -> None:
    """Each name's number on both machines, as the C preprocessor reads it out of the installed headers."""
    generic = "\n".join(
        f"#define {name}"
        for name in (
            "__ARCH_WANT_RENAMEAT", "__ARCH_WANT_NEW_STAT", "__ARCH_WANT_SET_GET_RLIMIT", "__ARCH_WANT_SYS_CLONE3",
            "__ARCH_WANT_MEMFD_SECRET",
        )
    )  # fmt: skip
    sources = {
        "x86_64": "#include <asm/unistd_64.h>\n",
        "aarch64": f"{generic}\n#include <asm/bitsperlong.h>\n#include <asm-generic/unistd.h>\n",
    }
    for machine, source in sources.items():
        macros = subprocess.run(
            ["cc", "-E", "-dM", "-"], input=source, capture_output=True, text=True, check=True
        ).stdout
        found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)$", macros, re.MULTILINE))
        found = {name: int(number) for name, number in found.items()}
        if machine == "aarch64":
            found["newfstatat"] = found.pop("fstatat")
        for name, number in NUMBERS[machine].items():
            assert number == found[name], (machine, name)
        assert not [name for name in found if name not in NUMBERS[machine] and name in NUMBERS["x86_64"]]


def test_a_forbidden_call_is_refused_told_once_and_counted() -> None:
    """ptrace returns EPERM in every thread, the log names it once, and the heartbeat says how often."""
    done = tried(
        "start = threading.Barrier(2)\n"
        "def call(): print(libc.ptrace(0, 0, 0, 0), ctypes.get_errno())\n"
        "def later(): start.wait(); start.wait(); call()\n"
        "thread = threading.Thread(target=later); thread.start(); start.wait()\n"
        "privileges.allow_only(collector_calls.ALLOWED, switched_on=True)\n"
        "start.wait(); thread.join(); call(); call()\n"
        "print(json.dumps(privileges.left()))\n"
    )
    assert 0 == done.returncode, done.stderr
    *calls, left = done.stdout.splitlines()
    assert [f"-1 {errno.EPERM}"] * 3 == calls
    assert {"ptrace": 3} == json.loads(left)["refused_calls"]
    number = NUMBERS[platform.machine()]["ptrace"]
    assert f"Error: the system call filter refuses ptrace, number {number} (signals.syscall_filter)\n" == done.stderr


@pytest.mark.parametrize("call", ["bpf", "userfaultfd", "mount", "io_uring_setup", "unshare", "setns", "keyctl"])
def test_parts_without_privileges_cannot_call(call: str) -> None:
    """What only somebody who has taken a part over would call."""
    number = NUMBERS[platform.machine()][call]
    done = tried(
        "privileges.refuse(system_calls.REFUSED, switched_on=True)\n"
        f"print(libc.syscall({number}, 0, 0, 0, 0, 0), ctypes.get_errno())"
    )
    assert (f"-1 {errno.EPERM}\n", 0) == (done.stdout, done.returncode)


def test_a_new_namespace_is_refused_and_threads_and_children_go_on() -> None:
    """`clone` is allowed without namespaces; `clone3` is said not to exist, and the C library takes the other way."""
    done = tried(
        "privileges.allow_only(collector_calls.ALLOWED, switched_on=True)\n"
        "import subprocess\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "print(subprocess.run(['/bin/echo', 'child'], capture_output=True, text=True).stdout, end='')\n"
        f"print(libc.syscall({NUMBERS[platform.machine()]['clone']}, 0x10000000 | 17, 0, 0, 0, 0), ctypes.get_errno())"
    )
    assert f"thread\nchild\n-1 {errno.EPERM}\n" == done.stdout, done.stderr


def test_switched_off_is_said() -> None:
    """`signals.syscall_filter: false` filters nothing, warns, and shows in the heartbeat."""
    done = tried(
        "privileges.refuse(system_calls.REFUSED, switched_on=False)\n"
        "print(privileges.left()['system_calls']); print(open('/proc/self/status').read())"
    )
    assert done.stdout.startswith("unfiltered: signals.syscall_filter is false\n")
    assert "Seccomp:\t0" in done.stdout
    assert "not filtered" in done.stderr


def test_capabilities_are_given_up_in_every_thread() -> None:
    """Those of threads that run already, and of those that come; also from the bounding set, for good."""
    done = tried(
        "stop = threading.Event()\n"
        "threads = [threading.Thread(target=stop.wait) for _ in range(20)]\n"
        "[thread.start() for thread in threads]\n"
        "privileges.keep({'SYS_PTRACE', 'BPF'})\n"
        "threads.append(threading.Thread(target=stop.wait)); threads[-1].start()\n"
        "print(json.dumps([open(f'/proc/self/task/{task}/status').read() for task in os.listdir('/proc/self/task')]))\n"
        "stop.set()"
    )
    assert 0 == done.returncode, done.stderr
    tasks = json.loads(done.stdout)
    assert 22 == len(tasks)
    for text in tasks:
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert f"{kind}:\t0000008000080000" in text
        for kind in ("CapInh", "CapAmb"):
            assert f"{kind}:\t0000000000000000" in text


def test_containers_get_the_same_list() -> None:
    """`deploy/seccomp/collector.json` allows what the built-in filter allows, and what starts a container."""
    profile = json.loads((ROOT / "deploy" / "seccomp" / "collector.json").read_text())
    assert profile == system_call_filter.container_profile(collector_calls.ALLOWED, collector_calls.STARTING)
    plain, clone, clone3 = profile["syscalls"]
    assert collector_calls.ALLOWED | collector_calls.STARTING == set(plain["names"])
    assert ["clone"] == clone["names"] and system_call_filter.NAMESPACES == clone["args"][0]["value"]
    assert errno.ENOSYS == clone3["errnoRet"]
    assert not {"ptrace", "mount", "setns", "unshare", "init_module"} & set(plain["names"])
