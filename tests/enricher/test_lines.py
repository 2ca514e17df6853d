"""Lines are built fast; here they are held to the slow and obvious way: decode, EvidenceLine, sort."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable

import jsonschema
import msgspec
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_enricher.containers import HOST, Container, unknown
from stella_enricher.lines import FRAGMENTS_MAX, CLines, Enriched, Lines, PythonLines, all_lost
from stella_enricher.redaction import Redactor
from stella_enricher.runtimes.facts import Pod
from stella_shared import events, kernel_records, raw_batches
from stella_shared.errors import BrokenPromise
from stella_shared.evidence.compressed import unpack
from stella_shared.patterns import PathFilter
from stella_shared.wire import FORGOTTEN_PROGRAM, LaneRow, Ledger, Program, RawBatch, ledger_faults
from tests.enricher.record_maker import ANYTHING, COMMS, EXECS, U32, U64, batch, file_open, process_exec, record

ID = "docker://" + "a1" * 32
DIGEST = "sha256:" + "c0" * 32
#: By cgroup id: every kind of container there is.
CONTAINERS = {
    1: HOST,
    2: Container(ID, id_basis="name", image_digest=DIGEST, image_digest_kind="config", image_name="nginx"),
    3: Container("containerd://" + "b2" * 32, image_digest=DIGEST, image_digest_kind="manifest"),
    4: Container("podman://" + "b2" * 32, image_reason="no_runtime_socket"),
    5: Container("cri-o://" + "b2" * 32, image_digest=DIGEST),
    6: unknown(6, "gone"),
    7: Container(ID, image_reason="pending"),
    8: Container(
        "containerd://" + "b2" * 32,
        image_digest=DIGEST,
        image_digest_kind="config",
        image_name='registry.test/"web":1',
        image_repo_digests=(f"a@{DIGEST}", f"b@{DIGEST}"),
        labels=(("a.b", "1"), ("app", "naïve\n")),
        pod=Pod("team-a", "web-0", "web"),
    ),
    9: Container("cri-o://" + "b2" * 32, image_reason="pod_sandbox", pod=Pod("team-a", "web-0")),
}
ALL = PathFilter([], [])
MAKERS = [CLines, PythonLines]
both = pytest.mark.parametrize("make", MAKERS)
NODES = st.one_of(
    st.sampled_from(["n", 'weiß "n"\\', "\u2028"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
validator = jsonschema.Draft202012Validator(events.json_schema())


def container_of(cgroup: int) -> Container:
    """Return the container of a cgroup, unknown when it is none of ours."""
    return CONTAINERS.get(cgroup) or unknown(cgroup, "not_found")


#: By key: every kind of program there is; 0 names none.
PROGRAMS = {
    1: Program("", reason="kernel_thread"),
    77: Program("/usr/bin/cat", "8:1", 12, "ab" * 20),
    78: Program('/tmp/\\xff "x"', "0:5", 2**64 - 1, "", "no_build_id"),
    79: Program("memfd:x", "0:1", 1, "cd" * 20, "in_no_directory"),
}


def slow_line(batch: RawBatch, r: raw_batches.Record, event: events.Event, container: Container) -> bytes:
    """Return a record's line, made the obvious way."""
    nobody = isinstance(event, events.Throttle) or (isinstance(event, events.TcpState) and event.attribution == "none")
    stranger = container.container_id.startswith("unknown:")
    program = batch.programs.get(r.program, FORGOTTEN_PROGRAM) if r.program else Program("")
    return events.encode_line(
        events.EvidenceLine(
            boot_id=batch.boot_id,
            cgroup_id=r.cgroup_id,
            event=event,
            lane=r.lane,
            node=batch.node,
            run=batch.run,
            seq=r.seq,
            src=kernel_records.CALL_SOURCES[r.call],
            ts_ns=r.ts_ns,
            comm=None if nobody else kernel_records.text(r.comm),
            container_id=container.container_id or None,
            container_reason=container.reason if stranger else None,
            exe=program.path or None,
            exe_build_id=program.build_id or None,
            exe_reason=program.reason or None,
            image_digest=container.image_digest or None,
            image_digest_kind=container.image_digest_kind or None,  # type: ignore[arg-type]
            image_name=container.image_name or None,
            image_reason=None if container.image_digest else container.image_reason or None,
            image_repo_digests=list(container.image_repo_digests) or None,
            pod=pod_of(container.pod),
            labels=dict(container.labels) or None,
            pid=None if nobody else r.tgid,
            start_ns=None if nobody else r.start_ns or None,
            tid=None if nobody else r.tid,
            uid=None if nobody else r.uid,
        )
    )


def pod_of(pod: Pod | None) -> events.Pod | None:
    """Return a pod as lines say it."""
    if pod is None:
        return None
    return events.Pod(namespace=pod.namespace, name=pod.name, container=pod.container or None)


def redacted(event: events.Event) -> events.Event:
    """Return an event without the secrets in its arguments."""
    if not isinstance(event, events.ProcessExec):
        return event
    cut = event.argv_truncated or event.argv_reason is not None
    argv = Redactor().redact(event.argv, event.filename, script=event.interpreter is not None, cut=cut)
    if not argv.changed:
        return event
    return msgspec.structs.replace(event, argv=argv.argv, argv_redacted=argv.changed, argv_bytes=None)


def slow(batch: RawBatch, paths: PathFilter, container_of: Callable[[int], Container]) -> dict[str, list[bytes]]:
    """Return every line of a batch by type, made the obvious way."""
    out: dict[str, list[bytes]] = {}
    for r in raw_batches.records(batch.records):
        event = redacted(kernel_records.decode_event(r.type, r.call, r.body, batch.libraries))
        if isinstance(event, events.FileOpen) and event.path is not None and not paths.decide(event.path):
            continue
        out.setdefault(kernel_records.TYPE_NAMES[r.type], []).append(
            slow_line(batch, r, event, container_of(r.cgroup_id))
        )
    return out


def of(enriched: Enriched) -> dict[str, list[bytes]]:
    """Return the lines of an enriched batch by type."""
    return {part.type: unpack(part.frame).splitlines(keepends=True) for part in enriched.parts}


LINES = st.tuples(
    ANYTHING, COMMS, U64, st.one_of(st.integers(1, 10), U64), st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1), U32,
    st.integers(0, 9), U64, st.one_of(st.sampled_from([0, 1, 77, 78, 79]), U64),
)  # fmt: skip


def batch_of(rows: list[tuple], **more: object) -> RawBatch:
    """Return a batch of drawn records, numbered in their lanes from a drawn start."""
    numbers: Counter[int] = Counter()
    data = b""
    for (kind, call, body), comm, ts, cgroup, tgid, tid, uid, lane, start_ns, program in rows:
        data += record(
            kind, call, body, seq=numbers[lane], lane=lane, comm=comm, ts=ts, cgroup=cgroup, tgid=tgid, tid=tid,
            uid=uid, start_ns=start_ns, program=program,
        )  # fmt: skip
        numbers[lane] += 1
    return batch(data, dict(numbers), programs=PROGRAMS, **more)  # type: ignore[arg-type]


@both
@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(LINES, max_size=12),
    node=NODES,
    libraries=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=3),
)
def test_fast_lines_are_the_slow_lines(make: type[Lines], rows: list[tuple], node: str, libraries: list[str]) -> None:
    """Byte for byte, for records of every type, every container, any name; a second build gives the same."""
    raw = batch_of(rows + rows, node=node, libraries=libraries)
    lines = make(ALL)
    expected = slow(raw, ALL, container_of)
    first = lines.build(raw, container_of)
    assert expected == of(first)
    assert expected == of(lines.build(raw, container_of))
    assert [part.type for part in first.parts] == sorted(expected, key=lambda name: events.EVENT_TYPES.index(name))
    assert all(part.lines == len(expected[part.type]) for part in first.parts)
    assert raw.ledger == first.ledger
    assert first.by_cgroup == Counter(json.loads(line)["cgroup_id"] for rows in expected.values() for line in rows)


def small(value: object) -> object:
    """Return a line's value with the integers that RFC 8785 cannot carry made small."""
    if isinstance(value, dict):
        return {key: small(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [small(inner) for inner in value]
    return value % 2**53 if isinstance(value, int) and not isinstance(value, bool) else value


@both
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(LINES, min_size=1, max_size=3), node=NODES)
def test_lines_are_canonical_and_valid(make: type[Lines], rows: list[tuple], node: str) -> None:
    """Each line validates against the published schema, decodes to what it was, and is what RFC 8785 prescribes."""
    enriched = make(ALL).build(batch_of(rows, node=node), container_of)
    for line in [line for part in enriched.parts for line in unpack(part.frame).split(b"\n")[:-1]]:
        value = json.loads(line)
        validator.validate(value)
        again = events.decode_line(line)
        assert line + b"\n" == events.encode_line(again)
        reduced = small(value)
        assert rfc8785.dumps(reduced) == msgspec.json.encode(reduced, order="sorted")
        if reduced == value:
            assert rfc8785.dumps(value) == line


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(EXECS, *[st.just(x) for x in (b"sh", 1, 1, 5, 6, 0, 1, 9, 77)]), min_size=1, max_size=6))
def test_both_builders_redact_alike_and_nothing_secret_is_left(rows: list[tuple]) -> None:
    """The same bytes from both; the secret is in none of them; a second batch counts its redactions again."""
    raw = batch_of(rows)
    first, second = CLines(ALL), PythonLines(ALL)
    assert of(first.build(raw, container_of)) == of(second.build(raw, container_of))
    assert first.redactor.counts == second.redactor.counts
    for line in [json.loads(line) for lines in of(second.build(raw, container_of)).values() for line in lines]:
        event = line["event"]
        for i, word in enumerate(event["argv"]):
            assert (i in event.get("argv_redacted", [])) == (word.count("***") > 0)
            if "hunter2" in word:
                # A word that nothing marks as a secret: `--token` does not stand before it, nor mysql before `-p`.
                assert word in ("hunter2", "-phunter2")
        assert ("argv_bytes" in event) == ("argv_redacted" not in event)


@both
def test_a_redacted_line_says_so(make: type[Lines]) -> None:
    """The indexes stand in the line in their canonical place; how long the secret was does not."""
    argv = b"mysql\0-uroot\0-phunter2\0--token\0abc\0db\0"
    raw = batch(record(2, 3, process_exec(b"/usr/bin/mysql", b"", argv, total=len(argv))), {0: 1})
    lines = make(ALL)
    (part,) = lines.build(raw, container_of).parts
    assert (
        b'"event":{"ancestors":[{"comm":"init","pid":1,"start_ns":2}],"argv":["mysql","-uroot","-p***","--token","***","db"],"argv_redacted":[2,4],'
        b'"device":"0:0","filename":"/usr/bin/mysql","inode":0,"ppid":1,"type":"process_exec"}' in unpack(part.frame)
    )
    validator.validate(json.loads(unpack(part.frame)))
    assert {"rule": 2, "pattern": 0, "failure": 0} == lines.redactor.counts
    off = unpack(make(ALL, Redactor(enabled=False)).build(raw, container_of).parts[0].frame)
    assert b'"-phunter2","--token","abc","db"],"argv_bytes":%d,"device"' % len(argv) in off


@both
def test_arguments_that_are_cut_off_are_redacted_to_the_end(make: type[Lines]) -> None:
    """Where the kernel cut the last argument, or could not read on, the beginning of a token is one too."""
    for status in (1, 2):
        body = process_exec(b"/bin/app", b"", b"app\0https://user:hunt", argv_status=status, total=9000)
        (part,) = make(ALL).build(batch(record(2, 3, body), {0: 1}), container_of).parts
        event = json.loads(unpack(part.frame))["event"]
        assert (["app", "https://user:***"], [1]) == (event["argv"], event["argv_redacted"])


@both
def test_big_integers_keep_their_digits(make: type[Lines]) -> None:
    """Times, flags and offsets beyond 2^53 are written exactly."""
    raw = batch(record(1, 2, file_open(b"/x", resolve=2**64 - 1), ts=2**63 + 1, cgroup=2**53 + 1, seq=0), {0: 1})
    (part,) = make(ALL).build(raw, container_of).parts
    assert b'"ts_ns":9223372036854775809,' in unpack(part.frame)
    assert b'"resolve":18446744073709551615' in unpack(part.frame)
    assert b'"cgroup_id":9007199254740993,' in unpack(part.frame)


@both
def test_no_name_breaks_a_line(make: type[Lines]) -> None:
    """Whatever a path holds, a batch of N records is N lines, and each says the path's own bytes."""
    names = [b"/a\nb", b"/a\r\nb", "/\u2028\u2029\x85".encode(), b'/"}\n{"', b"/\x1f\x7f", b"/\xff\n", b"\n"]
    data = b"".join(record(1, 1, file_open(name), seq=i) for i, name in enumerate(names))
    (part,) = make(ALL).build(batch(data, {0: len(names)}), container_of).parts
    lines = unpack(part.frame).split(b"\n")
    assert b"" == lines.pop()
    paths = [json.loads(line)["event"]["path"] for line in lines]
    assert [name.decode("utf-8", "backslashreplace") for name in names] == paths


@both
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(LINES, max_size=12),
    allow=st.sampled_from([[], ["/etc/**"], ["/tmp/**", "/etc/passwd"], ["/*/*.conf"]]),
    deny=st.sampled_from([[], ["/proc/**"], ["/etc/**"], ["/**/self/*"]]),
)
def test_filtered_opens_are_counted_and_leave_no_line(
    make: type[Lines], rows: list[tuple], allow: list[str], deny: list[str]
) -> None:
    """Opens that the lists refuse become `user_path`; the identity still holds, with the same numbers."""
    paths = PathFilter(allow, deny)
    raw = batch_of(rows + rows)
    lines = make(paths)
    enriched = lines.build(raw, container_of)
    expected = slow(raw, paths, container_of)
    assert expected == of(enriched)
    assert enriched.by_cgroup == Counter(json.loads(line)["cgroup_id"] for rows in expected.values() for line in rows)
    assert [] == ledger_faults(enriched.ledger)
    assert enriched.ledger.filtered.get("user_path", 0) == len(rows) * 2 - sum(map(len, expected.values()))
    assert [(r.lane, r.first, r.next) for r in raw.ledger.lanes] == [
        (r.lane, r.first, r.next) for r in enriched.ledger.lanes
    ]


@both
def test_a_container_that_becomes_known_shows_in_the_next_batch(make: type[Lines]) -> None:
    """What is kept by cgroup never outlives the container that was said for it."""
    lines = make(ALL)
    raw = batch(record(1, 1, file_open(b"/x"), cgroup=9), {0: 1})
    answers = iter([unknown(9, "pending"), CONTAINERS[7], CONTAINERS[2], CONTAINERS[2], HOST])
    for _ in range(5):
        answer = next(answers)
        assert slow(raw, ALL, lambda _: answer) == of(lines.build(raw, lambda _: answer))  # noqa: B023


@both
def test_kept_parts_follow_node_boot_run_and_libraries(make: type[Lines]) -> None:
    """The same record bytes in another batch carry that batch's names, not the former's."""
    lines = make(ALL)
    data = record(5, 13, kernel_records.SSL_OP_BODY.pack(1, 7, 0, 0))
    for changes in (
        {"libraries": ["/lib/a.so"]}, {"libraries": ["/lib/b.so"]}, {"libraries": []}, {"node": "other"},
        {"boot_id": "c" * 32}, {"run": "f" * 16}, {"libraries": ["/lib/a.so"]},
    ):  # fmt: skip
        raw = batch(data, {0: 1}, **changes)  # type: ignore[arg-type]
        assert slow(raw, ALL, container_of) == of(lines.build(raw, container_of))


@both
def test_more_distinct_events_than_are_kept(make: type[Lines]) -> None:
    """A flood of ever new paths stays correct beyond the table's size."""
    lines = make(ALL)
    count = 2048
    for start in range(0, FRAGMENTS_MAX + 3 * count, count):
        data = b"".join(record(1, 1, file_open(b"/%d" % (start + i)), seq=i) for i in range(count))
        (part,) = lines.build(batch(data, {0: count}), container_of).parts
        assert count == part.lines
        assert unpack(part.frame).startswith(b'{"boot_id"')
        assert b'"path":"/%d"' % (start + count - 1) in unpack(part.frame)


@both
def test_kept_parts_stay_within_their_share_of_memory(make: type[Lines]) -> None:
    """Large events and ever new places: both memories are within their bounds after each batch."""
    lines = make(ALL, cache_bytes=1 << 20)
    most = 0
    for start in range(0, 2000, 20):
        data = b"".join(
            record(1, 1, file_open(b"/%d" % (start + i) + b"x" * 3000), seq=i, cgroup=start + i) for i in range(20)
        )
        raw = batch(data, {0: 20})
        assert slow(raw, ALL, lambda _: CONTAINERS[2]) == of(lines.build(raw, lambda _: CONTAINERS[2]))
        for kept in lines.stats().values():
            assert kept["entries"] <= kept["max_entries"] and kept["bytes"] <= kept["max_bytes"], kept  # type: ignore[operator]
        most = max(most, int(str(lines.stats()["events"]["bytes"])))
    # It does keep something, and what it says it keeps is not less than the bytes themselves.
    assert most > 20 * 2 * 3000


@both
@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400), st.lists(LINES, min_size=1, max_size=3).map(lambda rows: batch_of(rows).records)
    ),
    cut=st.one_of(st.just(10**6), st.integers(0, 400)),
    flip=st.tuples(st.integers(0, 399), st.integers(0, 255)),
)
def test_bytes_that_are_no_records_are_a_broken_promise(
    make: type[Lines], data: bytes, cut: int, flip: tuple[int, int]
) -> None:
    """Arbitrary, cut and changed bytes give lines or `BrokenPromise`, never anything else."""
    broken = bytearray(data[: max(cut, 1)])
    if flip[0] < len(broken):
        broken[flip[0]] ^= flip[1]
    counted: Counter[int] = Counter()
    try:
        for r in raw_batches.records(bytes(broken)):
            counted[r.lane] += 1
    except BrokenPromise:
        pass
    try:
        enriched = make(ALL).build(batch(b"", dict(counted), packed=bytes(broken)), container_of)
    except BrokenPromise:
        return
    assert sum(counted.values()) == sum(part.lines for part in enriched.parts)


@both
def test_a_ledger_that_speaks_of_other_records_is_a_broken_promise(make: type[Lines]) -> None:
    """A batch must hold exactly what its ledger says was recorded."""
    data = record(1, 1, file_open(b"/x"))
    for lanes in ({}, {0: 2}, {1: 1}, {0: 1, 1: 1}):
        for paths in (ALL, PathFilter([], ["/**"])):
            with pytest.raises(BrokenPromise, match="ledger"):
                make(paths).build(batch(data, lanes), container_of)


@both
def test_a_call_of_another_type_is_a_broken_promise(make: type[Lines]) -> None:
    """An open that claims to come from SSL_read is no record; a type or call nobody knows is none either."""
    for kind, call in ((1, 11), (1, 3), (2, 0), (3, 5), (5, 0), (4, 4), (0, 0), (6, 0), (1, 15), (1, 65535)):
        with pytest.raises(BrokenPromise):
            make(ALL).build(batch(record(kind, call, file_open(b"/x" * 40)), {0: 1}), container_of)


def test_an_unusable_batch_is_lost_by_name() -> None:
    """`all_lost` moves what was recorded to `enricher`, keeps what was lost and filtered, and stays honest."""
    ledger = Ledger(1, 2, [LaneRow(0, 5, 15, 7, 1, 2), LaneRow(1, 0, 3, 3, 0, 0)], {"user_path": 1}, {"ring_full": 2})
    assert [] == ledger_faults(ledger)
    gone = all_lost(ledger)
    assert [] == ledger_faults(gone)
    assert {"ring_full": 2, "enricher": 10} == gone.lost
    quiet = Ledger(1, 2, [], {"kernel_path": 3}, {})
    assert quiet == all_lost(quiet)


@both
def test_building_is_linear_in_the_batch(make: type[Lines]) -> None:
    """A hostile batch of the largest size, all distinct and all escapes, is built well within a second."""
    path = b'\x01\xff"' * 1300
    data = b"".join(record(1, 1, file_open(path + b"%d" % i), seq=i) for i in range(64))
    begin = time.perf_counter()
    (part,) = make(ALL).build(batch(data, {0: 64}), container_of).parts
    assert time.perf_counter() - begin < 1.0
    assert 64 == part.lines
