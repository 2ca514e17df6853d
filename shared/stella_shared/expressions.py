"""Regular expressions out of the configuration, searched in bytes that strangers chose.

They are RE2's, which has no backtracking: a search takes time in proportion to the text, whatever the
expression.  So there are no look-arounds and no back-references.  Size is bounded at compilation.
"""

from __future__ import annotations

from typing import Any, Final

#: Instructions of a compiled expression: the bound of what a search spends on one character.
PROGRAM_MAX: Final = 2000
_MEMORY_BYTES: Final = 1 << 20


class Pattern:
    """A compiled expression."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._group = compiled.groupindex.get("secret", 0)

    def spans(self, text: str, most: int) -> list[tuple[int, int]]:
        """Return where the group `secret` of each match lies, or the match when there is no such group.

        More than `most` matches: the whole text.
        """
        found: list[tuple[int, int]] = []
        for match in self._compiled.finditer(text):
            if len(found) >= most:
                return [(0, len(text))]
            found.append(match.span(self._group))
        return [span for span in found if span[0] < span[1]]


def compile_pattern(text: str) -> Pattern:
    """Return the compiled expression.  Raises `ValueError` that says what is wrong with it."""
    # The library is loaded only where somebody has patterns.
    import re2  # type: ignore[import-untyped]

    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.log_errors = False
    try:
        compiled = re2.compile(text, options)
    except re2.error as e:
        reason = e.args[0] if e.args else e
        raise ValueError(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)) from None
    if compiled.search(""):
        raise ValueError("it matches the empty text")
    if compiled.programsize > PROGRAM_MAX:
        raise ValueError(f"it compiles to {compiled.programsize} instructions; allowed: {PROGRAM_MAX}")
    return Pattern(compiled)
