"""Verification: every fault has its name, every flipped byte is seen, hostile archives are refused."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from functools import partial
from hashlib import sha256
from pathlib import Path

import chain_maker
import msgspec
import pytest
from chain_maker import Node, Source, line, one, put_statement, resign, small_chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stella_shared.errors import BadAnswer, NotFound, StellaError, UsageError
from stella_shared.evidence import canonical, dsse, records, statement, verify
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.report import FAULT_CODES, ChainReport, encode_report, render_text
from stella_shared.evidence.verify import verify_chain
from stella_shared.wire import LaneRow


def codes(report: ChainReport) -> set[tuple[str, int | None]]:
    return {(fault.code, fault.chunk) for fault in report.faults}


def ledger_of(node: Node, index: int) -> Ledger:
    return canonical.loads(node.file(index, "ledger.json").read_bytes(), Ledger)


def remove(node: Node, index: int) -> None:
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        node.file(index, kind).unlink()


def test_an_honest_chain_is_valid(tmp_path: Path) -> None:
    """Signatures, links, sums and head agree, and the report says what is in the chain."""
    node = small_chain(tmp_path)
    report = node.verify()
    assert set() == codes(report)
    assert report.valid
    assert [chunk.status for chunk in report.chunks] == ["VALID_PENDING"] * 4
    assert (
        report.totals.produced, report.totals.recorded, report.totals.filtered, report.totals.lost
    ) == (21, 11, 9, 1)  # fmt: skip
    assert report.lost_by_cause == {"ring_full": 1}
    assert report.filtered_by_cause == {"kernel_path": 7, "user_path": 2}
    text = render_text(report, verbose=True)
    assert text.startswith("Chain Status: ✓ VALID\n")
    assert msgspec.json.decode(encode_report(report))["valid"] is True


def test_the_statement_says_what_the_collector_said(tmp_path: Path) -> None:
    """Monitor and host come from the coverage document, which stands whole in the ledger."""
    node = small_chain(tmp_path)
    payload = dsse.open_envelope(node.file(2, "dsse.json").read_bytes()).payload
    predicate = statement.decode(payload).predicate
    assert (
        predicate.monitor.collector_version, predicate.monitor.config_sha256, predicate.monitor.btf.source
    ) == ("0.1.0", "c" * 64, "kernel")  # fmt: skip
    assert [probe.attached for probe in predicate.monitor.probes] == [True, False]
    assert (
        predicate.host.node, predicate.host.kernel_release, predicate.host.arch
    ) == ("node-a", "6.8.0", "x86_64")  # fmt: skip
    assert chain_maker.COVERAGE.encode() == canonical.dumps(ledger_of(node, 2).coverage[0].document)
    assert len(payload) < 16 << 10


def test_no_statement_is_over_its_limit(tmp_path: Path) -> None:
    """Whatever the intake lets in: hostile names, reasons and coverage documents are cut to what fits."""
    node = small_chain(tmp_path)
    ledger = ledger_of(node, 4)
    worst = '\\"' * 500
    run = msgspec.structs.replace(ledger_of(node, 2).runs[0], run="r" * 64, boot_id="b" * 64, unclean=worst)
    boot = records.Boot("b" * 64, str(2**63), str(2**63))
    causes = {f"{i:048d}": 2**53 - 1 for i in range(40)}
    texts = dict.fromkeys(("collector_version", "config_sha256", "bpf_object_sha256", "kernel_release", "arch"), worst)
    document = {
        **texts,
        "btf": {"source": worst, "sha256": worst},
        "probes": [{"name": worst, "attached": False}] * 100,
    }
    resign(
        node,
        4,
        runs=[run] * 50,
        window=msgspec.structs.replace(ledger.window, boots=[boot] * 50),
        lost=causes,
        coverage=[records.Held("r", "0", document)],
    )
    assert len(dsse.open_envelope(node.file(4, "dsse.json").read_bytes()).payload) < 16 << 10


# -- one vector for each fault code ----------------------------------------------------------------------------


def _missing(node: Node) -> None:
    remove(node, 2)


def _missing_file(node: Node) -> None:
    node.file(2, "ledger.json").unlink()


def _missing_manifest(node: Node) -> None:
    (node.evidence / "chain.json").unlink()


def _missing_key(node: Node) -> None:
    next((node.evidence / "keys").iterdir()).unlink()


def _missing_envelope(node: Node) -> None:
    node.file(2, "dsse.json").unlink()


def _edited_line(node: Node) -> None:
    path = node.file(2, "ndjson.zst")
    path.write_bytes(path.read_bytes().replace(b'"comm":"sh"', b'"comm":"ls"', 1))


def _edited_ledger(node: Node) -> None:
    path = node.file(2, "ledger.json")
    path.write_bytes(path.read_bytes().replace(b'"lost":{"ring_full":1}', b'"lost":{"ring_full":0}'))


def _edited_manifest(node: Node) -> None:
    path = node.evidence / "chain.json"
    path.write_bytes(path.read_bytes().replace(b'"created":"2', b'"created":"1'))


def _edited_head(node: Node) -> None:
    path = node.where.head
    head = msgspec.json.decode(path.read_bytes()) | {"ended_runs": ["x"]}
    path.write_bytes(canonical.dumps(head))


def _reordered(node: Node) -> None:
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        a, b = node.file(2, kind), node.file(3, kind)
        a_bytes = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(a_bytes)


def _inserted(node: Node) -> None:
    (node.evidence / "notes.txt").write_text("hello")


def _inserted_key(node: Node) -> None:
    (node.evidence / "keys" / "other.pem").write_text("hello")


def _inserted_open(node: Node) -> None:
    node.file(2, "open.ndjson.zst").write_bytes(b"")


def _inserted_link(node: Node) -> None:
    node.file(2, "ndjson.zst").rename(node.evidence.parent / "elsewhere")
    node.file(2, "ndjson.zst").symlink_to(node.evidence.parent / "elsewhere")


def _truncated(node: Node) -> None:
    remove(node, 4)


def _truncated_unsigned(node: Node) -> None:
    node.file(4, "dsse.json").unlink()


def _forked(node: Node) -> None:
    other = node.evidence.parent / "other"
    shutil.copytree(node.evidence.parent, other, ignore=shutil.ignore_patterns("other"))
    twin = Node(other, node.name)
    for index in (3, 4):
        remove(twin, index)
    twin.where.head.unlink()
    store = twin.open()
    store.close("age")
    store.close("age")
    store.release()
    # Chunk 3 of the other history, signed with the same key for the same place.
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        shutil.copy(twin.file(3, kind), node.file(3, kind))
    shutil.rmtree(other)


def _forked_head(node: Node) -> None:
    resign(node, 4, close_reason="stop")
    head = msgspec.json.decode(node.where.head.read_bytes()) | {"statement_sha256": "0" * 64}
    node.where.head.write_bytes(canonical.dumps(head))


def _spliced(node: Node) -> None:
    other = small_chain(node.evidence.parent / "other", "node-b")
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        shutil.copy(other.file(2, kind), node.file(2, kind))
    shutil.rmtree(node.evidence.parent / "other")


def _spliced_line(node: Node) -> None:
    data = b"".join(line("node-b", 5, seq) for seq in range(2, 6))
    remove(node, 4)
    resign(node, 3, data)


def _bad_signature(node: Node) -> None:
    path = node.file(2, "dsse.json")
    opened = dsse.open_envelope(path.read_bytes())
    payload = opened.payload.replace(b'"close_reason":"size"', b'"close_reason":"stop"')
    path.write_bytes(dsse.seal(payload, opened.key_id, opened.signature))


def _bundle_mismatch(node: Node) -> None:
    payload = dsse.open_envelope(node.file(4, "dsse.json").read_bytes()).payload
    stated = statement.decode(payload)
    events = msgspec.structs.replace(stated.predicate.events, count=1)
    predicate = msgspec.structs.replace(stated.predicate, events=events)
    put_statement(node, 4, msgspec.structs.replace(stated, predicate=predicate), ledger_of(node, 4))


def _bundle_of_another(node: Node) -> None:
    data = b"".join(line(node.name, 5, seq) for seq in range(2, 5))
    envelope = node.file(3, "dsse.json").read_bytes()
    head = node.where.head.read_bytes()
    resign(node, 3, data)
    node.file(3, "dsse.json").write_bytes(envelope)
    node.where.head.write_bytes(head)


def _identity_broken(node: Node) -> None:
    remove(node, 4)
    run = ledger_of(node, 3).runs[0]
    rows = [msgspec.structs.replace(r, next=r.next + 1) if r.lane == 5 else r for r in run.lanes]
    resign(node, 3, runs=[msgspec.structs.replace(run, lanes=rows)])


def _lane_jumps(node: Node) -> None:
    remove(node, 4)
    run = ledger_of(node, 3).runs[0]
    rows = [
        LaneRow(5, row.first + 1, row.next + 1, row.recorded, row.filtered, row.lost) if row.lane == 5 else row
        for row in run.lanes
    ]
    data = b"".join(line(node.name, 5, seq) for seq in range(3, 7))
    resign(node, 3, data, runs=[msgspec.structs.replace(run, lanes=rows)])


def _line_twice(node: Node) -> None:
    remove(node, 4)
    data = b"".join(line(node.name, 5, seq) for seq in (2, 3, 4, 4))
    resign(node, 3, data)


def _run_forgotten(node: Node) -> None:
    resign(node, 4, previous_ledger_sha256=ledger_of(node, 4).previous_ledger_sha256, filtered={"kernel_path": 3})


def _malformed_line(node: Node) -> None:
    remove(node, 4)
    good = [line(node.name, 5, seq) for seq in range(2, 6)]
    resign(node, 3, b"".join([*good[:3], b"{oops\n"]))


def _malformed_envelope(node: Node) -> None:
    node.file(2, "dsse.json").write_bytes(b"{")


def _not_canonical_line(node: Node) -> None:
    remove(node, 4)
    data = node.lines(3).replace(b'"comm":"sh"', b'"comm": "sh"', 1)
    resign(node, 3, data)


def _not_canonical_manifest(node: Node) -> None:
    path = node.evidence / "chain.json"
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("vector", "code", "chunk"),
    [
        (_missing, "missing", 2),
        (_missing_file, "missing", 2),
        (_missing_manifest, "missing", None),
        (_missing_key, "missing", 1),
        (_missing_envelope, "missing", 2),
        (_edited_line, "edited", 2),
        (_edited_ledger, "edited", 2),
        (_edited_manifest, "edited", 1),
        (_edited_head, "edited", 4),
        (_reordered, "reordered", 2),
        (_inserted, "inserted", None),
        (_inserted_key, "inserted", None),
        (_inserted_open, "inserted", 2),
        (_inserted_link, "missing", 2),
        (_truncated, "truncated", 4),
        (_truncated_unsigned, "truncated", 4),
        (_forked, "forked", 4),
        (_forked_head, "forked", 4),
        (_spliced, "spliced", 2),
        (_spliced_line, "spliced", 3),
        (_bad_signature, "bad_signature", 2),
        (_bundle_mismatch, "bundle_mismatch", 4),
        (_bundle_of_another, "bundle_mismatch", 3),
        (_identity_broken, "identity_broken", 3),
        (_lane_jumps, "identity_broken", 3),
        (_line_twice, "identity_broken", 3),
        (_run_forgotten, "identity_broken", 4),
        (_malformed_line, "malformed", 3),
        (_malformed_envelope, "malformed", 2),
        (_not_canonical_line, "not_canonical", 3),
        (_not_canonical_manifest, "not_canonical", None),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_each_fault_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vector: object, code: str, chunk: int | None
) -> None:
    """The code and the chunk of the damage are in the report, and the text says INVALID; without C code too."""
    node = small_chain(tmp_path)
    vector(node)  # type: ignore[operator]
    report = node.verify()
    monkeypatch.setattr(verify, "ChunkReader", partial(ChunkReader, native=False))
    assert report == node.verify()
    assert (code, chunk) in codes(report)
    assert all(fault.code in FAULT_CODES for fault in report.faults)
    first = render_text(report).splitlines()[:2]
    assert first[0] == "Chain Status: ✗ INVALID"
    assert first[1].startswith("  Error: ")


def test_the_first_lines_are_those_of_the_runbook(tmp_path: Path) -> None:
    """The text for people begins exactly as the runbook shows it."""
    node = small_chain(tmp_path)
    _edited_line(node)
    lines = render_text(node.verify()).splitlines()
    assert lines[:2] == ["Chain Status: ✗ INVALID", "  Error: Chain broken at chunk 2"]
    assert lines[2] == "  Reason: 000002.ndjson.zst is not what was signed (edited)"


def test_another_key_is_not_trusted(tmp_path: Path) -> None:
    """A chain re-signed by somebody else is INVALID, chunk by chunk, whatever lies in keys/."""
    node = small_chain(tmp_path)
    assert {("unknown_key", index) for index in (1, 2, 3, 4)} == node.codes(trusted_keys={"sha256:" + "0" * 64})


def test_without_trust_nothing_is_valid(tmp_path: Path) -> None:
    """Chunks are UNTRUSTED_KEY, and the hint names the option that would change it."""
    node = small_chain(tmp_path)
    shutil.rmtree(node.where.state)
    report = node.verify()
    assert {("unknown_key", None)} == codes(report)
    assert {"UNTRUSTED_KEY"} == {chunk.status for chunk in report.chunks}
    assert f"--key sha256:{node.made.key_id}" in render_text(report)
    assert verify_chain(node.evidence, trusted_keys={node.made.key_id}).valid


def test_an_empty_chain_is_not_valid(tmp_path: Path) -> None:
    """Where nothing is signed, nothing is vouched for."""
    node = Node(tmp_path)
    assert {("unsigned", None)} == node.codes()


def test_an_open_chunk_is_reported_and_is_no_fault(tmp_path: Path) -> None:
    """What is being written is not judged."""
    node = small_chain(tmp_path)
    store = node.open()
    store.commit(*one(Source(node.name, "f" * 16).batch({0: 2})))
    report = node.verify()
    store.release()
    assert set() == codes(report)
    assert report.open is not None
    assert (report.open.index, report.open.bytes > 0) == (5, True)


def test_a_crash_leaves_temporary_files_and_a_sealed_tail_that_are_no_fault(tmp_path: Path) -> None:
    """Between a crash and the next start the chain verifies; the report warns."""
    node = small_chain(tmp_path)
    node.file(4, "dsse.json").rename(node.file(4, "dsse.json.tmp"))
    third = dsse.open_envelope(node.file(3, "dsse.json").read_bytes()).payload
    ledger = ledger_of(node, 3)
    put_statement(node, 3, statement.decode(third), ledger)
    report = node.verify()
    assert set() == codes(report)
    assert {"left_over", "unsigned"} == {warning.code for warning in report.warnings}
    assert [chunk.status for chunk in report.chunks] == ["VALID_PENDING"] * 3 + ["UNSIGNED"]


def test_a_given_head_shows_a_cut_end(tmp_path: Path) -> None:
    """A head kept elsewhere is compared, and a missing one is an error of use."""
    node = small_chain(tmp_path)
    kept = tmp_path / "kept.json"
    shutil.copy(node.where.head, kept)
    remove(node, 4)
    node.where.head.unlink()
    assert node.verify().valid
    assert {("truncated", 4)} == node.codes(head=kept)
    with pytest.raises(NotFound):
        node.verify(head=tmp_path / "nowhere.json")


def test_progress_is_told(tmp_path: Path) -> None:
    """In bytes, from none to all."""
    seen: list[tuple[int, int]] = []
    node = small_chain(tmp_path)
    sizes = [node.file(index, "ndjson.zst").stat().st_size for index in (2, 3)]
    node.verify(progress=lambda done, total: seen.append((done, total)))
    assert [(done, sum(sizes)) for done in (0, sizes[0], sum(sizes))] == list(dict.fromkeys(seen))


# -- one flipped byte --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flip_node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return small_chain(tmp_path_factory.mktemp("flip"))


def _files(node: Node) -> list[Path]:
    return [*sorted(p for p in node.evidence.rglob("*") if p.is_file() and p.stat().st_size), node.where.head]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_seen(flip_node: Node, data: st.DataObject) -> None:
    """Whatever single byte of evidence or head is another one, the chain is not VALID."""
    path = data.draw(st.sampled_from(_files(flip_node)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    with_flip = bytearray(whole)
    with_flip[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(with_flip)
    try:
        assert not flip_node.verify().valid, f"{path.name} byte {at}"
    finally:
        path.write_bytes(whole)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_file_is_seen(flip_node: Node, data: st.DataObject) -> None:
    """A file of evidence that ends early is not VALID."""
    path = data.draw(st.sampled_from(_files(flip_node)))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        assert not flip_node.verify().valid, path.name
    finally:
        path.write_bytes(whole)


# -- archives ----------------------------------------------------------------------------------------------------


def _archive(node: Node, target: Path, prefix: str = "var/lib/stellaops/evidence") -> Path:
    with tarfile.open(target, "w:gz" if target.suffix != ".tar" else "w") as tar:
        tar.add(node.evidence, prefix)
    return target


@pytest.mark.parametrize("name", ["e.tar.gz", "e.tgz", "e.tar"])
@pytest.mark.parametrize("prefix", [".", "evidence", "var/lib/stellaops/evidence"])
def test_an_archive_verifies_like_its_directory(tmp_path: Path, name: str, prefix: str) -> None:
    """Wherever in the archive the evidence lies; trust must be given, since no archive vouches for itself."""
    node = small_chain(tmp_path)
    path = _archive(node, tmp_path / name, prefix)
    assert {("unknown_key", None)} == codes(verify_chain(path))
    assert verify_chain(path, trusted_keys={node.made.key_id}, head=node.where.head).valid


def test_an_archive_with_other_things_beside_the_evidence_is_read(tmp_path: Path) -> None:
    """What lies outside the evidence is left alone; what lies in it and does not belong is a fault."""
    node = small_chain(tmp_path)
    path = tmp_path / "all.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path, "stellaops", filter=lambda m: None if "all.tar" in m.name or ".lock" in m.name else m)
    assert verify_chain(path, trusted_keys={node.made.key_id}).valid
    (node.evidence / "extra").write_text("x")
    path = _archive(node, tmp_path / "extra.tar.gz")
    assert {("inserted", None)} == codes(verify_chain(path, trusted_keys={node.made.key_id}))


def _member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return member


@pytest.mark.parametrize(
    "member",
    [
        _member("evidence/../../etc/cron.d/x"),
        _member("evidence/000009.ndjson.zst", tarfile.SYMTYPE),
        _member("evidence/000009.ndjson.zst", tarfile.LNKTYPE),
        _member("evidence/000009.ndjson.zst", tarfile.FIFOTYPE),
        _member("evidence/chain.json"),
        _member("other/chain.json"),
    ],
    ids=["traversal", "symlink", "hardlink", "fifo", "doubled", "two-chains"],
)
def test_hostile_archives_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    """Nothing of them is written, and nothing is answered about them."""
    node = small_chain(tmp_path)
    path = _archive(node, tmp_path / "e.tar", "evidence")
    with tarfile.open(path, "a") as tar:
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(BadAnswer):
        verify_chain(path)


def test_sizes_in_an_archive_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive over the limit is refused before anything is unpacked."""
    node = small_chain(tmp_path)
    monkeypatch.setattr("stella_shared.evidence.archive.MAX_TOTAL_BYTES", 1000)
    with pytest.raises(BadAnswer):
        verify_chain(_archive(node, tmp_path / "e.tar.gz"))


def test_a_huge_extended_header_is_refused(tmp_path: Path) -> None:
    """It would be read into memory whole."""
    path = tmp_path / "e.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 100_000}) as tar:
        tar.addfile(_member("evidence/chain.json"), io.BytesIO(b""))
    with pytest.raises(BadAnswer):
        verify_chain(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_answer_or_are_refused(flip_node: Node, data: st.DataObject) -> None:
    """A flipped byte in a compressed archive never ends in a traceback."""
    path = flip_node.evidence.parent / "damaged.tar.gz"
    whole = bytearray(_archive(flip_node, path).read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        report = verify_chain(path, trusted_keys={flip_node.made.key_id}, head=flip_node.where.head)
    except StellaError:
        return
    # Archives have bytes that carry nothing (times, owners, padding): what comes out must be the same then.
    assert not report.valid or report.lines == 11


def test_what_is_no_evidence_is_refused(tmp_path: Path) -> None:
    """Nothing there, another kind of file, an empty archive: each says so."""
    with pytest.raises(NotFound):
        verify_chain(tmp_path / "nowhere")
    other = tmp_path / "evidence.zip"
    other.write_bytes(b"PK")
    with pytest.raises(UsageError):
        verify_chain(other)
    with tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    with pytest.raises(BadAnswer):
        verify_chain(tmp_path / "empty.tar.gz")


def test_a_ledger_is_bound_to_its_chunk(tmp_path: Path) -> None:
    """The digest in the statement is that of the ledger's file."""
    node = small_chain(tmp_path)
    payload = dsse.open_envelope(node.file(2, "dsse.json").read_bytes()).payload
    said = statement.decode(payload).predicate.accounting.ledger_sha256
    assert said == sha256(node.file(2, "ledger.json").read_bytes()).hexdigest()
    assert os.stat(node.where.head).st_mode & 0o077 == 0
