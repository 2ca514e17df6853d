"""Taking an export in: checked in private, then put in place at once, or joined to what is there.

    archive → private directory on the same file system → names, manifest, digests, chain → rename into place
                                                        → with what is there: same chain, no hole → exchange

Whatever is refused leaves nothing behind.  A crash before the rename leaves a private directory that the next
import removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec

from stella_shared.errors import BadAnswer, BrokenPromise, NotFound, NotPermitted, TryAgain, UsageError
from stella_shared.evidence import archive, canonical, manifest, names
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.lines import blocks
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.verify import verify_chain

_PRIVATE: Final = ".stella-import-"
_FILE_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o750
_ELSEWHERE: Final = "choose another place: --to DIR"

Progress = Callable[[int, int], None]


class Listed(msgspec.Struct, frozen=True):
    """A file of an archive."""

    name: str
    bytes: int
    sha256: str


class Carried(msgspec.Struct, frozen=True):
    """The JSON of `stella signals manifest`: an archive's digest, and what is signed about its content."""

    archive: str
    bytes: int
    sha256: str
    manifest: Any
    envelope: Any
    files: list[Listed]


class Imported(msgspec.Struct, frozen=True):
    """What an import did.  `joined` says that there was evidence of the same chain before."""

    directory: Path
    joined: bool
    report: ChainReport


def describe(path: Path) -> Carried:
    """Return what an archive holds, after its files were held against its manifest.

    No key is asked: who reads this decides whom to trust.  Raises `NotFound` and `BadAnswer`.
    """
    if not path.is_file():
        raise NotFound(f"no archive at {path}")
    with archive.unpacked(path) as inside:
        envelope, _, listed = _checked_manifest(path, inside)
        files = [
            Listed(name, (inside.directory / name).stat().st_size, digest_of(inside.directory / name))
            for name in _files(inside.directory)
        ]
    return Carried(
        path.name, path.stat().st_size, digest_of(path), listed.predicate, msgspec.json.decode(envelope), files
    )


def read_carried(data: bytes) -> Carried:
    """Parse the JSON of `stella signals manifest`.  Raises `ValueError`."""
    try:
        return msgspec.json.decode(data, type=Carried)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(str(e)) from None


def digest_of(path: Path) -> str:
    """Return a file's SHA-256."""
    digest = sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def take_in(
    path: Path,
    target: Path,
    *,
    trusted: set[str],
    carried: Carried | None = None,
    disk: Disk | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Check the export in `path` and put its evidence at `target`, or join it to the same chain there.

    `trusted` are the key ids that count; `carried` must describe this very archive.  Raises `BadAnswer` for
    whatever does not hold, `NotFound` when there is no archive, `UsageError` when `target` cannot take it.
    """
    disk = disk or Disk()
    if not path.is_file():
        raise NotFound(f"no archive at {path}")
    if carried is not None and (carried.bytes, carried.sha256) != (path.stat().st_size, digest_of(path)):
        raise BadAnswer(f"{path} is not the archive that the manifest describes ({carried.archive})")
    with _private(target) as private:
        taken = _is_taken(target)
        new = private / "new"
        new.mkdir(mode=0o700)
        envelope, key_id, _ = _checked_manifest(path, archive.unpack(path, new))
        if key_id not in trusted:
            raise BadAnswer(
                f"{path} is signed with key sha256:{key_id[:64]}, which is not trusted (unknown_key)",
                hint=f"if you know this key: --key sha256:{key_id[:64]}",
            )
        if carried is not None and _bytes_of(carried.envelope) != envelope:
            raise BadAnswer(f"{path} holds another manifest than the one that was given")
        found = _verified(new, path, trusted, progress)
        _make_durable(new, disk)
        if not taken:
            _into_place(disk, new, target)
            return Imported(target, False, found)
        joined = private / "joined"
        _join(target, new, joined)
        found = _verified(joined, target, trusted, progress)
        _make_durable(joined, disk)
        _replace(disk, joined, target)
        return Imported(target, True, found)


def _bytes_of(envelope: object) -> bytes:
    try:
        return canonical.dumps(envelope)
    except BrokenPromise:  # whatever it is, it is not the envelope
        return b""


def _checked_manifest(path: Path, inside: archive.Unpacked) -> tuple[bytes, str, manifest.Manifest]:
    """Return the manifest's bytes, key id and content, after holding every file of the archive against it.

    Its signature is the chain's verification to check.
    """
    if inside.strange or inside.outside:
        odd = (inside.strange + inside.outside)[0]
        raise BadAnswer(f"{path}: {odd!r} is no file of an export", hint="export makes archives that import takes")
    try:
        envelope = (inside.directory / names.MANIFEST).read_bytes()
        listed, opened = manifest.open_signed(envelope)
    except FileNotFoundError:
        raise BadAnswer(
            f"{path} holds no {names.MANIFEST}: it is no export",
            hint="an archive of a whole evidence directory is checked with: stella signals verify-chain",
        ) from None
    except ValueError as e:
        raise BadAnswer(f"{path}: {names.MANIFEST}: {e}") from None
    digests = listed.digests()
    here = set(_files(inside.directory)) - {names.MANIFEST}
    if here != set(digests):
        odd = min(here ^ set(digests))
        raise BadAnswer(f"{path}: {odd} is {'not listed in' if odd in here else 'missing, but listed in'} its manifest")
    for name, digest in sorted(digests.items()):
        if digest_of(inside.directory / name) != digest:
            raise BadAnswer(
                f"{path}: {name} is not what its manifest lists", hint="copy it again from where it was made"
            )
    return envelope, opened.key_id, listed


def _files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def _verified(directory: Path, shown: Path, trusted: set[str], progress: Progress | None) -> ChainReport:
    found = verify_chain(directory, trusted_keys=trusted, progress=progress)
    if not found.valid:
        fault = found.faults[0]
        at = f" at chunk {fault.chunk}" if fault.chunk is not None else ""
        raise BadAnswer(
            f"{shown} is refused: {fault.message} ({fault.code}{at})",
            hint=fault.hint or f"stella signals verify-chain {shown} --verbose shows every fault",
            runbook="issue-evidence-chain-verification-failure",
        )
    return found


# -- the place -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _private(target: Path) -> Iterator[Path]:
    """Give an empty directory beside `target`, for us alone; remove it, and what dead imports left there.

    Translates what the file system refuses meanwhile.
    """
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{_PRIVATE}*"):
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=target.parent))
        with _locked(made):
            yield made
    except PermissionError as e:
        raise NotPermitted(
            f"{e.filename or target.parent}: {e.strerror}", hint="run as root, or choose another place: --to DIR"
        ) from None
    except (FileExistsError, NotADirectoryError) as e:
        raise UsageError(f"{e.filename or target.parent}: {e.strerror}", hint=_ELSEWHERE) from None
    except OSError as e:
        raise TryAgain(f"{e.filename or target}: {e.strerror}", hint="see whether the disk is full") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock.  Raises `OSError` when another process has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _is_taken(target: Path) -> bool:
    """Return whether evidence lies at `target`.  Raises `UsageError` when something else does."""
    if not target.is_symlink() and not target.exists():
        return False
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target} is no directory", hint=_ELSEWHERE)
    inside = list(target.iterdir())
    if inside and not (target / names.CHAIN).is_file():
        raise UsageError(f"{target} holds something else than evidence", hint=_ELSEWHERE)
    return bool(inside)


def _make_durable(directory: Path, disk: Disk) -> None:
    """Give files and directories their modes, and see to it that they survive a power cut."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir():
            path.chmod(_DIRECTORY_MODE)
            disk.sync_directory(path)
            continue
        path.chmod(_FILE_MODE)
        fd = disk.create(path, _FILE_MODE)
        try:
            disk.sync(fd)
        finally:
            os.close(fd)
    directory.chmod(_DIRECTORY_MODE)
    disk.sync_directory(directory)


def _into_place(disk: Disk, new: Path, target: Path) -> None:
    """Rename a directory to where there is nothing, or an empty directory."""
    try:
        disk.rename(new, target)
    except OSError as e:
        if e.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        raise _mounted(target) from None
    disk.sync_directory(target.parent)


def _mounted(target: Path) -> UsageError:
    return UsageError(
        f"{target} cannot be replaced: another file system is mounted there",
        hint=f"choose a directory in it: --to {target / 'evidence'}",
    )


def _join(old: Path, new: Path, joined: Path) -> None:
    """Make the directory that holds both.  Raises `BadAnswer` unless both are one chain, without a hole."""
    if (old / names.CHAIN).read_bytes() != (new / names.CHAIN).read_bytes():
        raise BadAnswer(f"{old} holds another chain: to join them would splice two histories", hint=_ELSEWHERE)
    (_, end), (begin, _) = sorted([_span(old), _span(new)])
    if begin > end + 1:
        raise BadAnswer(
            f"chunks {end + 1} to {begin - 1} lie between what is in {old} and this export",
            hint="import the export that holds them first",
        )
    (joined / names.KEYS).mkdir(parents=True, mode=0o700)
    for name in _files(old):
        _link(old / name, joined / name)
    for name in _files(new):
        wanted = joined / name
        if names.is_manifest(name):
            if any(_same(new / name, path) for path in joined.iterdir() if names.is_manifest(path.name)):
                continue
            wanted = joined / names.further_manifest(digest_of(new / name))
        if not wanted.exists():
            _link(new / name, wanted)
        elif not _same(new / name, wanted):
            raise BadAnswer(
                f"{name} is another one in {old} than in this export: two histories",
                hint="verify both; a chunk is signed once",
            )


def _span(directory: Path) -> tuple[int, int]:
    """Return the first and the last chunk whose envelope is there; the anchor counts."""
    files = [names.parse_chunk_file(path.name) for path in directory.iterdir()]
    found = [file.index for file in files if file is not None and file.kind == names.ENVELOPE]
    return (min(found), max(found)) if found else (0, 0)


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and digest_of(one) == digest_of(other)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no links, copy it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)


def _replace(disk: Disk, joined: Path, target: Path) -> None:
    """Let the joined directory take the place of `target`, which goes with the private directory."""
    try:
        disk.exchange(joined, target)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise _mounted(target) from None
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # No exchange on this file system: file by file.  A crash in between leaves a part, and the same import
        # given again brings the rest.
        here = set(_files(target))
        for name in _files(joined):
            if name not in here:
                disk.rename(joined / name, target / name)
        disk.sync_directory(target / names.KEYS)
        disk.sync_directory(target)
    disk.sync_directory(target.parent)
