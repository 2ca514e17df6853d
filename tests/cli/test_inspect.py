"""`stella signals inspect`: what was seen of an image, where it is proved, and what silence means."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from chain_kit import Site

from stella_cli.inspection import sightings
from stella_cli.inspection.sightings import Kind, Line, Place, Sightings
from stella_cli.inspection.subject import parse
from stella_cli.inspection.watch import spans
from stella_shared.errors import UsageError
from stella_shared.evidence import canonical
from stella_shared.evidence.compressed import frames_of, pack
from stella_shared.wire import Closing

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evidence"))

from chain_maker import BOOT, RUN, Source, one  # noqa: E402

SCHEMA = json.loads((ROOT / "docs" / "reference" / "inspection.schema.json").read_text())
IMAGE = "sha256:" + "1f" * 32
OTHER = "sha256:" + "1e" * 32
CONTAINER = "docker://" + "ab" * 32
PROBES = (
    "sys_enter_openat",
    "sched_process_exec",
    "inet_sock_set_state",
    "libc_connect",
    "libc_accept",
    "openssl_read",
    "openssl_write",
)
SYSCALL, EXEC, SOCK, UPROBE = range(4)


def coverage(*off: str, scope: str = "node", **more: Any) -> str:
    """Return a coverage document in which all probes but `off` are attached."""
    rows = [
        {"name": name, "attached": False, "attach_point": "x", "scope": "", "reason": "no libssl on this node"}
        if name in off
        else {"name": name, "attached": True, "attach_point": "x", "scope": scope if "ssl" in name else "node"}
        for name in PROBES
    ]
    filters = {"networks_allow": [], "networks_deny": [], "paths_allow": [], "paths_deny": ["/proc/**"]}
    return canonical.dumps({"probes": rows, "filters": filters, "targets": [], "libraries": [], **more}).decode()


def opened(path: str, result: int = 3) -> dict[str, Any]:
    return {"type": "file_open", "path": path, "access": "read", "result": result}


class Told(Source):
    """Batches whose lines are given: `say` (lane kind, event, who) in order."""

    def __init__(self, node: str = "node-a", run: str = RUN, since_ns: int = 1_000_000_000_000) -> None:
        super().__init__(node, run, BOOT, since_ns)
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}

    def say(self, *told: tuple[int, dict[str, Any], dict[str, Any]], **batch: Any) -> Any:
        counts: dict[int, int] = {}
        for lane, event, who in told:
            self.lines[lane, self.at.get(lane, 0) + counts.get(lane, 0)] = {"event": event, **who}
            counts[lane] = counts.get(lane, 0) + 1
        if batch.get("lost") or batch.get("filtered"):
            counts.setdefault(batch.pop("lane", SYSCALL), 0)
        return one(self.batch(counts, **batch))

    def line(self, node: str, lane: int, seq: int, run: str, boot: str) -> bytes:  # type: ignore[override]
        place = {"boot_id": boot, "lane": lane, "node": node, "run": run, "seq": seq, "ts_ns": self.now_ns + seq}
        return canonical.dumps({**self.lines[lane, seq], **place, "comm": "sh", "pid": 7}) + b"\n"


MINE = {"container_id": CONTAINER, "image_digest": IMAGE, "exe": "/bin/dash", "exe_build_id": "bb" * 20}
THEIRS = {"container_id": "docker://" + "cd" * 32, "image_digest": OTHER}


def site(folder: Path, *batches: Any, leave_open: bool = False) -> Site:
    """Return a node whose chunks hold one of `batches` each, signed."""
    made = Site(folder, chain=False)
    from chain_maker import Node

    made.node = Node(folder)
    store = made.node.open()
    for number, batch in enumerate(batches):
        store.commit(*batch)
        if not (leave_open and number == len(batches) - 1):
            store.close("size")
    store.release()
    return made


def asked(made: Site, *words: str, code: int = 0) -> dict[str, Any]:
    """Return the JSON answer."""
    done = made.stella("inspect", *words, "--format", "json")
    assert code == done.returncode, done.stdout + done.stderr
    answer = dict(json.loads(done.stdout))
    jsonschema.validate(answer, SCHEMA)
    return answer


def kind(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return next(k for k in answer["kinds"] if k["kind"] == name)


def doubts(answer: dict[str, Any], name: str) -> set[str]:
    return {doubt["code"] for doubt in kind(answer, name)["complete"]["doubts"]}


def everything(folder: Path) -> Site:
    """A chain in which one image did something of every kind, beside another image."""
    told = Told()
    first = told.say(
        (SYSCALL, opened("/etc/passwd"), MINE),
        (SYSCALL, opened("/etc/passwd"), MINE),
        (SYSCALL, {**opened("/etc/shadow", -13), "stack": [{"symbol": "peek", "build_id": "aa", "offset": 1}]}, MINE),
        (SYSCALL, opened("/etc/theirs"), THEIRS),
        (EXEC, {"type": "process_exec", "filename": "/bin/sh", "argv": ["sh"], "ppid": 1, "start_ns": 1}, MINE),
        coverage=coverage(),
    )
    second = told.say(
        (
            SYSCALL,
            {
                "type": "net_connect",
                "direction": "connect",
                "family": "ipv4",
                "address": "10.1.2.3",
                "port": 443,
                "result": -115,
                "stack": [{"symbol": "dial", "build_id": "aa", "offset": 16}],
            },
            MINE,
        ),
        (UPROBE, {"type": "ssl_op", "direction": "write", "library": "/lib/libssl.so.3", "bytes": 70}, MINE),
        (UPROBE, {"type": "ssl_op", "direction": "write", "library": "/lib/libssl.so.3", "bytes": 30}, MINE),
        (SYSCALL, opened("/etc/passwd"), MINE),
    )
    return site(folder, first, second, told.say(final=True))


def test_what_was_seen_is_grouped_counted_and_can_be_proved(tmp_path: Path) -> None:
    """Files with their result, programs, connections, functions, TLS; the place of a row proves a line of it."""
    made = everything(tmp_path)
    answer = asked(made, IMAGE)
    assert 8 == answer["seen"]["events"]
    parts = answer["seen"]["chunks"]
    assert [(2, 4, "VALID_PENDING"), (3, 4, "VALID_PENDING")] == [(p["chunk"], p["events"], p["status"]) for p in parts]
    assert parts[0]["start"] < parts[0]["end"] <= parts[1]["start"]
    assert [CONTAINER] == [row["thing"]["container_id"] for row in answer["seen"]["containers"]]
    files = [(r["thing"]["path"], r["thing"]["result"], r["events"]) for r in kind(answer, "files")["rows"]]
    assert [("/etc/passwd", "ok", 3), ("/etc/shadow", "EACCES", 1)] == files
    programs = [(r["events"], r["thing"]) for r in kind(answer, "programs")["rows"]]
    dash = {"program": "/bin/dash", "build_id": "bb" * 20}
    assert [(7, dash | {"seen_as": "acted"}), (1, dash | {"asked_for": "/bin/sh", "seen_as": "started"})] == programs
    connection = kind(answer, "connections")["rows"][0]["thing"]
    assert ("10.1.2.3", "443", "in progress") == (connection["address"], connection["port"], connection["result"])
    functions = [(r["thing"]["function"], r["thing"]["seen_as"]) for r in kind(answer, "functions")["rows"]]
    assert [("dial", "in a stack"), ("peek", "in a stack")] == functions
    tls = kind(answer, "tls")["rows"][0]
    assert (2, 100) == (tls["events"], tls["bytes"])
    row = kind(answer, "files")["rows"][0]
    for place in (row["first"], row["last"]):
        line = json.loads(json.loads(made.good("prove", place["proof"]))["line"])
        assert (IMAGE, "/etc/passwd") == (line["image_digest"], line["event"]["path"])
    assert row["first"]["ts_ns"] < row["last"]["ts_ns"]
    assert row["first"]["at"].endswith("Z")


def test_the_table_says_the_same_for_people(tmp_path: Path) -> None:
    """Counts, times, places, the scope, and for each kind whether that is all of it."""
    said = everything(tmp_path).good("inspect", IMAGE)
    assert f"Image {IMAGE}" == said.splitlines()[0]
    assert re.search(r"Seen +8 events, .* in chunks \d+ and \d+|Seen +8 events, .* in chunks \d+ to \d+", said)
    assert re.search(r"Scope +files of every path, not under /proc/\*\*", said)
    assert re.search(r"\b3 +/etc/passwd +read +ok ", said)
    assert "This is all of it, within the scope: " in said
    assert "stella signals prove" in said


def test_a_container_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    """With or without the runtime; another container's events are not in it."""
    made = everything(tmp_path)
    for name in ("abababab", CONTAINER, "docker://abababababab"):
        assert 8 == asked(made, name)["seen"]["events"]
    assert 1 == asked(made, "cdcdcdcd")["seen"]["events"]
    by_prefix = asked(made, "sha256:1f1f1f1f")
    assert (8, 1) == (by_prefix["seen"]["events"], len(by_prefix["seen"]["containers"]))


def test_absence_holds_where_everything_was_watched_and_nothing_lost(tmp_path: Path) -> None:
    """An image that was never there: each kind says that silence can be believed, and by which probes."""
    made = everything(tmp_path)
    never = "sha256:" + "00" * 32
    answer = asked(made, never)
    assert 0 == answer["seen"]["events"]
    assert None is answer["seen"]["first"]
    for name in ("files", "programs", "connections", "tls"):
        assert ("holds", []) == (kind(answer, name)["complete"]["verdict"], kind(answer, name)["complete"]["doubts"])
    assert "void" == kind(answer, "functions")["complete"]["verdict"]
    said = made.good("inspect", never)
    assert re.search(r"Seen +nothing", said)
    words = "You can believe it, within the scope: sys_enter_openat watched all the time, and nothing was lost."
    assert f"Files: none seen\n  {words}" in said


@pytest.mark.parametrize(
    ("told", "release", "doubted"),
    [
        ([], "6.18.0", set()),
        (["ring"], "6.18.0", set()),
        (["open", "ring"], "6.18.0", {"files"}),
        (["accept", "connect"], "6.18.0", {"connections"}),
        (["ring"], "6.1.0-13-amd64", {"files", "connections"}),
        (["unknown"], "6.18.0", {"files", "connections"}),
        ("nonsense", "6.18.0", set()),
    ],
)
def test_what_went_through_io_uring_limits_what_silence_means(
    tmp_path: Path, told: object, release: str, doubted: set[str]
) -> None:
    """Opens and connects through a ring leave no line: files and connections say so, where the coverage does."""
    told_by = Told()
    made = site(
        tmp_path,
        told_by.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=coverage(io_uring=told, kernel_release=release)),
        told_by.say(final=True),
    )
    answer = asked(made, IMAGE)
    assert doubted == {name for name in ("files", "programs", "connections") if "io_uring" in doubts(answer, name)}


def test_losses_are_named_where_they_touch_and_nowhere_else(tmp_path: Path) -> None:
    """Three opens were lost in one chunk: files and connections doubt it, programs do not; whole and in time."""
    told = Told()
    made = site(
        tmp_path,
        told.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=coverage()),
        told.say((SYSCALL, opened("/etc/b"), THEIRS), lost=3),
        told.say(final=True),
    )
    answer = asked(made, IMAGE)
    files = kind(answer, "files")["complete"]
    assert "limited" == files["verdict"]
    assert ["lost"] == [doubt["code"] for doubt in files["doubts"]]
    assert re.match(
        r"3 events of syscall probes were lost \(ring_full\) in chunk \d+ \(20", files["doubts"][0]["message"]
    )
    assert {"lost"} == doubts(answer, "connections")
    assert "holds" == kind(answer, "programs")["complete"]["verdict"]
    said = made.good("inspect", IMAGE)
    assert "Files: none seen\n  Believe it with these doubts:\n    - 3 events of syscall probes were lost" in said


def test_a_probe_that_never_attached_makes_silence_worthless(tmp_path: Path) -> None:
    """TLS was not watched: its silence says nothing, and why is told; files stay believable."""
    told = Told()
    off = coverage("openssl_read", "openssl_write")
    made = site(tmp_path, told.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=off), told.say(final=True))
    answer = asked(made, IMAGE)
    assert "void" == kind(answer, "tls")["complete"]["verdict"]
    assert "no libssl on this node" in kind(answer, "tls")["complete"]["doubts"][0]["message"]
    assert "holds" == kind(answer, "files")["complete"]["verdict"]
    assert "TLS: none seen\n  This says nothing:\n    - never attached: openssl_read (no libssl" in made.good(
        "inspect", IMAGE
    )


def test_a_probe_that_held_for_a_part_of_the_time_is_told_with_its_chunks(tmp_path: Path) -> None:
    """A coverage document that changes is in both chunks' ledgers: the doubt names where it was off."""
    told = Told()
    made = site(
        tmp_path,
        told.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=coverage("openssl_read")),
        told.say((SYSCALL, opened("/etc/b"), THEIRS), coverage=coverage(scope="process")),
        told.say(final=True),
    )
    found = {d["code"]: d for d in kind(asked(made, IMAGE), "tls")["complete"]["doubts"]}
    assert {"not_attached", "by_process"} == set(found)
    assert "openssl_read was not attached in chunk" in found["not_attached"]["message"]


def test_events_whose_image_is_unknown_may_be_its_own(tmp_path: Path) -> None:
    """Each reason is counted; for a container alone an unknown image is no doubt."""
    told = Told()
    gone = {"container_id": "unknown:77", "container_reason": "cgroup_gone"}
    bare = {"container_id": CONTAINER, "image_reason": "no_runtime_socket"}
    made = site(
        tmp_path,
        told.say(
            (SYSCALL, opened("/etc/a"), gone),
            (SYSCALL, opened('/etc/"image_reason":"no_runtime_socket"'), {}),
            (SYSCALL, opened("/etc/b"), bare),
            coverage=coverage(),
        ),
        told.say(final=True),
    )
    answer = asked(made, IMAGE)
    assert {"cgroup_gone": 1, "no_runtime_socket": 1} == answer["unnamed"]
    assert {"unnamed"} == doubts(answer, "files")
    by_container = asked(made, "cdcdcdcd")
    assert {"cgroup_gone": 1} == by_container["unnamed"]
    assert 1 == asked(made, "unknown:77")["seen"]["events"]


def test_first_events_of_a_container_are_the_images_though_it_was_not_known_yet(tmp_path: Path) -> None:
    """A container has one image: a line that names it speaks for those before; another image's are no doubt."""
    told = Told()
    early = {"container_id": CONTAINER, "image_reason": "pending"}
    theirs = {"container_id": THEIRS["container_id"], "image_reason": "pending"}
    never = {"container_id": "docker://" + "ef" * 32, "image_reason": "pending"}
    first = told.say(
        (SYSCALL, opened("/etc/early"), early),
        (SYSCALL, opened("/etc/theirs-early"), theirs),
        (SYSCALL, opened("/etc/whose"), never),
        coverage=coverage(),
    )
    second = told.say((SYSCALL, opened("/etc/late"), MINE), (SYSCALL, opened("/etc/theirs"), THEIRS))
    made = site(tmp_path, first, second, told.say(final=True))
    answer = asked(made, IMAGE)
    assert {"/etc/early", "/etc/late"} == {r["thing"]["path"] for r in kind(answer, "files")["rows"]}
    assert (2, 1) == (answer["seen"]["events"], answer["seen"]["by_container"])
    assert (
        "/etc/early"
        == json.loads(json.loads(made.good("prove", answer["seen"]["first"]["proof"]))["line"])["event"]["path"]
    )
    assert {"pending": 1} == answer["unnamed"]
    assert ["docker://" + "ef" * 32] == answer["unnamed_containers"]
    said = made.good("inspect", IMAGE)
    assert "1 event of these by their container: the image was not known yet" in said
    assert "could not be named (1 pending); of docker://efefefefefef" in said


def test_what_a_limit_of_its_own_cost_is_told(tmp_path: Path) -> None:
    """A throttle line of its container says how many events of it were dropped."""
    told = Told()
    throttle = {"type": "throttle", "scope": "cgroup", "limit_per_second": 10, "since_ns": 1}
    made = site(
        tmp_path,
        told.say(
            (SYSCALL, {**throttle, "state": "start"}, MINE),
            (SYSCALL, {**throttle, "state": "stop", "dropped": 41, "until_ns": 9}, MINE),
            coverage=coverage(),
            lost=41,
        ),
        told.say(final=True),
    )
    answer = asked(made, IMAGE)
    assert (2, 41, 0) == (answer["seen"]["events"], answer["seen"]["throttled"], answer["seen"]["unreadable"])
    assert "41 events more of it were dropped by the limit of each container" in made.good("inspect", IMAGE)


def test_where_no_process_used_tls_its_silence_is_limited_not_void(tmp_path: Path) -> None:
    """The collector looked for such processes all the time: what is open is the moment before it finds one."""
    told = Told()
    document = json.loads(coverage("openssl_read", "openssl_write"))
    for row in document["probes"]:
        if not row["attached"]:
            row["reason"] = "no target process uses a TLS library yet"
    made = site(
        tmp_path,
        told.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=canonical.dumps(document).decode()),
        told.say(final=True),
    )
    answer = asked(made, IMAGE)
    assert ("limited", {"by_process"}) == (kind(answer, "tls")["complete"]["verdict"], doubts(answer, "tls"))


def test_a_restart_and_an_unclean_end_are_doubts(tmp_path: Path) -> None:
    """Between two runs nobody watched; a run that ended badly lost what nobody knows."""
    told, again = Told(), Told(run="fedcba9876543210", since_ns=1_100_000_000_000)
    closing = Closing(RUN, BOOT, {}, {}, "the machine was restarted")
    made = site(
        tmp_path,
        told.say((SYSCALL, opened("/etc/a"), THEIRS), coverage=coverage()),
        again.say((SYSCALL, opened("/etc/b"), THEIRS), coverage=coverage(), closings=[closing]),
        again.say(final=True),
    )
    found = doubts(asked(made, IMAGE), "files")
    assert {"restarted", "silence"} <= found


def test_damaged_evidence_answers_but_vouches_for_nothing(tmp_path: Path) -> None:
    """An edited line: exit code 1, the fault is named, and every kind is void."""
    made = everything(tmp_path)
    data = sorted(made.evidence.glob("*.ndjson.zst"))[-2]
    data.write_bytes(pack(b"".join(frames_of(data)).replace(b"/etc/passwd", b"/etc/passwe")))
    answer = asked(made, IMAGE, code=1)
    assert not answer["evidence"]["valid"]
    assert {"void"} == {k["complete"]["verdict"] for k in answer["kinds"]}
    assert "NOT VALID: chunk" in made.stella("inspect", IMAGE).stdout


def test_an_archive_answers_as_the_directory_does(tmp_path: Path) -> None:
    """An export, with the key that is trusted named by the state beside the node."""
    made = everything(tmp_path / "node")
    archive = tmp_path / "all.tar.gz"
    made.good("export", "--output", archive)
    here, there = asked(made, IMAGE), asked(made, IMAGE, "--evidence", str(archive))
    assert here["kinds"] == there["kinds"]
    assert here["seen"] == there["seen"]
    assert (str(archive), True) == (there["evidence"]["path"], there["evidence"]["valid"])


def test_lines_of_the_open_chunk_are_shown_and_said_to_be_unsigned(tmp_path: Path) -> None:
    """They are in no statement yet, so their place cannot be proved yet."""
    told = Told()
    made = site(
        tmp_path,
        told.say((SYSCALL, opened("/etc/a"), MINE), coverage=coverage()),
        told.say((SYSCALL, opened("/etc/b"), MINE)),
        leave_open=True,
    )
    answer = asked(made, IMAGE)
    assert 2 == answer["seen"]["events"]
    assert (True, False) == (answer["seen"]["first"]["signed"], answer["seen"]["last"]["signed"])
    assert answer["evidence"]["open_chunk"] == answer["seen"]["last"]["chunk"]


def test_an_image_is_found_by_name_pod_and_registry_digest_and_no_label_passes_for_it(tmp_path: Path) -> None:
    """Members of the line itself count; the same words as a label or in a path do not."""
    told = Told()
    manifest = "sha256:" + "77" * 32
    mine = {
        **MINE,
        "image_name": "registry.example/shop:1.2",
        "image_repo_digests": [f"registry.example/shop@{manifest}"],
        "pod": {"name": "shop-7d4f", "namespace": "shop"},
    }
    liar = {**THEIRS, "labels": {"image_digest": IMAGE, "name": "shop-7d4f", "image_name": "registry.example/shop:1.2"}}
    made = site(
        tmp_path,
        told.say(
            (SYSCALL, opened("/etc/a"), mine),
            (SYSCALL, opened("/etc/b"), liar),
            (SYSCALL, opened(f"/etc/x@{manifest}"), THEIRS),
            coverage=coverage(),
        ),
        told.say(final=True),
    )
    for asked_for in (IMAGE, manifest, "registry.example/shop", "shop-7d"):
        answer = asked(made, asked_for)
        assert [("/etc/a", 1)] == [(r["thing"]["path"], r["events"]) for r in kind(answer, "files")["rows"]], asked_for
    assert "shop-7d4f" == answer["seen"]["containers"][0]["thing"]["pod"]


def test_watched_functions_are_counted_and_their_silence_means_something(tmp_path: Path) -> None:
    """Calls are added up; files that could not be watched are named; without any, functions say nothing."""
    told = Told()
    binaries = [
        {"binary": "/srv/app", "mode": "count", "functions": 12, "build_id": "aa"},
        {"binary": "/srv/old", "mode": "trace", "functions": 0, "reason": "no symbols"},
    ]
    call = {"type": "function_call", "binary": "/srv/app", "build_id": "aa", "offset": 16, "symbol": "pay"}
    made = site(
        tmp_path,
        told.say(
            (UPROBE, {**call, "count": 40}, MINE),
            (UPROBE, {**call, "count": 2}, MINE),
            coverage=coverage(binaries=binaries),
        ),
        told.say(final=True),
    )
    answer = asked(made, IMAGE)
    row = kind(answer, "functions")["rows"][0]
    assert (2, 42, "pay") == (row["events"], row["calls"], row["thing"]["function"])
    complete = kind(answer, "functions")["complete"]
    assert "limited" == complete["verdict"]
    assert "/srv/old was not attached in chunk" in complete["doubts"][0]["message"]
    assert ["/srv/app (12)"] == answer["scope"]["functions"]


def test_what_names_nothing_is_refused(tmp_path: Path) -> None:
    """Exit code 2 with what would be right; no evidence is exit code 4."""
    made = Site(tmp_path, chain=False)
    assert 2 == made.stella("inspect", "sha256:12").returncode
    assert 4 == made.stella("inspect", IMAGE, "--evidence", tmp_path / "nowhere").returncode
    for text in ("", "sha256:xyz", "a b", "*", 'a"b'):
        with pytest.raises(UsageError):
            parse(text)


def test_rows_are_bounded_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """--top rows, then `and n more`; beyond what is told apart at all, events are counted only."""
    told = Told()
    many = [(SYSCALL, opened(f"/etc/{n:03d}"), MINE) for n in range(30)]
    made = site(tmp_path, told.say(*many, coverage=coverage()), told.say(final=True))
    answer = asked(made, IMAGE, "--top", "4")
    assert 4 == len(kind(answer, "files")["rows"])
    assert {"things": 26, "events": 26, "unnamed_events": 0} == kind(answer, "files")["more"]
    assert "and 26 more, 26 events (--top 30 lists them)" in made.good("inspect", IMAGE, "--top", "4")
    small = Kind(limit=2)
    for n in range(5):
        small.add((str(n % 3),), Place(1, n + 1, BOOT, n))
    assert (2, 1) == (len(small.things), small.unnamed_events)


def test_memory_does_not_grow_with_the_number_of_lines() -> None:
    """A million sightings of the same few things take no more than a thousand of them."""
    line = Line(BOOT, 1, opened("/etc/passwd"), CONTAINER, "", IMAGE)

    def peak(count: int) -> int:
        found = Sightings()
        tracemalloc.start()
        for n in range(count):
            found.add(line, Place(1, n, BOOT, n))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small = peak(1_000)
    assert peak(50_000) < small * 2


def test_a_text_that_looks_like_a_member_is_none(tmp_path: Path) -> None:
    """A path that holds `"image_digest":"sha256:…"` is escaped in its line, and is not taken for the image's."""
    told = Told()
    evil = opened(f'/tmp/"image_digest":"{IMAGE}"')
    made = site(tmp_path, told.say((SYSCALL, evil, THEIRS), coverage=coverage()), told.say(final=True))
    assert 0 == asked(made, IMAGE)["seen"]["events"]
    assert 1 == asked(made, OTHER)["seen"]["events"]


@pytest.mark.parametrize(
    "numbers, text",
    [([3], "chunk 3"), ([1, 2, 3, 7], "chunks 1 to 3 and 7"), ([1, 3, 5], "chunks 1, 3 and 5"), ([], "no chunk")],
)
def test_spans_read_well(numbers: list[int], text: str) -> None:
    """Ranges and an `and`."""
    assert text == spans(numbers)


def test_outcomes_are_named() -> None:
    """0 and descriptors are ok; an error has its name."""
    assert ["ok", "ok", "ENOENT", "in progress"] == [sightings.outcome(n) for n in (0, 7, -2, -115)]
