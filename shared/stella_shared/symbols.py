"""Symbols: the question that is asked about an address in a file, and the answer.

An address is (build-id, offset in the file): no process and no node is needed to understand it.  The answer
names everything that it depends on, the *symbolization tuple*: build-id, the tables that were read, the
symbolizer with its versions, and the libc of the file where it is known.  The same tuple gives the same
answer everywhere.

An answer without a name has a reason, one of `REASONS`.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta

#: Why there is no name; what each one means and what to do is in the runbook, under Symbol Resolution Failures.
REASONS: Final = (
    "pending",  # the file is being read; a later line will have the name
    "disabled",
    "no_build_id",  # the kernel knew no file for the frame
    "no_file",  # no file with this build-id was found
    "stripped",  # the file holds no table of functions
    "no_symbol",  # there is a table, and no function of it covers the offset
    "no_segment",  # the offset lies in no loaded part of the file, or the debug file alone does not say where
    "build_id_mismatch",  # what was found under the name is another file
    "crc_mismatch",  # the separate debug file is not the one that belongs to it
    "too_large",
    "malformed",
    "timeout",
)
BUILD_ID: Final = re.compile(r"[0-9a-f]{2,64}")
OFFSET_MAX: Final = (1 << 64) - 1


class Question(msgspec.Struct, frozen=True):
    """One address.  `after_call`: it is where a call returns to, so the call stands before it."""

    build_id: str
    offset: int
    after_call: bool = False


class Frame(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is known about an address."""

    build_id: Annotated[str, Meta(description="GNU build-id of the file, hex.")]
    offset: Annotated[int, Meta(ge=0, description="Offset in that file.")]
    symbol: Annotated[str, Meta(description="The function, demangled.")] | None = None
    symbol_offset: Annotated[int, Meta(ge=0, description="Offset from the function's begin.")] | None = None
    symbol_source: Annotated[str, Meta(description="The table that has it.")] | None = None
    inlined: (
        Annotated[list[str], Meta(description="Functions inlined at this place into `symbol`, innermost first.")] | None
    ) = None
    reason: Annotated[str, Meta(description="Why there is no symbol.")] | None = None
    libc: Annotated[str, Meta(description="glibc or musl, where the file says it.")] | None = None
    symbolizer: Annotated[str, Meta(description="Name and versions of what has read the tables.")] | None = None


def is_build_id(text: str) -> bool:
    """Return whether `text` is a build-id: 1 to 32 bytes in lower-case hex."""
    return len(text) % 2 == 0 and BUILD_ID.fullmatch(text) is not None
