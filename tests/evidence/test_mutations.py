"""Whatever is changed in a logged chain, the answer is INVALID, or exactly the weaker one that is listed here."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.evidence.chain_maker import Node, small_chain
from tests.signer.log_kit import Queue, surroundings
from tests.signer.test_remote_keys import WHO, Keyless, keyless_chain
from tests.sigstore.fulcio import Fulcio

from stella_shared.errors import BadAnswer, StellaError
from stella_shared.evidence import canonical, dsse, names
from stella_shared.evidence.compressed import FrameReader, pack
from stella_shared.evidence.keys import load_trusted
from stella_shared.evidence.report import TIME_UNTRUSTED, VALID_LOGGED, VALID_PENDING, ChainReport
from stella_shared.evidence.stamps import decode_stamps
from stella_shared.evidence.transparency import certificate, timestamp
from stella_shared.evidence.transparency.trust import parse
from stella_shared.evidence.verify import verify_chain
from stella_shared.evidence.vouching import Trust

#: The library warns of certificates that it will refuse one day; it refuses or reads them here, as it likes.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
ROOT = Path(__file__).parents[2]
KINDS = ("v1", "v2", "keyless")
HEAD = "head"
#: What may come of a change when it is not INVALID, by the kind of the changed file: the statuses of its chunk.
#: A timestamp that is damaged counts for nothing (TIME_UNTRUSTED); who takes proofs away gets the answer of a chain
#: that has none (VALID_PENDING), or what a later chunk's proof says of it (VALID_LOGGED, `logged_by` that one).
CHANGED = {names.STAMPS: {VALID_LOGGED}, names.BUNDLE: {VALID_LOGGED, TIME_UNTRUSTED}}
REMOVED = {
    names.STAMPS: {VALID_LOGGED},
    names.BUNDLE: {VALID_LOGGED, VALID_PENDING},
    HEAD: {VALID_LOGGED},
}


class Subject:
    """A whole chain with everything beside it, and what is said of it."""

    def __init__(self, node: Node, trust: Trust) -> None:
        self.node, self.trust = node, trust
        self.said = self.verify()
        assert self.said.faults == []
        assert {VALID_LOGGED} == {chunk.status for chunk in self.said.chunks}
        self.files = [*sorted(path for path in node.evidence.rglob("*") if path.is_file()), node.where.head]

    def verify(self, path: Path | None = None) -> ChainReport:
        """Verify as somebody who holds trust and head, and nothing else of the node."""
        head = self.node.where.head
        return verify_chain(path or self.node.evidence, trust=self.trust, head=head if head.exists() else None)

    def kind_of(self, path: Path) -> tuple[str, int | None]:
        """Return the kind of a file, and its chunk."""
        file = names.parse_chunk_file(path.name)
        return (file.kind, file.index) if file else (HEAD if path == self.node.where.head else path.name, None)

    def expect(self, path: Path, allowed: dict[str, set[str]], what: object) -> None:
        """Make sure that the answer is INVALID, or the same about the same, as `allowed` says for this file."""
        try:
            report = self.verify()
        except StellaError:
            return
        kind, index = self.kind_of(path)
        if not report.valid:
            assert report.faults
            return
        assert kind in allowed, f"{path.name} was changed ({what}), and the chain is VALID"
        for before, now in zip(self.said.chunks, report.chunks, strict=True):
            assert _claims(before) == _claims(now)
            assert now.status in (allowed[kind] if now.index == index else {before.status}), (path.name, what, now)
            assert not now.trusted_time or now.trusted_time >= before.trusted_time
            assert now.logged_by is None or now.logged_by >= now.index
        assert (report.totals, report.lines, report.chain_id) == (
            self.said.totals, self.said.lines, self.said.chain_id
        )  # fmt: skip


def _claims(chunk: Any) -> tuple[object, ...]:
    """Return what a chunk's report says beyond who vouches for it and when."""
    weaker = msgspec.structs.replace(chunk, status="", trusted_time="", log="", log_index=None, logged_by=None)
    return msgspec.structs.astuple(weaker)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """Make a chain in a v1 log, one in a v2 log, and one that is signed keyless, once for all tests here."""
    made: dict[str, Subject] = {}
    with ExitStack() as stack:
        fulcio = stack.enter_context(Fulcio())
        for kind in KINDS:
            folder = tmp_path_factory.mktemp(kind)
            around = stack.enter_context(surroundings(1 if kind == "v1" else 2))
            around.log.grow(5, api=around.version)
            if kind == "keyless":
                around = Keyless(around, fulcio)
                node: Node = anyio.run(keyless_chain, folder, around)
            else:
                node = small_chain(folder)
            anyio.run(Queue(folder, around, node).round)
            trusted = dict.fromkeys(load_trusted(node.where.state), "")
            made[kind] = Subject(node, Trust(trusted, frozenset([WHO]), around.services().root))
        yield made


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Iterator[Subject]:
    """Give a chain, and make sure that it is left as it was."""
    found = subjects[request.param]
    before = {path: path.read_bytes() for path in found.files}
    yield found
    assert before == {path: path.read_bytes() for path in found.files}


#: `make fuzz` tries more.
many = settings(
    max_examples=int(os.environ.get("STELLA_MUTATIONS", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _other_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """Return `whole` with something done to it."""
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    end = data.draw(st.integers(at, min(len(whole), at + 64)))
    match data.draw(st.sampled_from(["flip", "delete", "insert", "cut", "double", "swap", "empty"])):
        case "flip":
            changed = bytearray(whole)
            if changed:
                changed[at] ^= data.draw(st.integers(1, 255))
            return bytes(changed)
        case "delete":
            return whole[:at] + whole[end:]
        case "insert":
            return whole[:at] + data.draw(st.binary(min_size=1, max_size=16)) + whole[at:]
        case "cut":
            return whole[:at]
        case "double":
            return whole[:end] + whole[at:end] + whole[end:]
        case "swap":
            return whole[end:] + whole[:end]
        case _:
            return b""


@many
@given(data=st.data())
def test_changed_bytes_are_seen(subject: Subject, data: st.DataObject) -> None:
    """A byte that is another one, is gone or is new, a part that is there twice, an end that is cut off."""
    path = data.draw(st.sampled_from(subject.files))
    whole = path.read_bytes()
    changed = _other_bytes(data, whole)
    if changed == whole:
        return
    path.write_bytes(changed)
    try:
        subject.expect(path, CHANGED, changed[:200])
    finally:
        path.write_bytes(whole)


# -- values ------------------------------------------------------------------------------------------------------------

Place = tuple[Any, ...]


def _places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    yield place, value
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _places(item, (*place, i))


def _decoded(text: Any) -> bytes:
    """Return the bytes of base64 text, b"" for what is none."""
    try:
        return canonical.base64_bytes(text) if isinstance(text, str) and len(text) > 7 else b""
    except ValueError:
        return b""


def _other_value(data: st.DataObject, value: Any) -> Any:
    """Return another value for a place in a JSON document."""
    options: list[Callable[[], Any]] = [
        lambda: data.draw(st.sampled_from([None, True, 0, -1, 1, 2**53, 1.5, "", "x", "0", [], {}, [[]], {"x": 1}])),
    ]
    if isinstance(value, dict):
        options += [lambda: {**value, "extra": 1}, lambda: {k: v for i, (k, v) in enumerate(value.items()) if i}]
    elif isinstance(value, list):
        options += [lambda: value[1:], lambda: value + value[:1], lambda: value[::-1]]
    elif isinstance(value, str):
        options += [lambda: value + "0", lambda: value[1:], lambda: value.swapcase(), lambda: value + "\n"]
        if inner := _decoded(value):
            options += [lambda: base64.b64encode(_other_bytes(data, inner)).decode()] * 4
        if value.isdigit():
            options += [lambda: str(int(value) + 1), lambda: "0" + value]
    elif isinstance(value, int):
        options += [lambda: value + 1, lambda: str(value)]
    return data.draw(st.sampled_from(options))()


def _edited(data: st.DataObject, document: Any) -> Any:
    """Return the document with one place changed; a statement within an envelope is such a place too."""
    changed = json.loads(json.dumps(document))
    place, value = data.draw(st.sampled_from(list(_places(changed))))
    if place and place[-1] == "payload" and data.draw(st.booleans()):
        inner = json.loads(base64.b64decode(value))
        other: Any = base64.b64encode(canonical.dumps(_edited(data, inner))).decode()
    else:
        other = _other_value(data, value)
    if not place:
        return other
    at = changed
    for step in place[:-1]:
        at = at[step]
    if data.draw(st.integers(0, 7)) == 0:
        del at[place[-1]]
    else:
        at[place[-1]] = other
    return changed


def _rewritten(data: st.DataObject, path: Path, whole: bytes) -> bytes:
    """Return a file of the same form and with another content."""
    if path.suffix == ".json":
        return canonical.dumps(_edited(data, json.loads(whole)))
    if path.suffix == ".zst" and whole:
        lines = b"".join(FrameReader(io.BytesIO(whole)).frames()).splitlines()
        n = data.draw(st.integers(0, len(lines) - 1))
        lines[n] = canonical.dumps(_edited(data, json.loads(lines[n])))
        return pack(b"".join(line + b"\n" for line in lines))
    if path.suffix == ".pem":
        begin, *middle, end = whole.decode().splitlines()
        text = base64.b64encode(_other_bytes(data, base64.b64decode("".join(middle)))).decode()
        return "\n".join([begin, *(text[i : i + 64] for i in range(0, len(text), 64)), end, ""]).encode()
    return whole


@many
@given(data=st.data())
def test_changed_values_are_seen(subject: Subject, data: st.DataObject) -> None:
    """The same in well-formed documents: another value, a member more or less, other bytes within base64."""
    path = data.draw(st.sampled_from(subject.files))
    whole = path.read_bytes()
    changed = _rewritten(data, path, whole)
    if changed == whole:
        return
    path.write_bytes(changed)
    try:
        subject.expect(path, CHANGED, changed[:4000])
    finally:
        path.write_bytes(whole)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_removed_file_is_seen_or_weakens(subject: Subject) -> None:
    """Proofs may be taken away, and then prove nothing; everything else is missed."""
    for path in subject.files:
        whole, kind = path.read_bytes(), subject.kind_of(path)
        path.unlink()
        try:
            subject.expect(path, REMOVED, "removed")
            report = subject.verify()
            if kind[0] == HEAD:
                assert report.valid and "no_head" in {warning.code for warning in report.warnings}
            elif kind[0] == names.BUNDLE:
                last = kind[1] == subject.said.chunks[-1].index
                now = report.chunks[(kind[1] or 0) - 1]
                assert report.valid
                assert (now.status, now.logged_by) == (
                    (VALID_PENDING, None) if last else (VALID_LOGGED, now.index + 1)
                )  # fmt: skip
            else:
                assert report.valid == (kind[0] == names.STAMPS)
        finally:
            path.write_bytes(whole)


def test_an_empty_file_is_no_missing_one(subject: Subject) -> None:
    """An empty file is of no form that a signer writes, whatever its name; an empty chunk has an empty file."""
    for path in subject.files:
        whole = path.read_bytes()
        if not whole:
            continue
        path.write_bytes(b"")
        try:
            assert not subject.verify().valid, path.name
        finally:
            path.write_bytes(whole)


@many
@given(data=st.data())
def test_swapped_files_are_seen(subject: Subject, subjects: dict[str, Subject], data: st.DataObject) -> None:
    """A file of another chunk, another kind or another chain in a file's place; or two of them swapped."""
    other = data.draw(st.sampled_from([subjects[kind] for kind in KINDS]))
    path = data.draw(st.sampled_from(subject.files))
    source = data.draw(st.sampled_from(other.files))
    mine, theirs = path.read_bytes(), source.read_bytes()
    if mine == theirs:
        return
    both = other is subject and data.draw(st.booleans())
    path.write_bytes(theirs)
    if both:
        source.write_bytes(mine)
    try:
        # Two files are changed here when they are swapped, and neither may pass.
        subject.expect(path, {} if both else CHANGED, source.name)
    finally:
        path.write_bytes(mine)
        if both:
            source.write_bytes(theirs)


@many
@given(data=st.data())
def test_an_added_file_is_seen(subject: Subject, data: st.DataObject) -> None:
    """A file more, of a name that a chain knows or not, is a fault; the open chunk after the end is none."""
    index = data.draw(st.integers(0, 7))
    kinds = st.sampled_from([*names.KINDS, "txt", ""])
    name = data.draw(st.one_of(st.text("0123456789abc./~-", min_size=1, max_size=12), st.builds(
        lambda kind: f"{index:06d}.{kind}", kinds
    )))  # fmt: skip
    path = subject.node.evidence / name.replace("/", "_").strip(".")
    if path.exists() or path == subject.node.evidence:
        return
    path.write_bytes(data.draw(st.sampled_from([path.read_bytes() for path in subject.files])))
    try:
        report = subject.verify()
        file = names.parse_chunk_file(path.name)
        last = len(subject.said.chunks)
        if report.valid:
            # Nothing vouches for what stands after the end, and it is not counted.  A crash may leave the journal
            # of the newest chunk.
            assert file is not None, path.name
            assert (file.kind == names.OPEN_DATA and file.index > last) or (
                file.kind == names.OPEN_JOURNAL and file.index >= last
            ), path.name
            assert report.lines == subject.said.lines
    finally:
        path.unlink()


# -- certificates ------------------------------------------------------------------------------------------------------


def _flipped(der: bytes) -> Iterator[bytes]:
    for at in range(len(der)):
        for bit in range(8):
            yield der[:at] + bytes([der[at] ^ 1 << bit]) + der[at + 1 :]


def test_no_bit_of_a_certificate_ends_in_a_crash(subjects: dict[str, Subject]) -> None:
    """Every single bit, in a signer's certificate and in an authority's: `ValueError`, or another certificate.

    A version that does not exist is no `ValueError` of the library's, and was a traceback once.
    """
    pem = subjects["keyless"].node.file(2, names.CERTIFICATE).read_bytes()
    real = x509.load_pem_x509_certificate(pem)
    root = subjects["keyless"].trust.root
    assert root is not None
    messages = set()
    for der in _flipped(real.public_bytes(serialization.Encoding.DER)):
        text = base64.b64encode(der).decode()
        lines = "".join(text[at : at + 64] + "\n" for at in range(0, len(text), 64))
        try:
            made = certificate.load(f"-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n".encode())
            certificate.identity(made)
            certificate.check(made, [real.not_valid_before_utc], root)
        except ValueError as e:
            messages.add(str(e))
        else:
            raise AssertionError("a certificate that nobody issued is believed")
    assert "18 is not a valid X509 version" in messages
    document = json.loads(root.document)
    place = document["timestampAuthorities"][0]["certChain"]["certificates"][0]
    messages.clear()
    for der in _flipped(base64.b64decode(place["rawBytes"])):
        place["rawBytes"] = base64.b64encode(der).decode()
        try:
            parse(json.dumps(document).encode())
        except ValueError as e:
            messages.add(str(e).partition(": ")[2])
    assert "18 is not a valid X509 version" in messages


def test_no_byte_of_a_timestamp_ends_in_a_crash(subjects: dict[str, Subject]) -> None:
    """Each byte of a response, in two bits: `ValueError`, or the same time; certificates lie in responses too."""
    subject = subjects["v2"]
    signature = dsse.open_envelope(subject.node.file(2, names.ENVELOPE).read_bytes()).signature
    (response,) = decode_stamps(subject.node.file(2, names.STAMPS).read_bytes())
    root = subject.trust.root
    assert root is not None
    real = timestamp.check(response, signature, root)
    for at in range(len(response)):
        for flip in (0x04, 0x10):
            changed = response[:at] + bytes([response[at] ^ flip]) + response[at + 1 :]
            try:
                assert timestamp.check(changed, signature, root) == real
            except ValueError:
                continue


# -- memory and archives -----------------------------------------------------------------------------------------------


def test_hostile_evidence_takes_little_memory_and_time(tmp_path: Path) -> None:
    """Documents of nothing but lists, and damaged archives: in a process that gets 768 MiB, each ends in an answer."""
    small_chain(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.evidence.hostile", str(tmp_path), "200"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_members_of_an_archive_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories count too: each member takes memory, and a small archive may name very many."""
    node = small_chain(tmp_path)
    path = tmp_path / "e.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(node.evidence, "evidence")
        for n in range(200):
            member = tarfile.TarInfo(f"evidence/{n}")
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
    monkeypatch.setattr("stella_shared.evidence.archive.MAX_MEMBERS", 100)
    with pytest.raises(BadAnswer, match="100 members"):
        verify_chain(path)


def test_values_of_a_document_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document with very many values is refused before one of them is made."""
    monkeypatch.setattr(canonical, "MAX_VALUES", 100)
    assert canonical.loads(b"[" + b"1," * 98 + b"1]", list[int]) == [1] * 99
    with pytest.raises(ValueError, match="more than 100 values"):
        canonical.loads(b"[" + b"1," * 100 + b"1]", list[int])
