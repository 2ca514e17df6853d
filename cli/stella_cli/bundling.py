"""`stella signals support-bundle`: what a support case needs, in one archive, and no secret.

each part is collected by itself, and says why when it cannot be
  → known secrets are replaced, and what looks like one → manifest.json lists every file → tar.gz, mode 0600
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from stella_cli import asking, collector_report, gateway, kernel_facts, verifying, versions
from stella_cli.secrets_of_node import Secrets
from stella_cli.settings import Settings
from stella_shared import config
from stella_shared.config_oddities import oddities
from stella_shared.errors import NotPermitted, StellaError, UsageError
from stella_shared.evidence.report import encode_report, render_text
from stella_shared.evidence.store import HEAD
from stella_shared.evidence.trusted import node_trust
from stella_shared.evidence.verify import verify_chain

#: Of each log this much of its end; a log itself may be 10 MiB.
LOG_TAIL_BYTES: Final = 256 << 10
_PART_BYTES: Final = 16 << 20
_RUNBOOK: Final = "support"


@dataclasses.dataclass
class Part:
    """A file of the bundle, or why it is not there."""

    name: str
    content: bytes
    note: str = ""


def run(settings: Settings, output: str | None, *, verify: bool, force: bool) -> None:
    """Write the bundle and say what is in it.  Raises `UsageError` when the file is there."""
    node = config.node_name(settings.signals)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    top = f"stella-support-{_plain(node)}-{stamp}"
    target = Path(output or f"{top}.tar.gz")
    if (target.exists() or target.is_symlink()) and not force:
        raise UsageError(f"{target} is there already", hint="choose another name, or give --force", runbook=_RUNBOOK)
    secrets = Secrets.of(settings)
    parts = [_clean(part, secrets) for part in _parts(settings, verify=verify)]
    manifest = _manifest(node, stamp, parts, secrets)
    try:
        _write(target, top, [manifest, *parts])
    except OSError as e:
        raise NotPermitted(f"{target}: {e.strerror}", hint="choose another place with --output") from None
    for part in parts:
        click.echo(f"  {part.name:<24} {len(part.content):>9} bytes" + (f"  {part.note}" if part.note else ""))
    click.echo(f"wrote {target} ({target.stat().st_size} bytes, mode 0600); look through it before you send it")


def _parts(settings: Settings, *, verify: bool) -> Iterator[Part]:
    yield _try("versions.json", lambda: _json(versions.found()))
    yield _try("kernel.json", lambda: _json(kernel_facts.collect()))
    yield _try("configuration.json", lambda: _json(_configuration(settings)))
    for path in ("health", "status"):
        yield _try(f"{path}.json", lambda path=path: _json(gateway.get(settings, f"/{path}").json()))  # type: ignore[misc]
    yield _try("metrics.txt", lambda: gateway.get(settings, "/metrics").body)
    yield _try("stats.txt", lambda: asking.stats_text(settings, memory=False).encode())
    yield _try("memory.txt", lambda: asking.stats_text(settings, memory=True).encode())
    yield _try("programs.json", lambda: _json(collector_report.ask(settings.path, "--loaded", "list")))
    yield _try("directories.txt", lambda: _listing(settings).encode())
    yield from _chain(settings, verify=verify)
    yield from _logs(settings.state / "logs")


def _try(name: str, make: Callable[[], bytes]) -> Part:
    try:
        return Part(name, make()[:_PART_BYTES])
    except StellaError as e:
        return Part(name, b"", f"not there: {e}")
    except OSError as e:
        return Part(name, b"", f"not there: {e.filename or name}: {e.strerror}")
    except Exception as e:  # whatever is broken is what the bundle is made for
        return Part(name, b"", f"not there: {type(e).__name__}: {e}")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str).encode() + b"\n"


def _configuration(settings: Settings) -> dict[str, Any]:
    origins = config.origins(settings.path, os.environ)
    return {
        "file": settings.name,
        "sha256": config.digest(settings.signals),
        "output_directory": settings.signals.output_directory,
        "values": {o.key: {"value": o.value, "source": o.source} for o in origins},
        "odd": [f"{o.key}: {o.message}" for o in oddities(settings.signals)],
    }


def _chain(settings: Settings, *, verify: bool) -> Iterator[Part]:
    if not verify:
        yield Part("chain.txt", b"", "not there: --no-verify")
        return
    evidence = Path(settings.signals.output_directory)

    def report() -> tuple[bytes, bytes]:
        head = settings.state / HEAD
        with verifying.progress_bar("verifying") as progress:
            found = verify_chain(
                evidence,
                trust=node_trust(settings.state),
                head=head if head.exists() else None,
                progress=progress,
                own=True,
            )
        return render_text(found, verbose=True).encode(), encode_report(found)

    made: list[bytes] = []

    def text() -> bytes:
        made.extend(report())
        return made[0]

    yield _try("chain.txt", text)
    if made:
        yield Part("chain.json", made[1][:_PART_BYTES])


def _logs(folder: Path) -> Iterator[Part]:
    try:
        paths = sorted(p for p in folder.iterdir() if p.name.endswith((".log", ".log.1")))
    except OSError as e:
        yield Part("logs/", b"", f"not there: {folder}: {e.strerror}")
        return
    for path in paths:
        yield _try(f"logs/{path.name}", lambda path=path: _tail(path))  # type: ignore[misc]


def _tail(path: Path) -> bytes:
    """Return the end of a log, from the beginning of a line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_TAIL_BYTES))
        data = file.read(LOG_TAIL_BYTES)
    return data if size <= LOG_TAIL_BYTES else data.partition(b"\n")[2]


def _listing(settings: Settings) -> str:
    """Return names, sizes, modes and owners in the evidence and the state directory; no content."""
    rows = []
    for root in (Path(settings.signals.output_directory), settings.state):
        rows.append(f"{root}:")
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(files)[:2000]:
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.st_mtime))
                mode = f"{status.st_mode & 0o7777:04o}"
                where = path.relative_to(root)
                rows.append(f"  {mode} {status.st_uid:>5} {status.st_gid:>5} {status.st_size:>12} {when} {where}")
        disk = os.statvfs(root) if root.exists() else None
        if disk:
            rows.append(f"  free: {disk.f_bavail * disk.f_frsize} bytes of {disk.f_blocks * disk.f_frsize}")
    return "\n".join(rows) + "\n"


def _clean(part: Part, secrets: Secrets) -> Part:
    return Part(part.name, secrets.scrub(part.content), secrets.scrub(part.note.encode()).decode(errors="replace"))


def _manifest(node: str, stamp: str, parts: list[Part], secrets: Secrets) -> Part:
    body = {
        "format": 1,
        "node": node,
        "made": stamp,
        "replaced_secrets": secrets.replaced,
        "unreadable_secrets": secrets.unreadable,
        "files": [
            {
                "name": part.name,
                "bytes": len(part.content),
                "sha256": hashlib.sha256(part.content).hexdigest(),
                "note": part.note,
            }
            for part in parts
        ],
    }
    return Part("manifest.json", secrets.scrub(_json(body)))


def _write(target: Path, top: str, parts: list[Part]) -> None:
    part_file = target.with_name(f".{target.name}.{os.getpid()}.part")
    descriptor = os.open(part_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            with gzip.GzipFile("", "wb", fileobj=out) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
                for part in itertools.filterfalse(lambda p: p.note and not p.content, parts):
                    entry = tarfile.TarInfo(f"{top}/{part.name}")
                    entry.size, entry.mode, entry.mtime = len(part.content), 0o600, int(time.time())
                    tar.addfile(entry, io.BytesIO(part.content))
            out.flush()
            os.fsync(out.fileno())
        part_file.rename(target)
    except BaseException:
        part_file.unlink(missing_ok=True)
        raise


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)[:64]
