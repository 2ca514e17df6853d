"""Protocol buffers, as much of them as the runtimes' answers need.  Pure.

A message is read into its fields by number, strictly (https://protobuf.dev/programming-guides/encoding/):
what is cut off, too long, of another wire type or no UTF-8 raises `ValueError`.  Numbers and names of the
fields stand where they are used, from containerd's and Kubernetes' public .proto files.
"""

from __future__ import annotations

from typing import Final, Self

_VARINT, _I64, _LENGTH, _I32 = 0, 1, 2, 5
#: No message that is asked for has more fields.
MAX_FIELDS: Final = 65536


class Message:
    """The fields of one message: {number: values as they came}; a number or bytes each."""

    __slots__ = ("_fields",)

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        at = count = 0
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            value: int | bytes
            if wire == _VARINT:
                value, at = _varint(data, at)
            elif wire in (_LENGTH, _I64, _I32):
                length = 8 if wire == _I64 else 4
                if wire == _LENGTH:
                    length, at = _varint(data, at)
                value, at = data[at : at + length], at + length
                if at > len(data):
                    raise ValueError(f"field {number} runs over the end")
            else:
                raise ValueError(f"wire type {wire}")
            count += 1
            if not 0 < number < 1 << 29 or count > MAX_FIELDS:
                raise ValueError(f"field {number}, the {count}th")
            self._fields.setdefault(number, []).append(value)

    @classmethod
    def none(cls) -> Self:
        """Return a message without fields."""
        return cls(b"")

    def text(self, number: int) -> str:
        """Return a string; the last one counts, "" when there is none."""
        return self._bytes(number).decode()

    def texts(self, number: int) -> list[str]:
        """Return all strings of a repeated field."""
        return [_as_bytes(value).decode() for value in self._fields.get(number, [])]

    def number(self, number: int) -> int:
        """Return a number; 0 when there is none."""
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} is no number")
        return value

    def message(self, number: int) -> Message:
        """Return a message within; one without fields when there is none."""
        return Message(self._bytes(number))

    def messages(self, number: int) -> list[Message]:
        """Return all messages of a repeated field."""
        return [Message(_as_bytes(value)) for value in self._fields.get(number, [])]

    def map(self, number: int) -> dict[str, str]:
        """Return a map<string, string>."""
        return {entry.text(1): entry.text(2) for entry in self.messages(number)}

    def _bytes(self, number: int) -> bytes:
        return _as_bytes(self._fields.get(number, [b""])[-1])


def field(number: int, value: str | bytes) -> bytes:
    """Return a string or message field as bytes."""
    data = value.encode() if isinstance(value, str) else value
    return _encode(number << 3 | _LENGTH) + _encode(len(data)) + data


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without end")


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
