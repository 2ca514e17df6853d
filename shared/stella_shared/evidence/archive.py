"""Archives of evidence directories, treated as hostile.

Only regular files that lie beside `chain.json`, or in `keys/` beside it, are taken out, into a private
temporary directory, under names that we choose to know.  Nothing else of an archive ever reaches the disk.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

import msgspec

from stella_shared.errors import BadAnswer, NotPermitted
from stella_shared.evidence import names

MAX_MEMBER_BYTES: Final = 8 << 30
MAX_TOTAL_BYTES: Final = 64 << 30
#: Of every kind: tarfile keeps about 1 KiB in memory for each.
MAX_MEMBERS: Final = 250_000
#: Evidence shrinks to a tenth or so; what would grow more than this, beyond a first 64 MiB, is made to fill a disk.
MAX_RATIO: Final = 200
_FREE_BYTES: Final = 64 << 20
_BLOCK: Final = 512
_MAX_HEADER_BYTES: Final = 64 << 10
_MAX_NAME: Final = 4096
_BLOCK_BYTES: Final = 1 << 20
_LONG_HEADERS: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAMES: Final = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
SUFFIXES: Final = (".tar", ".tar.gz", ".tgz")


class Unpacked(msgspec.Struct, frozen=True):
    """An archive's evidence directory on disk.

    `strange` names what lay in it and was left out, `outside` what lay beside it.
    """

    directory: Path
    strange: list[str]
    outside: list[str]


class _Member(tarfile.TarInfo):
    """A member whose extended headers are bounded: tarfile reads those into memory whole.

    And one that must be whole: to tarfile a broken header after the first is an archive's end.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark") from None
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(e)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in (*_LONG_HEADERS, *_LONG_NAMES) and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Unpacked]:
    """Unpack the evidence in `path` into a private directory for the length of the block, as `unpack` does."""
    with tempfile.TemporaryDirectory(prefix="stella-verify-") as private:
        yield unpack(path, Path(private))


def unpack(path: Path, target: Path) -> Unpacked:
    """Unpack the evidence in `path` into the directory `target`, which is ours alone and empty.

    Owners, modes and times in the archive are not looked at.  Raises `BadAnswer` for a damaged archive, for
    links, devices, names that lead elsewhere or are no names, for doubled names, and beyond the size limits.
    """
    try:
        return _unpack(path, target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeError) as e:
        raise BadAnswer(f"{path} is a damaged archive: {e}", hint="copy it again from where it was made") from None
    except PermissionError as e:
        raise NotPermitted(f"{path}: {e.strerror}") from None


def _checked(path: Path, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return all members, after refusing what no archive of evidence needs."""
    members: list[tarfile.TarInfo] = []
    seen: set[PurePosixPath] = set()
    total = count = 0
    allowed = min(MAX_TOTAL_BYTES, _FREE_BYTES + MAX_RATIO * path.stat().st_size)
    for member in tar:
        name = PurePosixPath(member.name)
        if ".." in name.parts or name.is_absolute():
            raise BadAnswer(f"{path}: member {member.name!r} leads out of the archive")
        if not member.name.isprintable() or "\\" in member.name or len(member.name) > _MAX_NAME:
            raise BadAnswer(f"{path}: member {member.name[:_MAX_NAME]!r} has no plain name")
        count += 1
        total += member.size + _BLOCK
        if member.size > MAX_MEMBER_BYTES or total > allowed or count > MAX_MEMBERS:
            raise BadAnswer(
                f"{path}: more than {allowed} bytes or {MAX_MEMBERS} members, or one of over {MAX_MEMBER_BYTES}"
            )
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise BadAnswer(f"{path}: member {member.name!r} is no regular file")
        if name in seen:
            raise BadAnswer(f"{path}: member {member.name!r} is there twice")
        seen.add(name)
        members.append(member)
    _check_the_rest(path, tar, allowed)
    return members


def _check_the_rest(path: Path, tar: tarfile.TarFile, allowed: int) -> None:
    """Read what comes after the end mark: padding and nothing else, and then the checksum of the compression."""
    assert tar.fileobj is not None
    padding = 0
    while block := tar.fileobj.read(_BLOCK_BYTES):
        padding += len(block)
        if padding > allowed or block.count(0) != len(block):
            raise BadAnswer(f"{path} goes on after its end", hint="copy it again from where it was made")


def _unpack(path: Path, target: Path) -> Unpacked:
    with path.open("rb") as file:
        mode = "r:gz" if file.read(2) == b"\x1f\x8b" else "r:"
    (target / names.KEYS).mkdir(mode=0o700)
    strange: list[str] = []
    outside: list[str] = []
    with tarfile.open(path, mode, tarinfo=_Member) as tar:  # type: ignore[call-overload]
        members = _checked(path, tar)
        roots = [PurePosixPath(m.name).parent for m in members if PurePosixPath(m.name).name == names.CHAIN]
        if len(roots) > 1:
            raise BadAnswer(f"{path} holds {len(roots)} chains", hint="verify one evidence directory at a time")
        chunks = [PurePosixPath(m.name) for m in members if names.parse_chunk_file(PurePosixPath(m.name).name)]
        if not roots and not chunks:
            raise BadAnswer(f"{path} holds no evidence")
        root = roots[0] if roots else chunks[0].parent
        for member in members:
            name = PurePosixPath(member.name)
            if name.parent == root and _is_evidence(name.name):
                _copy(tar, member, target / name.name)
            elif name.parent == root / names.KEYS and names.parse_key_file(name.name):
                _copy(tar, member, target / names.KEYS / name.name)
            elif root in name.parents:
                strange.append(str(name.relative_to(root)))
            else:
                outside.append(member.name)
    return Unpacked(target, strange, outside)


def _is_evidence(name: str) -> bool:
    return name == names.CHAIN or names.parse_chunk_file(name) is not None or names.is_manifest(name)


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"member {member.name!r} cannot be read")
    with source, target.open("xb") as out:
        while block := source.read(_BLOCK_BYTES):
            out.write(block)
