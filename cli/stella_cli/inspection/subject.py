"""What `inspect` is asked about: an image digest, a container, or a container's name."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from stella_shared.errors import UsageError

_IMAGE: Final = re.compile(r"sha256:([0-9a-f]{8,64})")
_CONTAINER: Final = re.compile(r"(?:(docker|containerd|cri-o|podman)://)?([0-9a-f]{8,64})")
_UNKNOWN: Final = re.compile(r"unknown:[0-9]{1,20}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_RUNTIMES: Final = (b"docker", b"containerd", b"cri-o", b"podman")
_ID_DIGITS: Final = 64


class Subject(msgspec.Struct, frozen=True):
    """Who is asked about.  `needles` are the bytes of which one stands in each of its lines, and in no other.

    They begin with a member's name and `":"`, which no text inside a line can hold: its quotes are escaped.
    """

    kind: Literal["image", "container", "container_name"]
    asked: str
    needles: tuple[bytes, ...]

    @property
    def whole(self) -> bool:
        """Whether the digest or id was given in full."""
        return len(self.asked.rpartition(":")[2].lstrip("/")) == _ID_DIGITS or self.asked.startswith("unknown:")


def parse(text: str) -> Subject:
    """Return the subject that `text` names.  Raises `UsageError` for what names none."""
    lowered = text.strip().lower()
    if match := _IMAGE.fullmatch(lowered):
        return Subject("image", lowered, (_needle(b"image_digest", f"sha256:{match[1]}", match[1]),))
    if match := _CONTAINER.fullmatch(lowered):
        runtimes = (match[1].encode(),) if match[1] else _RUNTIMES
        ids = [_needle(b"container_id", f"{runtime.decode()}://{match[2]}", match[2]) for runtime in runtimes]
        return Subject("container", lowered, tuple(ids))
    if _UNKNOWN.fullmatch(lowered):
        return Subject("container", lowered, (b'"container_id":"' + lowered.encode() + b'"',))
    if _NAME.fullmatch(text.strip()) and not lowered.startswith("sha256"):
        return Subject("container_name", text.strip(), (b'"container_name":"' + text.strip().encode(),))
    raise UsageError(
        f"{text!r} names no image and no container",
        hint="an image digest (sha256:…), a container id (docker://…, or its first 8 digits and more), or the "
        "beginning of a container's name",
    )


def _needle(member: bytes, value: str, digits: str) -> bytes:
    """Return what stands in a line; a whole value is closed by its quote, a beginning is not."""
    end = b'"' if len(digits) == _ID_DIGITS else b""
    return b'"' + member + b'":"' + value.encode() + end
