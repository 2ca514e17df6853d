"""Import: exports join, and a hostile archive is refused and leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from chain_maker import Node, small_chain
from export_maker import FEBRUARY, JANUARY, export_to, months
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stella_shared.errors import BadAnswer, NotFound, StellaError, UsageError
from stella_shared.evidence import export, importing
from stella_shared.evidence.export import Times
from stella_shared.evidence.verify import verify_chain

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return months(tmp_path_factory.mktemp("months"))


@pytest.fixture(scope="module")
def archives(node: Node, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    spans = {
        "december": Times(until="2026-01-01T00:00:00.000000000Z"),
        "january": JANUARY,
        "february": FEBRUARY,
        "march": export.times("2026-03-01", ""),
        "all": Times(),
    }
    return {name: export_to(node, folder / f"{name}.tar.gz", span) for name, span in spans.items()}


def take(node: Node, archive: Path, folder: Path) -> importing.Imported:
    return importing.take_in(archive, folder / "evidence", trusted={node.made.key_id})


def state_of(node: Node, folder: Path) -> tuple[bool, str, int, int]:
    report = verify_chain(folder / "evidence", trusted_keys={node.made.key_id})
    assert report.faults == []
    return report.valid, report.state, report.first, report.last


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_put_in_place_with_modes_of_our_own(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """Whole, readable by owner and group, and nothing else lies beside it."""
    done = take(node, archives["january"], tmp_path)
    assert (False, "range") == (done.joined, done.report.state)
    assert ["evidence"] == [p.name for p in tmp_path.iterdir()]
    assert {0o640} == {p.stat().st_mode & 0o7777 for p in (tmp_path / "evidence").rglob("*") if p.is_file()}
    assert 0o750 == (tmp_path / "evidence").stat().st_mode & 0o7777
    assert (True, "range", 3, 5) == state_of(node, tmp_path)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (["january", "february"], (True, "range", 3, 7)),
        (["february", "january"], (True, "range", 3, 7)),
        (["december", "january", "february", "march"], (True, "complete", 1, 7)),
        (["all", "january"], (True, "complete", 1, 7)),
        (["january", "all"], (True, "complete", 1, 7)),
        (["january", "january"], (True, "range", 3, 5)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_parts_of_a_chain_join(
    node: Node, archives: dict[str, Path], tmp_path: Path, order: list[str], expected: object
) -> None:
    """In any order, overlapping or touching; the result verifies as one piece, and the same twice changes nothing."""
    for number, name in enumerate(order):
        assert bool(number) == take(node, archives[name], tmp_path).joined
    assert expected == state_of(node, tmp_path)
    before = everything(tmp_path)
    take(node, archives[order[-1]], tmp_path)
    assert before == everything(tmp_path)
    assert ["evidence"] == [p.name for p in tmp_path.iterdir()]


def test_a_hole_is_not_joined(tmp_path: Path, node: Node) -> None:
    """What lies between must come first."""
    early = export_to(node, tmp_path / "a.tar.gz", export.times("", "2025-12-31T11:00:00Z"))
    late = export_to(node, tmp_path / "b.tar.gz", export.times("2026-02-20", ""))
    target = tmp_path / "to"
    take(node, early, target)
    before = everything(target)
    with pytest.raises(BadAnswer, match="chunks 3 to 4 lie between"):
        take(node, late, target)
    assert before == everything(target)


def _twin(node: Node, folder: Path) -> Node:
    """Return a node with the same key and chain whose history is another one from chunk 5 on."""
    shutil.copytree(node.evidence.parent, folder)
    twin = Node(folder, node.name)
    for index in (5, 6, 7):
        for path in twin.evidence.glob(f"{index:06d}.*"):
            path.unlink()
    twin.where.head.unlink()
    twin.clock = lambda: "2026-02-05T00:00:00.000000000Z"  # type: ignore[assignment, misc]
    store = twin.open()
    store.close("stop")
    store.close("age")
    store.release()
    return twin


def test_two_histories_and_two_chains_are_not_joined(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """The same key signed both: bytes decide."""
    twin = _twin(node, tmp_path / "twin")
    forked = export_to(twin, tmp_path / "forked.tar.gz", FEBRUARY)
    other = months(tmp_path / "other")
    target = tmp_path / "to"
    take(node, archives["january"], target)
    before = everything(target)
    with pytest.raises(BadAnswer, match="two histories"):
        take(node, forked, target)
    with pytest.raises(BadAnswer, match="another chain"):
        importing.take_in(
            export_to(other, tmp_path / "o.tar.gz", FEBRUARY), target / "evidence", trusted={other.made.key_id}
        )
    assert before == everything(target)


def test_where_the_file_system_cannot_exchange(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """File by file, with the same result."""
    from stella_shared.evidence.disk import Disk

    class Old(Disk):
        def exchange(self, one: Path, other: Path) -> None:
            raise OSError(22, "Invalid argument", str(other))

    take(node, archives["january"], tmp_path)
    importing.take_in(archives["february"], tmp_path / "evidence", trusted={node.made.key_id}, disk=Old())
    assert (True, "range", 3, 7) == state_of(node, tmp_path)


def test_what_a_dead_import_left_is_removed(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """And what a living one holds is not."""
    dead = Path(tempfile.mkdtemp(prefix=".stella-import-", dir=tmp_path))
    (dead / "x").write_bytes(b"x")
    living = Path(tempfile.mkdtemp(prefix=".stella-import-", dir=tmp_path))
    with importing._locked(living):
        take(node, archives["january"], tmp_path)
    assert {living.name, "evidence"} == {p.name for p in tmp_path.iterdir()}


# -- who is believed -------------------------------------------------------------------------------------------


def test_the_manifest_that_was_carried_must_be_the_archives(
    node: Node, archives: dict[str, Path], tmp_path: Path
) -> None:
    """Digest and envelope are compared; its JSON reads back."""
    told = importing.read_carried(msgspec.json.encode(importing.describe(archives["january"])))
    done = importing.take_in(archives["january"], tmp_path / "evidence", trusted={node.made.key_id}, carried=told)
    assert done.report.valid
    with pytest.raises(BadAnswer, match="not the archive that the manifest describes"):
        importing.take_in(archives["february"], tmp_path / "x", trusted={node.made.key_id}, carried=told)
    changed = msgspec.structs.replace(told, envelope={"payload": ""})
    with pytest.raises(BadAnswer, match="another manifest"):
        importing.take_in(archives["january"], tmp_path / "x", trusted={node.made.key_id}, carried=changed)
    for junk in (b"{", b"[]", b'{"archive":1}'):
        with pytest.raises(ValueError, match=r"."):
            importing.read_carried(junk)


def test_an_untrusted_key_is_refused(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """Whatever lies in the archive's keys/."""
    with pytest.raises(BadAnswer, match="unknown_key"):
        importing.take_in(archives["january"], tmp_path / "evidence", trusted={"0" * 64})
    assert [] == list(tmp_path.iterdir())


def test_places_that_cannot_take_it(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """A file, a link, a directory of something else; an empty directory can; no archive is not found."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("file", "link", "full", "file/below"):
        with pytest.raises(UsageError):
            importing.take_in(archives["january"], tmp_path / name, trusted={node.made.key_id})
    importing.take_in(archives["january"], tmp_path / "empty", trusted={node.made.key_id})
    with pytest.raises(NotFound):
        take(node, tmp_path / "nowhere.tar.gz", tmp_path)


# -- hostile archives ------------------------------------------------------------------------------------------


def read(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(m, (tar.extractfile(m) or io.BytesIO()).read()) for m in tar.getmembers()]


def pack(members: Members, path: Path, name: Callable[[str], str] = str) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.name = name(member.name)
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.type, made.mode = kind, mode
    made.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return made, b""


def without(members: Members, name: str) -> Members:
    return [(m, d) for m, d in members if not m.name.endswith(name)]


def changed(members: Members, name: str, change: Callable[[bytes], bytes]) -> Members:
    return [(m, change(d) if m.name.endswith(name) else d) for m, d in members]


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (lambda ms: [*ms, member("../evil")], "leads out"),
        (lambda ms: [*ms, member("evidence/../../evil")], "leads out"),
        (lambda ms: [*ms, member("/etc/evil")], "leads out"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst", tarfile.SYMTYPE)], "no regular file"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst", tarfile.LNKTYPE)], "no regular file"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst", tarfile.FIFOTYPE)], "no regular file"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst", tarfile.CHRTYPE)], "no regular file"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst", tarfile.BLKTYPE)], "no regular file"),
        (lambda ms: [*ms, ms[0]], "is there twice"),
        (lambda ms: [*ms, member("evidence/./000005.ndjson.zst")], "is there twice"),
        (lambda ms: [*ms, member("other/chain.json")], "holds 2 chains"),
        (lambda ms: [*ms, member("evidence/extra.txt")], "no file of an export"),
        (lambda ms: [*ms, member("beside.txt")], "no file of an export"),
        (lambda ms: [*ms, member("evidence/a\nb")], "no plain name"),
        (lambda ms: [*ms, member("evidence\\..\\evil")], "no plain name"),
        (lambda ms: [*ms, member("evidence/" + "a" * 5000)], "no plain name"),
        (lambda ms: [*ms, member("evidence/000009.ndjson.zst")], "not listed in"),
        (lambda ms: [*ms, member("evidence/000003.open.ndjson.zst")], "not listed in"),
        (lambda ms: [*ms, member(f"evidence/keys/{'0' * 64}.pem")], "not listed in"),
        (lambda ms: without(ms, "000005.ndjson.zst"), "missing, but listed in"),
        (lambda ms: without(ms, "manifest.dsse.json"), "no manifest.dsse.json"),
        (lambda ms: without(ms, "chain.json"), "missing, but listed in"),
        (lambda ms: changed(ms, "000005.ndjson.zst", lambda d: d[:-1] + b"x"), "not what its manifest lists"),
        (lambda ms: changed(ms, "000004.dsse.json", lambda d: d[:-9]), "not what its manifest lists"),
        (lambda ms: changed(ms, "manifest.dsse.json", lambda d: d + b"\n"), "not canonical"),
        (lambda ms: [], "holds no evidence"),
    ],
)  # fmt: skip
def test_hostile_archives_leave_nothing(
    node: Node, archives: dict[str, Path], tmp_path: Path, hostile: Callable[[Members], Members], says: str
) -> None:
    """Refused with the reason, whether the place is empty or holds evidence; not a byte of it is written."""
    path = pack(hostile(read(archives["february"])), tmp_path / "h.tar.gz")
    target = tmp_path / "to"
    take(node, archives["january"], target)
    before = everything(target)
    for folder in (target, tmp_path / "fresh"):
        with pytest.raises(BadAnswer, match=says):
            take(node, path, folder)
    assert before == everything(target)
    assert ["evidence"] == [p.name for p in target.iterdir()]
    assert [] == list((tmp_path / "fresh").iterdir())


def test_owners_and_modes_in_an_archive_mean_nothing(node: Node, archives: dict[str, Path], tmp_path: Path) -> None:
    """Setuid bits, owners and times of the archive are not ours."""
    members = read(archives["january"])
    for made, _ in members:
        made.mode, made.uid, made.gid, made.uname, made.mtime = 0o6777, 12345, 12345, "nobody", 1
    take(node, pack(members, tmp_path / "modes.tar.gz"), tmp_path / "to")
    found = [p.stat() for p in (tmp_path / "to" / "evidence").rglob("*") if p.is_file()]
    assert {(0o640, os.getuid())} == {(s.st_mode & 0o7777, s.st_uid) for s in found}


def test_bombs_are_refused_before_they_are_unpacked(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a header promises against the size of the file, by the sum, and by the number of members."""
    ratio = tmp_path / "ratio.tar.gz"
    with gzip.open(ratio, "wb", compresslevel=9) as out:
        made = tarfile.TarInfo("evidence/000001.ndjson.zst")
        made.size = 4 << 30
        out.write(made.tobuf(tarfile.PAX_FORMAT))
        out.write(b"\0" * (1 << 20))
    with pytest.raises(BadAnswer, match="more than"):
        take(node, ratio, tmp_path / "to")
    many = tmp_path / "many.tar.gz"
    block = b"".join(member(f"d{i}", tarfile.DIRTYPE)[0].tobuf(tarfile.PAX_FORMAT) for i in range(1000))
    with gzip.open(many, "wb", compresslevel=1) as out:
        out.write(block)
    monkeypatch.setattr("stella_shared.evidence.archive.MAX_MEMBERS", 900)
    with pytest.raises(BadAnswer, match="more than"):
        take(node, many, tmp_path / "to")
    assert [] == list((tmp_path / "to").iterdir())


def test_an_archive_of_a_bare_directory_is_no_export(node: Node, tmp_path: Path) -> None:
    """The hint names the command for it."""
    path = tmp_path / "bare.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(small_chain(tmp_path / "n").evidence, "evidence")
    with pytest.raises(BadAnswer, match="it is no export") as refused:
        take(node, path, tmp_path / "to")
    assert "stella signals verify-chain" in refused.value.hint
    with pytest.raises(BadAnswer):
        importing.describe(path)
    with pytest.raises(NotFound):
        importing.describe(tmp_path / "nowhere")


def _cut_after_a_member(tar: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as whole:
        return tar[: whole.getmembers()[6].offset]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut_after_a_member, "ends without an end mark"),
        (lambda tar: tar[: len(_cut_after_a_member(tar)) + 100], "truncated header"),
        (lambda tar: (cut := _cut_after_a_member(tar)) + b"?" * 512 + tar[len(cut) + 512 :], "invalid header"),
        (lambda tar: tar + b"more", "goes on after its end"),
    ],
    ids=["cut", "cut-in-a-header", "broken-header", "longer"],
)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_damaged_archive_is_not_taken_for_a_shorter_one(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    """tarfile ends at the first header that is broken, and says nothing."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.add((whole := small_chain(tmp_path / "n")).evidence, "evidence")
    path = tmp_path / f"a.{suffix}"
    for data, is_whole in ((made.getvalue(), True), (damage(made.getvalue()), False)):
        path.write_bytes(gzip.compress(data) if suffix == "tar.gz" else data)
        if is_whole:
            assert verify_chain(path, trusted_keys={whole.made.key_id}).faults == []
            continue
        with pytest.raises(BadAnswer, match=words):
            verify_chain(path, trusted_keys={whole.made.key_id})


def test_the_checksum_of_the_compression_counts(tmp_path: Path) -> None:
    """It is at the end, where nobody would read who stops at the end mark."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        tar.add(small_chain(tmp_path / "n").evidence, "evidence")
    data = bytearray(made.getvalue())
    data[-6] ^= 1
    (path := tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(BadAnswer, match="damaged archive: CRC"):
        verify_chain(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_means_nothing(
    node: Node, archives: dict[str, Path], place: Path, data: st.DataObject
) -> None:
    """Never a traceback, never other evidence than the whole."""
    whole = bytearray(archives["january"].read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = place / "damaged.tar.gz"
    path.write_bytes(whole)
    target = place / "to"
    try:
        take(node, path, target)
    except StellaError:
        assert [] == list(target.iterdir())
        return
    assert (True, "range", 3, 5) == state_of(node, target)
    shutil.rmtree(target)
