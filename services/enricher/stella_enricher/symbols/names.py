"""Names as people write them.  The only module that speaks to the demangler.

LLVM's demangler is C++ and a name can be made to grow without bound, so this runs in the child process alone.
"""

from __future__ import annotations

import re
from typing import Final

import pycxxfilt

#: Mangled names beyond this stay as they are, and what comes out loses its middle.
MANGLED_MAX: Final = 4096
NAME_MAX: Final = 512


_RUST_ESCAPE: Final = re.compile(r"\$(SP|BP|RF|LT|GT|LP|RP|C|u[0-9a-f]{1,6})\$|\.\.")
_RUST_WORDS: Final = {"SP": "@", "BP": "*", "RF": "&", "LT": "<", "GT": ">", "LP": "(", "RP": ")", "C": ","}
_RUST_HASH: Final = re.compile(r"h[0-9a-f]{16}")


def demangled(raw: bytes) -> str:
    """Return a symbol's name: C++ and Rust demangled, any other as it stands, never more than `NAME_MAX` long."""
    name = raw.decode("utf-8", "backslashreplace")
    if name.startswith(("_Z", "_R")) and len(raw) <= MANGLED_MAX:
        name = _legacy_rust(name) or _by_llvm(name) or name
    # The class stands in front, the function behind: both ends say something.
    return name if len(name) <= NAME_MAX else name[: NAME_MAX // 2 - 1] + "…" + name[-NAME_MAX // 2 :]


def _by_llvm(name: str) -> str:
    try:
        return pycxxfilt.demangle(name) or ""
    except ValueError:  # no mangled name, though it begins like one
        return ""


def _legacy_rust(name: str) -> str:
    """Return the path of a name of rustc's older scheme, without its hash; "" when it is not of that scheme."""
    if not name.startswith("_ZN"):
        return ""
    parts: list[str] = []
    at = 3
    while at < len(name) and name[at] != "E":
        digits = at
        while digits < len(name) and name[digits] in "0123456789":
            digits += 1
        if digits == at or digits - at > 4:
            return ""
        at = digits + int(name[at:digits])
        parts.append(name[digits:at])
    if at >= len(name) or len(parts) < 2 or not _RUST_HASH.fullmatch(parts[-1]):
        return ""
    return "::".join(_RUST_ESCAPE.sub(_unescaped, part.removeprefix("_") if part.startswith("_$") else part)
                     for part in parts[:-1])  # fmt: skip


def _unescaped(match: re.Match[str]) -> str:
    word = match[1]
    if word is None:
        return "::"
    if word in _RUST_WORDS:
        return _RUST_WORDS[word]
    code = int(word[1:], 16)
    return chr(code) if 0x20 <= code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]
