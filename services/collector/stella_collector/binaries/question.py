"""What is asked of one file, and what comes back.  Pure.

The answer comes from a process that has read a stranger's file, so it is checked like any other input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from stella_shared.errors import BrokenPromise

#: Bytes of a symbol that a record holds (STELLA_SYMBOL_MAX).
SYMBOL_BYTES: Final = 200
#: Build-ids that a record holds (struct stella_function).
BUILD_ID_BYTES: Final = 20
#: What an answer of 20,000 functions needs at the most, and then some.
ANSWER_BYTES_MAX: Final = 16 << 20
_NAMED_MAX: Final = 16


class Patterns(msgspec.Struct, frozen=True):
    """One entry's functions: exact names, or globs with `*` and `?`; of the mangled or the demangled name."""

    entry: int
    patterns: list[str]


class Question(msgspec.Struct, frozen=True):
    """`watched` in the order of the configuration; `named` are functions that are wanted by their exact names.

    An entry that matches more than `functions_max` functions gets none and the count.
    """

    watched: list[Patterns]
    named: list[str]
    functions_max: int


class Function(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A function to probe: its offset in the file, and its name as the file has it, at most `SYMBOL_BYTES` of it."""

    offset: Annotated[int, Meta(ge=0)]
    symbol: Annotated[bytes, Meta(max_length=SYMBOL_BYTES)]
    total: Annotated[int, Meta(ge=0)] = 0


class Matched(msgspec.Struct, frozen=True):
    """What one entry found: functions sorted by offset, each offset once in all entries; `skipped` says what not."""

    entry: int
    count: int
    functions: list[Function]
    skipped: dict[str, int] = {}


class Answer(msgspec.Struct, frozen=True):
    """What a file holds.  `reason` is not empty when nothing can be said."""

    reason: str = ""
    build_id: str = ""
    #: Made by Go's compiler: return probes would crash it.
    go: bool = False
    #: Not for another machine or another width of registers.
    native: bool = False
    #: Needs no dynamic linker.
    static: bool = False
    matched: list[Matched] = []
    named: dict[str, int] = {}


_decoder = msgspec.msgpack.Decoder(Answer)


def checked(data: bytes, question: Question, file_bytes: int) -> Answer:
    """Return the answer to `question` about a file of this size.  Raises `BrokenPromise` for what can be none."""
    try:
        answer = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BrokenPromise(f"it is no answer: {e}") from None
    entries = [p.entry for p in question.watched]
    seen: set[int] = set()
    for matched in answer.matched:
        offsets = [f.offset for f in matched.functions]
        good = (
            matched.entry in entries
            and len(offsets) <= question.functions_max
            and offsets == sorted(set(offsets))
            and seen.isdisjoint(offsets)
            and (not offsets or offsets[-1] < file_bytes)
            and all(f.symbol and b"\0" not in f.symbol and f.total >= len(f.symbol) for f in matched.functions)
        )
        if not good:
            raise BrokenPromise(f"it says impossible things about entry {matched.entry}")
        seen.update(offsets)
    if len(answer.named) > _NAMED_MAX or any(
        name not in question.named or not 0 <= offset < file_bytes for name, offset in answer.named.items()
    ):
        raise BrokenPromise("it names functions that nobody asked for")
    if len(answer.build_id) > 64 or len(answer.matched) > len(entries):  # 32 bytes in hex
        raise BrokenPromise("it is longer than answers are")
    return answer


def table_sha256(functions: Iterable[Function]) -> str:
    """Return the digest of a table: for each function, sorted, its offset in decimal, a space, the name, a newline."""
    digest = hashlib.sha256()
    for function in functions:
        digest.update(b"%d %s\n" % (function.offset, function.symbol))
    return digest.hexdigest()
