"""What `inspect` is asked about: an image by digest or name, a container, or a pod."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from stella_cli.inspection.sightings import Line
from stella_shared.errors import UsageError

_IMAGE: Final = re.compile(r"sha256:([0-9a-f]{8,64})")
_CONTAINER: Final = re.compile(r"(?:(docker|containerd|cri-o|podman)://)?([0-9a-f]{8,64})")
_UNKNOWN: Final = re.compile(r"unknown:[0-9]{1,20}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,255}")
_RUNTIMES: Final = ("docker", "containerd", "cri-o", "podman")


class Subject(msgspec.Struct, frozen=True):
    """Who is asked about.

    One of `needles` stands in each of its lines; a few other lines may hold one too (a label is free text), so
    `is_of` has the last word.
    """

    kind: Literal["image", "container", "name"]
    asked: str
    needles: tuple[bytes, ...]

    def is_of(self, line: Line) -> bool:
        """Return whether a line is of the subject."""
        match self.kind:
            case "image":
                digests = (name.rpartition("@")[2] for name in line.image_repo_digests)
                return any(digest.startswith(self.asked) for digest in (line.image_digest, *digests))
            case "container":
                runtime, _, identity = line.container_id.rpartition("://")
                return line.container_id.startswith(self.asked) or (bool(runtime) and identity.startswith(self.asked))
            case "name":
                return any(name.startswith(self.asked) for name in (line.image_name, line.pod) if name)


def parse(text: str) -> Subject:
    """Return the subject that `text` names.  Raises `UsageError` for what names none."""
    asked = text.strip()
    lowered = asked.lower()
    if match := _IMAGE.fullmatch(lowered):
        # By the digest that the runtime tells, and by those that registries know the image under.
        return Subject("image", lowered, (f'"image_digest":"{lowered}'.encode(), f"@sha256:{match[1]}".encode()))
    if match := _CONTAINER.fullmatch(lowered):
        runtimes = (match[1],) if match[1] else _RUNTIMES
        return Subject(
            "container", lowered, tuple(f'"container_id":"{runtime}://{match[2]}'.encode() for runtime in runtimes)
        )
    if _UNKNOWN.fullmatch(lowered):
        return Subject("container", lowered, (f'"container_id":"{lowered}"'.encode(),))
    if _NAME.fullmatch(asked) and not lowered.startswith("sha256"):
        return Subject("name", asked, tuple(f'"{member}":"{asked}'.encode() for member in ("image_name", "name")))
    raise UsageError(
        f"{text!r} names no image and no container",
        hint="an image digest (sha256:…), a container id (docker://…, or its first 8 digits and more), or the "
        "beginning of an image's or a pod's name",
    )
