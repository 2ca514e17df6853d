"""Kernel and user space mean the same bytes: Python's formats against the built object and the header."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stella_collector import accounting, filtering, reading, ring
from stella_collector.binaries import attaching, notices, question
from stella_collector.kernel import _FUNCTION_PROGRAMS, _NOTICE_PROGRAMS, OBJECT, URING
from stella_collector.probes import probes_of
from stella_shared import kernel_records, raw_batches, wire
from stella_shared.config import Probes, Signals

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "bpf" / "include" / "stella_record.h"
RING = ROOT / "services" / "collector" / "stella_collector" / "ring.c"

#: Each struct of the header: the Python format that decodes it, and its fields in order.
LAYOUTS: dict[str, tuple[str, str]] = {
    "stella_header": (
        kernel_records.RECORD_HEADER.format,
        "ts_ns seq cgroup_id start_ns program tgid tid uid lane type call size comm",
    ),
    "stella_file_open": (
        kernel_records.FILE_OPEN_BODY.format,
        "result flags resolve inode mode dfd device path_len walked_len path_status walked walked_flags frames "
        "lpm_prefixlen",
    ),
    "stella_process_exec": (
        f"{kernel_records.PROCESS_EXEC_BODY.format}{kernel_records.ANCESTORS_MAX * kernel_records.ANCESTOR.size}s",
        "inode device argv_total filename_len interpreter_len argv_len directory_len filename_status argv_status "
        "directory_flags ancestors_count frames ancestors",
    ),
    "stella_ancestor": (kernel_records.ANCESTOR.format, "start_ns pid reserved comm"),
    "stella_program": (
        f"{reading.PROGRAM_HEAD.format}{reading.WALK_ROOM}s",
        "inode device path_at flags ready path",
    ),
    "stella_cgroup": (f"{reading.CGROUP_HEAD.format}{reading.WALK_ROOM}s", "path_at flags ready reserved path"),
    "stella_tcp_state": (
        kernel_records.TCP_STATE_BODY.format,
        "family sport dport old_state new_state saddr daddr attribution reserved",
    ),
    "stella_net_connect": (
        kernel_records.NET_CONNECT_BODY.format,
        "result fd family port local_port path_len address_status abstract frames reserved address local_address",
    ),
    "stella_frame": (kernel_records.STACK_FRAME.format, "status build_id offset"),
    "stella_ssl_op": (kernel_records.SSL_OP_BODY.format, "result bytes library reserved"),
    "stella_function_call": (
        kernel_records.FUNCTION_CALL_BODY.format,
        "offset count first_ns last_ns library symbol_len build_id_len frames build_id symbol_total",
    ),
    "stella_function": (
        attaching.ROW.format,
        "offset library symbol_len build_id_len flags build_id symbol_total symbol",
    ),
    "stella_file_id": (notices.FILE.format, "inode changed_ns device generation"),
    "stella_mapped": ("<QII", "inode device found"),
    "stella_flush": ("<QQ", "written left"),
    "stella_throttle": (kernel_records.THROTTLE_BODY.format, "since_ns until_ns dropped limit_per_second scope stop"),
    "stella_lane": (
        "<7Q9Q",
        "taken lost_ring_full lost_rate_limit lost_inflight filtered_target filtered_path filtered_network",
    ),
    # kernel.py packs this one into .rodata, and the next one into .bss.
    "stella_config": (
        filtering.CONFIG.format,
        "scoped path_allow path_deny network_allow network_deny kernel_paths max_events_per_window "
        "max_cgroup_events_per_window v1_hierarchy stacks",
    ),
    "stella_scope": ("<QQ", "cgroup_levels namespaces"),
}


#: Functions that programs call, and no programs.
SHARED = {"stella_walk", "stella_walk_cgroup", "stella_program_of", "stella_know_cgroup"}


def offsets(layout: str, names: str) -> dict[str, int]:
    """Return where a struct format puts each of its fields."""
    tokens = [
        token
        for count, letter in re.findall(r"(\d*)([a-zA-Z])", layout)
        for token in ([count + letter] if letter == "s" else [letter] * int(count or 1))
    ]
    at = {}
    for i, name in enumerate(names.split()):
        at[name] = struct.calcsize("<" + "".join(tokens[:i]))
    return at


@pytest.fixture(scope="module")
def btf() -> list[dict[str, Any]]:
    """The types that the built object carries."""
    bpftool = shutil.which("bpftool") or shutil.which("bpftool", path="/usr/sbin:/sbin")
    if bpftool is None:
        pytest.skip("bpftool is not installed")
    done = subprocess.run(
        [bpftool, "btf", "dump", "file", str(OBJECT), "format", "raw", "-j"], check=True, capture_output=True
    )
    return list(json.loads(done.stdout)["types"])


#: A notice is the time, the file, then who and how.
NOTICE = ("<Q24sIIHB", "ts_ns file tgid kind path_at flags")

#: tcp_state, ssl_op and function_call records are put together on the stack or in the ring, so the object's type
#: information has no need of them.
IN_BTF = sorted(set(LAYOUTS) - {"stella_tcp_state", "stella_ssl_op", "stella_function_call", "stella_throttle"})


@pytest.mark.parametrize("name", IN_BTF)
def test_formats_are_those_of_the_built_object(btf: list[dict[str, Any]], name: str) -> None:
    """Every field stands where the object's BTF says, and the sizes agree."""
    layout, fields = LAYOUTS[name]
    (found,) = [t for t in btf if t["kind"] == "STRUCT" and t["name"] == name]
    members = {m["name"]: m["bits_offset"] // 8 for m in found["members"]}
    if name == "stella_lane":
        assert struct.calcsize("<7Q") == members.pop("reserved")
    assert members == offsets(layout, fields)
    assert found["size"] == struct.calcsize(layout)


def test_records_are_laid_out_as_header_body_text(btf: list[dict[str, Any]]) -> None:
    """In the whole records, body and text follow the header without a gap; frames stand behind a fixed path."""
    members = {
        t["name"]: {m["name"]: m["bits_offset"] // 8 for m in t["members"]}
        for t in btf
        if t["kind"] == "STRUCT" and t["name"] in ("open_record", "exec_record", "net_record")
    }
    head = kernel_records.RECORD_HEADER.size
    exec_size = kernel_records.PROCESS_EXEC_BODY.size + kernel_records.ANCESTORS_MAX * kernel_records.ANCESTOR.size
    assert {"h": 0, "b": head, "path": head + kernel_records.FILE_OPEN_BODY.size} == members["open_record"]
    assert {"h": 0, "b": head, "data": head + exec_size} == members["exec_record"]
    assert {"h": 0, "b": head, "path": head + kernel_records.NET_CONNECT_BODY.size} == members["net_record"]
    (net,) = [t for t in btf if t["name"] == "net_record"]
    assert head + kernel_records.NET_CONNECT_BODY.size + kernel_records.NET_PATH_BYTES == net["size"]


def test_a_trie_reads_the_path_where_the_record_holds_it() -> None:
    """The prefix length stands right before the path: together they are the key of the prefix tries."""
    layout, fields = LAYOUTS["stella_file_open"]
    assert offsets(layout, fields)["lpm_prefixlen"] + 4 == struct.calcsize(layout)


def test_programs_can_be_found_by_their_names(btf: list[dict[str, Any]]) -> None:
    """Every program's name begins with stella_, and the probes use exactly the programs there are."""
    names = {t["name"] for t in btf if t["kind"] == "FUNC" and t.get("linkage") == "global"} - SHARED
    assert names
    assert all(name.startswith("stella_") for name in names), names
    wanted = {
        program
        for source in ("syscall", "uprobe")
        for probe, _ in probes_of(Signals(probes=Probes(libc_source=source, stacks=["process_exec"])))
        for program in probe.programs()
    }
    # What no single probe owns: attached to the files of all of them.
    assert (
        wanted | {"stella_mkdir", "stella_limits"} | set(_NOTICE_PROGRAMS) | set(_FUNCTION_PROGRAMS) | set(URING)
        == names
    )


def enum_values(name: str) -> dict[str, int]:
    """Return the members of one enum of the header."""
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER.read_text(), re.S)
    assert body, name
    return {key: int(value) for key, value in re.findall(r"(STELLA_\w+) = (\d+)", body[1])}


def test_enums_agree() -> None:
    """Record types, calls, lane kinds, statuses and attributions have the same numbers on both sides."""
    types = enum_values("stella_record_type")
    assert {name.removeprefix("STELLA_").lower(): n for name, n in types.items()} == {
        name: n for n, name in kernel_records.TYPE_NAMES.items()
    }
    calls = enum_values("stella_call")
    assert list(range(len(kernel_records.CALL_SOURCES))) == sorted(calls.values())
    spelled = [
        source.replace("sys_enter_", "").replace("uprobe:SSL", "ssl").replace("uprobe:", "u_")
        .replace("u_function_entry", "function")
        .replace("sched_process_", "").replace("inet_sock_", "").lower()
        for source in kernel_records.CALL_SOURCES
    ]  # fmt: skip
    assert spelled == [name.removeprefix("STELLA_CALL_").lower() for name in sorted(calls, key=calls.__getitem__)]
    kinds = enum_values("stella_lane_kind")
    assert {f"STELLA_LANE_{name.upper()}": i for i, name in enumerate(wire.LANE_KIND_NAMES)} == kinds
    assert kinds["STELLA_LANE_UPROBE"] == accounting.UPROBE_KIND
    assert [0, 1, 2, 3] == [
        kernel_records._STATUS_OK,
        kernel_records._STATUS_TRUNCATED,
        kernel_records._STATUS_FAULT,
        kernel_records._STATUS_ABSENT,
    ]
    assert {"STELLA_OK": 0, "STELLA_TRUNCATED": 1, "STELLA_FAULT": 2, "STELLA_ABSENT": 3} == enum_values(
        "stella_status"
    )
    assert {"STELLA_ATTR_NONE": 0, "STELLA_ATTR_CURRENT": 1, "STELLA_ATTR_OWNER": 2} == enum_values(
        "stella_attribution"
    )
    assert ("none", "current", "socket_owner") == kernel_records._ATTRIBUTIONS


def test_the_compiler_agrees_with_every_format(tmp_path: Path) -> None:
    """The header as the compiler lays it out, and ring.c's own copy of the record head, match Python's formats."""
    checks = []
    for constant, number in (
        ("STELLA_SYMBOL_MAX", question.SYMBOL_BYTES), ("STELLA_FUNCTION_STACK", attaching._WITH_STACK),
        ("STELLA_SEEN_EACH", notices._SEEN_EACH[0]), ("STELLA_NOTICE_EXEC", notices.EXEC),
        ("sizeof(struct stella_notice)", notices.NOTICE.size + notices.WALK_ROOM),
        ("offsetof(struct stella_notice, path)", notices.NOTICE.size), ("STELLA_WALK_MAX", notices.WALK_MAX),
        ("sizeof(struct stella_mapped_question)", 8),
    ):  # fmt: skip
        checks.append(f'_Static_assert({constant} == {number}, "{constant}");')
    for field, at in offsets(*NOTICE).items():
        checks.append(f'_Static_assert(offsetof(struct stella_notice, {field}) == {at}, "notice.{field}");')
    for name, (layout, fields) in LAYOUTS.items():
        checks.append(f'_Static_assert(sizeof(struct {name}) == {struct.calcsize(layout)}, "{name}");')
        for field, at in offsets(layout, fields).items():
            checks.append(f'_Static_assert(offsetof(struct {name}, {field}) == {at}, "{name}.{field}");')
    for field in (
        "ts_ns",
        "seq",
        "cgroup_id",
        "start_ns",
        "program",
        "tgid",
        "tid",
        "uid",
        "lane",
        "type",
        "call",
        "size",
    ):
        checks.append(
            f"_Static_assert(offsetof(struct header, {field}) == offsetof(struct stella_header, {field}) && "
            f'sizeof(((struct header *)0)->{field}) == sizeof(((struct stella_header *)0)->{field}), "ring.c {field}");'
        )
    checks.append(f'_Static_assert(LANE_KINDS == STELLA_LANE_KINDS && LANE_KINDS == {wire.LANE_KINDS}, "kinds");')
    checks.append('_Static_assert(LANE_UPROBE == STELLA_LANE_UPROBE, "uprobe lane");')
    result = ctypes.sizeof(ring._Result)
    checks.append(f'_Static_assert(sizeof(struct lane) == 32 && sizeof(struct drained) == {result}, "ring.py");')
    for i, (field, _) in enumerate(ring._Result._fields_):
        checks.append(f'_Static_assert(offsetof(struct drained, {field}) == {8 * i}, "drained.{field}");')
    checks.append(f'_Static_assert(sizeof(struct who) == {raw_batches.WHO.size}, "who");')
    checks.append(f'_Static_assert(sizeof(struct event) == {raw_batches.EVENT.size}, "event");')
    checks.append(f'_Static_assert(sizeof(struct stella_lane) == {accounting.LANE_STRIDE}, "stride");')
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <linux/types.h>\n#include "{HEADER}"\n#include "{RING}"\n' + "\n".join(checks)
    )
    done = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr


def test_the_counters_are_read_in_their_order() -> None:
    """Causes and filters are named in the order in which the kernel counts them."""
    _, fields = LAYOUTS["stella_lane"]
    assert fields.split() == [
        "taken",
        *(f"lost_{cause}" for cause in accounting.NUMBERED_CAUSES),
        *(cause.replace("kernel_", "filtered_") for cause in accounting.KERNEL_FILTERS),
    ]
    row = struct.pack("<16Q", *range(16))
    assert [accounting.LaneCounters(0, (1, 2, 3), (4, 5, 6))] * 2 == accounting.decode_counters(row * 2)
