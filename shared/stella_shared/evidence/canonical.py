"""RFC 8785 bytes, and the strict way back.

Everything that is signed or hashed as JSON goes through here, so that one value has exactly one text.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

import msgspec
import rfc8785

from stella_shared.errors import BrokenPromise

#: Integers above this are not exact in every JSON reader (RFC 8785 section 3.2.2.3): they travel as text.
MAX_SAFE_INTEGER = 2**53 - 1

#: A document that was put there to fill the verifier's memory has more values than this.  Ours have thousands; a ledger
#: of as many coverage documents as it may hold, each with thousands of path patterns, stays below.
MAX_VALUES = 4_000_000

T = TypeVar("T")


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_SAFE_INTEGER:
        return str(value)
    return value


def dumps(value: Any) -> bytes:
    """Return the RFC 8785 bytes of JSON values or msgspec Structs.

    Integers beyond 2^53-1 become decimal text.  Raises `BrokenPromise` for what JSON cannot hold.
    """
    try:
        return rfc8785.dumps(_exact(msgspec.to_builtins(value, str_keys=True)))
    except (rfc8785.CanonicalizationError, TypeError, UnicodeError) as e:
        raise BrokenPromise(f"no canonical JSON: {e}") from None


def decode(data: bytes) -> Any:
    """Return the value of any JSON text, canonical or not.

    Raises `ValueError`; a text of very many values is refused before one of them is made.
    """
    # Every value but the first of its list or object stands behind a comma, and some commas stand in texts.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(str(e)) from None


def loads(data: bytes, kind: type[T]) -> T:
    """Return `data` as `kind`.

    Raises `ValueError` whose text starts with `not canonical` when the bytes are not RFC 8785, and
    otherwise says what does not fit.  Duplicate keys, odd spacing and odd escapes are all not canonical.
    """
    plain = decode(data)
    try:
        value = msgspec.convert(plain, kind, str_keys=True)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(str(e)) from None
    try:
        same = rfc8785.dumps(plain) == data
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeError):
        same = False
    if not same:
        raise ValueError("not canonical: these are not the RFC 8785 bytes of the value")
    return value


def base64_bytes(text: str) -> bytes:
    """Return what the base64 `text` stands for.  Raises `ValueError` for stray characters, padding or bits."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise ValueError(f"base64: {e}") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError("not canonical: base64 with stray bits")
    return data


def line_is_canonical(line: bytes, decoded: Any) -> bool:
    """Return whether `line` is the canonical text of `decoded` (already parsed from it).

    Evidence lines hold no floats and only ASCII keys, so msgspec's sorted encoder gives RFC 8785 bytes; it
    is thirty times faster than a general one.
    """
    return msgspec.json.encode(decoded, order="sorted") == line
