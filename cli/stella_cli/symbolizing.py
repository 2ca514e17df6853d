"""`stella signals symbolize`: the frames of evidence lines, or single addresses, with names.  Lines stay as they are.

The resolver belongs to the enricher and runs as a process of its own; this module asks it on a pipe.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import click
import msgspec

from stella_cli.console import printable
from stella_cli.settings import Settings
from stella_shared import config
from stella_shared.errors import BrokenPromise, NotFound, NotPermitted, UsageError
from stella_shared.evidence.lines import MAX_LINE_BYTES
from stella_shared.symbols import OFFSET_MAX, Frame, Question, is_build_id

_WORD: Final = re.compile(rb"([0-9a-fA-F]{2,64})\+(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})")
_STDIN: Final = "-"
#: Where the debug information of Debian and Fedora goes.
_USUAL: Final = "/usr/lib/debug"
#: Answers that are remembered; beyond it the memory starts anew, for a tail may run for months.
_KNOWN_MAX: Final = 65_536
_END_SECONDS: Final = 2.0


class _Resolver:
    """The resolving process, started at the first question."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[Question, Frame] = {}

    def ask(self, question: Question) -> Frame:
        """Return the answer.  Raises `BrokenPromise` when there is no resolver."""
        known = self._known.get(question)
        if known is not None:
            return known
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(question) + b"\n")
            self._process.stdin.flush()
            answer = msgspec.json.decode(self._process.stdout.readline(), type=Frame)
        except (OSError, msgspec.MsgspecError):
            raise BrokenPromise(
                f"the resolver ended with code {_ended(self._process)}",
                hint="pip install 'stella-signals[cli,enricher]'",
            ) from None
        if len(self._known) >= _KNOWN_MAX:
            self._known.clear()
        self._known[question] = answer
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            _ended(self._process)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Return the code of a process that ends by itself, or is made to."""
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def run(settings: Settings, inputs: list[str], directories: list[str], *, offline: bool, as_json: bool) -> int:
    """Print lines and words with their frames' names; return 0, or 1 when none of them has one."""
    symbols = settings.signals.symbols
    command = [sys.executable, "-P", "-m", "stella_enricher.symbols"]
    for directory in directories:
        if not Path(directory).is_dir():
            raise NotFound(
                f"no directory {directory}", hint="--debug-directory names a folder of binaries and debug files"
            )
        command += ["--debug-directory", str(Path(directory).absolute())]
    for directory in symbols.debug_directories or [_USUAL]:
        command += ["--system-debug-directory", directory]
    if os.access(settings.state, os.R_OK | os.W_OK | os.X_OK):
        # On the node, its tables; elsewhere nothing is kept.
        command += [
            "--store",
            str(config.symbols_directory(settings.signals)),
            "--store-max-mb",
            str(symbols.store_max_mb),
        ]
    if not offline:
        command += [word for url in symbols.debuginfod_urls for word in ("--debuginfod", url)]
    resolver = _Resolver(command)
    reasons: Counter[str] = Counter()
    asked = 0
    try:
        for line in _lines(inputs or [_STDIN]):
            questions, given = _questions(line)
            frames = [resolver.ask(q) if isinstance(q, Question) else q for q in questions]
            asked += len(frames)
            reasons.update(
                frame.get("reason", "") if isinstance(frame, dict) else frame.reason or "" for frame in frames
            )
            _show(line, frames, given, as_json=as_json)
    finally:
        resolver.close()
    if reasons[""]:
        return 0
    told = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common()) or "there are no frames in it"
    click.echo(f"nothing was resolved: {told}", err=True)
    if asked:
        click.echo("docs/runbook.md, Symbol Resolution Failures, says what each reason means", err=True)
    return 1


def _lines(inputs: Iterable[str]) -> Iterator[bytes]:
    """Yield every line of the inputs, and every word as it stands."""
    for name in inputs:
        if name == _STDIN:
            yield from _of_file(sys.stdin.buffer, "stdin")
        elif _WORD.fullmatch(name.encode("utf-8", "surrogateescape")) and not Path(name).exists():
            yield name.encode()
        else:
            try:
                with open(name, "rb") as file:
                    yield from _of_file(file, name)
            except FileNotFoundError:
                raise NotFound(f"no file {name}", hint="FILE, - for stdin, or BUILD_ID+OFFSET") from None
            except PermissionError:
                raise NotPermitted(f"{name} may not be read", hint="evidence is readable by its owner") from None
            except OSError as e:
                raise UsageError(f"{name}: {e.strerror}") from None


def _of_file(file: IO[bytes], name: str) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 2):
        if len(line) > MAX_LINE_BYTES + 1:
            raise UsageError(f"{name} holds a line of more than {MAX_LINE_BYTES} bytes; no evidence line is that long")
        if line.strip():
            yield line.removesuffix(b"\n")


def _questions(line: bytes) -> tuple[list[Question | dict[str, Any]], bool]:
    """Return what a line asks, and whether it is an evidence line.  A frame without an address answers itself."""
    if not line.lstrip().startswith(b"{"):
        return [_word(word) for word in line.split()], False
    try:
        event = msgspec.json.decode(line, type=dict).get("event")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise UsageError(
            f"neither an evidence line nor BUILD_ID+OFFSET: {printable(line[:80].decode('utf-8', 'replace'))}"
        ) from None
    stack = event.get("stack") if isinstance(event, dict) else None
    out: list[Question | dict[str, Any]] = []
    for index, frame in enumerate(stack if isinstance(stack, list) else []):
        build_id, offset = (frame.get("build_id"), frame.get("offset")) if isinstance(frame, dict) else (None, None)
        if (
            isinstance(build_id, str)
            and is_build_id(build_id)
            and isinstance(offset, int)
            and 0 <= offset <= OFFSET_MAX
        ):
            # Every frame but the innermost is where a call returns to.
            out.append(Question(build_id, offset, after_call=index > 0))
        else:
            out.append({"symbol": frame.get("symbol") if isinstance(frame, dict) else None, "reason": "no_build_id"})
    return out, True


def _word(word: bytes) -> Question:
    match = _WORD.fullmatch(word)
    build_id = match[1].decode().lower() if match else ""
    offset = int(match[2], 0) if match else OFFSET_MAX + 1
    if not is_build_id(build_id) or offset > OFFSET_MAX:
        raise UsageError(
            f"{printable(word[:80].decode('utf-8', 'replace'))} is no address",
            hint="BUILD_ID+OFFSET, such as 93ac61ec5a8eb1396f9fbd350e3169a558528a40+0x104cf0",
        )
    return Question(build_id, offset)


def _show(line: bytes, frames: list[Frame | dict[str, Any]], given: bool, *, as_json: bool) -> None:
    if as_json:
        row: dict[str, Any] = {"frames": frames}
        row["line" if given else "input"] = line.decode("utf-8", "backslashreplace")
        sys.stdout.buffer.write(msgspec.json.encode(row, order="sorted") + b"\n")
        return
    if given:
        sys.stdout.buffer.write(line + b"\n")
    for frame in frames:
        sys.stdout.buffer.write(f"{'  ' if given else ''}{_text(frame)}\n".encode())


def _text(frame: Frame | dict[str, Any]) -> str:
    if isinstance(frame, dict):
        return f"{printable(str(frame['symbol'] or '?'))}  ? ({frame['reason']})"
    address = f"{frame.build_id}+{frame.offset:#x}"
    if frame.symbol is None:
        return f"{address}  ? ({frame.reason})"
    inlined = "".join(f"{printable(name)} ← " for name in frame.inlined or [])
    return f"{address}  {inlined}{printable(frame.symbol)}+{frame.symbol_offset:#x} ({frame.symbol_source})"
