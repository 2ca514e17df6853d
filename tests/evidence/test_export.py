"""Exports: what is in them, the same bytes each time, and what verification says of a part of a chain."""

from __future__ import annotations

import base64
import json
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path

import anyio
import msgspec
import pytest
from chain_maker import Node, small_chain
from export_maker import FEBRUARY, JANUARY, export_to, months
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.signer.log_kit import Queue, surroundings

from stella_shared.errors import ConfigError, NotFound, UsageError
from stella_shared.evidence import canonical, dsse, export, importing, manifest, names
from stella_shared.evidence.export import Times
from stella_shared.evidence.report import ChainReport, render_text
from stella_shared.evidence.verify import verify_chain
from stella_signer import errands


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "evidence"


def codes(report: ChainReport) -> set[tuple[str, int | None]]:
    return {(fault.code, fault.chunk) for fault in report.faults}


def check(node: Node, path: Path, head: Path | None = None) -> ChainReport:
    return verify_chain(path, trusted_keys={node.made.key_id}, head=head)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return months(tmp_path_factory.mktemp("months"))


@pytest.fixture
def january(node: Node, tmp_path: Path) -> Path:
    return export_to(node, tmp_path / "january.tar.gz", JANUARY)


def test_an_export_holds_the_chunks_of_its_time_and_an_anchor(node: Node, january: Path, tmp_path: Path) -> None:
    """Every chunk whose window overlaps, ledger and envelope of the one before, chain, keys and manifest."""
    evidence = unpacked(january, tmp_path)
    kinds = ("dsse.json", "ledger.json", "ndjson.zst")
    expected = {f"{i:06d}.{kind}" for i in (3, 4, 5) for kind in kinds} | {"000002.dsse.json", "000002.ledger.json"}
    assert expected | {"chain.json", "keys", "manifest.dsse.json"} == {p.name for p in evidence.iterdir()}
    told, _ = manifest.open_signed((evidence / names.MANIFEST).read_bytes())
    predicate = told.predicate
    assert (3, 5, 2, 7, [3, 4, 5], []) == (
        predicate.first, predicate.last, predicate.anchor and predicate.anchor.index, predicate.head.index,
        predicate.pending, predicate.archived,
    )  # fmt: skip
    assert ("2026-01-01T00:00:00.000000000Z", "2026-02-01T00:00:00.000000000Z", "2026-03-05T12:00:00.000000000Z") == (
        predicate.since, predicate.until, predicate.created
    )  # fmt: skip
    for name, digest in told.digests().items():
        assert digest == sha256((evidence / name).read_bytes()).hexdigest()


def test_the_same_chunks_give_the_same_bytes(node: Node, tmp_path: Path) -> None:
    """Header, order, owners, modes, times and signature are fixed."""
    one = export_to(node, tmp_path / "one.tar.gz", JANUARY)
    other = export_to(node, tmp_path / "other.tar.gz", JANUARY)
    assert one.read_bytes() == other.read_bytes()
    assert b"\x1f\x8b\x08\x00\x00\x00\x00\x00" == one.read_bytes()[:8]
    with tarfile.open(one) as tar:
        members = tar.getmembers()
    assert sorted(m.name for m in members) == [m.name for m in members]
    assert {(0, 0, "", "", 0, 0o644)} == {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members}


def test_a_part_is_valid_as_archive_and_as_directory(node: Node, january: Path, tmp_path: Path) -> None:
    """The signed manifest declares it: state `range`, and no head is missed."""
    for path in (january, unpacked(january, tmp_path)):
        report = check(node, path)
        assert report.faults == []
        assert ("range", 3, 5, 3) == (report.state, report.first, report.last, len(report.chunks))
        assert [] == report.warnings
        assert "State: range, chunks 3 to 5, as a signed manifest declares" in render_text(report)
    assert {("unknown_key", None)} == {c for c in codes(verify_chain(january)) if c[1] is None}


def test_the_whole_chain_is_complete(node: Node, tmp_path: Path) -> None:
    """From the first chunk to the newest: no anchor is needed."""
    report = check(node, export_to(node, tmp_path / "all.tar.gz"))
    assert (True, "complete", 1, 7) == (report.valid, report.state, report.first, report.last)
    until = export_to(node, tmp_path / "until.tar.gz", Times(until="2026-01-05T00:00:00.000000000Z"))
    report = check(node, until)
    assert (True, "range", 1, 3) == (report.valid, report.state, report.first, report.last)


@pytest.mark.parametrize(
    ("start", "end", "chunks"),
    [
        ("2026-01-01", "2026-01-31", (3, 5)),
        ("2026-01-11", "2026-01-20", (4, 4)),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z", (4, 5)),
        ("2026-01-31T14:00:00+02:00", "2026-01-31T12:00:00Z", (4, 5)),
        ("", "2025-12-31", (1, 3)),
        ("2026-03-01", "", (7, 7)),
        ("", "", (1, 7)),
    ],
)
def test_days_and_times_are_inclusive(node: Node, start: str, end: str, chunks: tuple[int, int]) -> None:
    """A chunk belongs to a time when its window touches it."""
    told = export.build(node.where, export.times(start, end), proofs=False).predicate
    assert chunks == (told.first, told.last)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2026-13-01", ""),
        ("yesterday", ""),
        ("", "2026-01-31T12:00:00"),
        ("2026-02-01", "2026-01-31"),
        ("9999-12-31", "9999-12-31"),
    ],
)
def test_times_that_are_none_are_refused(start: str, end: str) -> None:
    """Text of another form, times without offset, and spans that end before they begin."""
    with pytest.raises(UsageError):
        export.times(start, end)


def test_a_time_without_a_chunk_and_a_place_without_a_chain(node: Node, tmp_path: Path) -> None:
    """Both are not found."""
    with pytest.raises(NotFound):
        errands.sign_manifest(node.signals, export.times("2030-01-01", ""), proofs=False)
    empty = Node(tmp_path)
    (empty.evidence / "chain.json").unlink()
    with pytest.raises(NotFound):
        export.build(empty.where, Times(), proofs=False)


def test_proofs_are_in_it_when_asked_for(tmp_path: Path) -> None:
    """Bundles and timestamps; a chunk with its bundle is not pending."""
    node = months(tmp_path)
    with surroundings(2) as around:
        anyio.run(Queue(tmp_path, around, node).round)
    for index in (1, 2, 3, 5):
        node.file(index, names.BUNDLE).unlink()
    proofs = {f"000004.{kind}" for kind in (names.BUNDLE, names.STAMPS)}
    told = export.build(node.where, JANUARY, proofs=True)
    assert proofs <= set(told.digests())
    assert [3, 5] == told.predicate.pending
    assert not proofs & set(export.build(node.where, JANUARY, proofs=False).digests())
    path = export_to(node, tmp_path / "p.tar.gz", JANUARY, proofs=True)
    assert check(node, path).valid
    evidence = unpacked(path, tmp_path / "out")
    (evidence / "000004.sigstore.json").unlink()
    assert {("missing", 4)} == codes(check(node, evidence))
    (evidence / "000004.sigstore.json").write_bytes(b"[]")
    assert {("edited", 4), ("bundle_mismatch", 4)} == codes(check(node, evidence))


def test_cleaned_up_chunks_are_declared(tmp_path: Path) -> None:
    """Their lines are not in the export, the manifest says so, and they are ARCHIVED there too."""
    from stella_shared.evidence import notes

    node = months(tmp_path)
    notes.put(node.where, node.made.chain_id, notes.make(notes.CLEANUP, first=3, last=4))
    errands.record_notes(node.signals)
    for index in (3, 4):
        node.file(index, "ndjson.zst").unlink()
    path = export_to(node, tmp_path / "a.tar.gz", JANUARY)
    report = check(node, path)
    assert report.faults == []
    assert ["ARCHIVED", "ARCHIVED", "VALID_PENDING"] == [c.status for c in report.chunks]
    node.file(5, "ndjson.zst").unlink()
    with pytest.raises(ConfigError, match=r"000005\.ndjson\.zst is missing"):
        export.build(node.where, JANUARY, proofs=False)


# -- what does not hold ----------------------------------------------------------------------------------------


def remove(evidence: Path, index: int) -> None:
    for path in evidence.glob(f"{index:06d}.*"):
        path.unlink()


def _last_is_gone(evidence: Path) -> None:
    remove(evidence, 5)


def _first_is_gone(evidence: Path) -> None:
    remove(evidence, 3)


def _middle_is_gone(evidence: Path) -> None:
    remove(evidence, 4)


def _anchor_is_gone(evidence: Path) -> None:
    remove(evidence, 2)


def _manifest_is_gone(evidence: Path) -> None:
    (evidence / names.MANIFEST).unlink()


def _manifest_is_changed(evidence: Path) -> None:
    path = evidence / names.MANIFEST
    opened = dsse.open_envelope(path.read_bytes(), manifest.MAX_ENVELOPE_BYTES)
    told = manifest.decode(opened.payload)
    predicate = msgspec.structs.replace(told.predicate, created="2020")
    payload = manifest.encode(msgspec.structs.replace(told, predicate=predicate))
    path.write_bytes(dsse.seal(payload, opened.key_id, opened.signature))


def _manifest_is_none(evidence: Path) -> None:
    (evidence / names.MANIFEST).write_bytes(b"{}")


def _anchor_of_another(evidence: Path) -> None:
    shutil.copy(evidence / "000003.dsse.json", evidence / "000002.dsse.json")


def _anchor_ledger_changed(evidence: Path) -> None:
    path = evidence / "000002.ledger.json"
    path.write_bytes(path.read_bytes().replace(b'"age"', b'"eon"'))


def _lines_are_gone(evidence: Path) -> None:
    (evidence / "000004.ndjson.zst").unlink()


def _lines_are_changed(evidence: Path) -> None:
    path = evidence / "000004.ndjson.zst"
    path.write_bytes(path.read_bytes().replace(b'"sh"', b'"ls"', 1))


@pytest.mark.parametrize(
    ("change", "fault", "state"),
    [
        (_last_is_gone, ("truncated", 5), "truncated"),
        (_first_is_gone, ("missing", 3), "gap"),
        (_middle_is_gone, ("missing", 4), "gap"),
        (_anchor_is_gone, ("missing", 2), "gap"),
        (_manifest_is_gone, ("missing", 1), "gap"),
        (_manifest_is_changed, ("bad_signature", None), "range"),
        (_manifest_is_none, ("malformed", None), "gap"),
        (_anchor_of_another, ("reordered", 2), "forked"),
        (_anchor_ledger_changed, ("edited", 2), "forked"),
        (_lines_are_gone, ("missing", 4), "gap"),
        (_lines_are_changed, ("edited", 4), "range"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_a_changed_export_is_not_valid(node: Node, january: Path, change: object, fault: object, state: str) -> None:
    """Each way has its code, and the state says how much is here."""
    evidence = unpacked(january, january.parent)
    change(evidence)  # type: ignore[operator]
    report = check(node, evidence)
    assert fault in codes(report)
    assert state == report.state


def test_a_history_of_another_name_is_forked(node: Node, january: Path, tmp_path: Path) -> None:
    """A chunk that the node's own key has signed for the same place, and that the manifest does not list."""
    evidence = unpacked(january, tmp_path)
    twin_folder = tmp_path / "twin"
    shutil.copytree(node.evidence.parent, twin_folder)
    twin = Node(twin_folder)
    for index in (5, 6, 7):
        remove(twin.evidence, index)
    twin.where.head.unlink()
    store = twin.open()
    store.close("stop")
    store.release()
    for kind in ("dsse.json", "ledger.json", "ndjson.zst"):
        shutil.copy(twin.file(5, kind), evidence / f"000005.{kind}")
    report = check(node, evidence)
    assert ("forked", 5) in codes(report)
    assert "forked" == report.state


def test_a_manifest_in_a_nodes_own_evidence_hides_no_cut(tmp_path: Path) -> None:
    """There the chain must be whole: an older export's manifest is a thing that does not belong."""
    node = months(tmp_path)
    until = Times(until="2026-01-05T00:00:00.000000000Z")
    shutil.copy(unpacked(export_to(node, tmp_path / "a.tar.gz", until), tmp_path / "x") / names.MANIFEST, node.evidence)
    for index in (4, 5, 6, 7):
        remove(node.evidence, index)
    report = node.verify()
    assert {("inserted", None), ("truncated", 4)} == codes(report)
    report = verify_chain(node.evidence, trusted_keys={node.made.key_id}, head=node.where.head, own=True)
    assert {("inserted", None), ("truncated", 4)} == codes(report)


# -- pinned ends -----------------------------------------------------------------------------------------------


def _bundle(envelope: bytes) -> bytes:
    plain = json.loads(envelope)
    for signature in plain["signatures"]:
        del signature["keyid"]
    return json.dumps({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": plain}).encode()


def test_every_kind_of_pinned_end_shows_a_cut(node: Node, tmp_path: Path) -> None:
    """head.json, a later chunk's statement or bundle, and both forms of a manifest."""
    whole = export_to(node, tmp_path / "all.tar.gz")
    envelope = node.file(7, "dsse.json").read_bytes()
    pins = {
        "head.json": node.where.head.read_bytes(),
        "000007.dsse.json": envelope,
        "000007.sigstore.json": _bundle(envelope),
        "manifest.dsse.json": (unpacked(whole, tmp_path / "x") / names.MANIFEST).read_bytes(),
        "manifest.json": msgspec.json.format(msgspec.json.encode(importing.describe(whole)), indent=2),
    }
    copy = tmp_path / "copy" / "evidence"
    shutil.copytree(node.evidence, copy)
    for name, data in pins.items():
        (tmp_path / name).write_bytes(data)
        assert check(node, copy, tmp_path / name).valid, name
    remove(copy, 7)
    assert check(node, copy).valid
    for name in pins:
        report = check(node, copy, tmp_path / name)
        assert ("truncated", 7) in codes(report), name
        assert "truncated" == report.state


def test_a_pinned_manifest_shows_that_an_export_was_swapped(node: Node, january: Path, tmp_path: Path) -> None:
    """A shorter export, as genuine as the pinned one, ends too early; a longer pin is compared where it can be."""
    shorter = export_to(node, tmp_path / "shorter.tar.gz", export.times("2026-01-01", "2026-01-20"))
    pinned = tmp_path / "manifest.json"
    pinned.write_bytes(msgspec.json.encode(importing.describe(january)))
    assert check(node, shorter).valid
    assert {("truncated", 5)} == codes(check(node, shorter, pinned))
    for later in (6, 7):
        report = check(node, january, node.file(later, "dsse.json"))
        assert (True, "range") == (report.valid, report.state)


def test_pins_of_others_are_told(node: Node, january: Path, tmp_path: Path) -> None:
    """Another chain, another key, a damaged file, a signature that does not hold, another history."""
    other = small_chain(tmp_path / "other")
    assert {("spliced", None)} == codes(check(node, node.evidence, other.where.head))
    (tmp_path / "pin").write_bytes(b"{")
    assert {("malformed", None)} == codes(check(node, january, tmp_path / "pin"))
    opened = dsse.open_envelope(node.file(6, "dsse.json").read_bytes())
    (tmp_path / "pin").write_bytes(dsse.seal(opened.payload, opened.key_id, b"\x30\x06\x02\x01\x01\x02\x01\x01"))
    assert {("bad_signature", None)} == codes(check(node, january, tmp_path / "pin"))
    (tmp_path / "pin").write_bytes(dsse.seal(opened.payload, "0" * 64, opened.signature))
    assert {("unknown_key", None)} == codes(check(node, january, tmp_path / "pin"))
    twin = tmp_path / "twin"
    shutil.copytree(node.evidence.parent, twin)
    other = Node(twin)
    for index in (5, 6, 7):
        remove(other.evidence, index)
    other.where.head.unlink()
    store = other.open()
    store.close("stop")
    store.close("age")
    store.release()
    assert {("forked", 5)} == codes(check(node, january, other.file(5, "dsse.json")))
    assert {("forked", 5)} == codes(check(node, january, other.file(6, "dsse.json")))


# -- the manifest's parser -------------------------------------------------------------------------------------


def test_a_manifest_reads_back(node: Node) -> None:
    """encode and decode are each other's way back."""
    for asked in (JANUARY, FEBRUARY, Times()):
        told = export.build(node.where, asked, proofs=False)
        assert told == manifest.decode(manifest.encode(told))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_manifest_with_one_changed_member_is_refused_or_says_so(node: Node, data: st.DataObject) -> None:
    """Whatever is changed: the parser refuses with `ValueError`, or the value it returns is the changed one."""
    told = export.build(node.where, JANUARY, proofs=False)
    plain = json.loads(manifest.encode(told))
    place: object = plain
    for _ in range(data.draw(st.integers(1, 4))):
        if not isinstance(place, dict | list) or not place:
            break
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if data.draw(st.booleans()) or not isinstance(place[key], dict | list):  # type: ignore[index]
            junk = st.none() | st.integers(-5, 2**60) | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
            place[key] = data.draw(junk)  # type: ignore[index]
            break
        place = place[key]  # type: ignore[index]
    changed = canonical.dumps(plain)
    try:
        found = manifest.decode(changed)
    except ValueError:
        return
    assert canonical.dumps(found) == changed


@settings(max_examples=200, deadline=None)
@given(
    junk=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_junk_is_no_manifest(junk: bytes) -> None:
    """Neither bare nor in an envelope, and never with another exception."""
    envelope = json.dumps(
        {"payload": base64.b64encode(junk).decode(), "payloadType": dsse.PAYLOAD_TYPE, "signatures": []}
    )
    for data in (junk, envelope.encode()):
        with pytest.raises(ValueError):  # whatever the words
            manifest.open_signed(data)
    with pytest.raises(ValueError):
        manifest.decode(junk)
