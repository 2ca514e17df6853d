"""Which containers are targets: by id, or by what their runtime says of them.

    3f0b…           an id of 12 to 64 hex digits; `docker://` may stand before
    name:<glob>     the container's name, or its pod's or its name in the pod
    image:<glob>    the image's name as the container was made with it
    label:<key>=<glob>   a label; without `=` it has to be there

`*` stands for any text, `?` for one character.  The enricher, which may ask the runtimes, resolves what is no id
and says which containers match, on `stella.ctl.<node>.targets`; the collector watches their cgroups.  The `image` of
`signals.probes.functions` goes the same way, as `image:<glob>`; its containers become no targets by that.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from stella_shared.errors import BrokenPromise

#: Containers of all selectors together; more are not watched, and `truncated` says so.
MAX_CONTAINERS: Final = 1024
MAX_GLOB: Final = 256
PUBLISH_SECONDS: Final = 1.0
#: A set that was not repeated for so long is old: what it names is kept, and others may replace it.
STALE_SECONDS: Final = 10.0

_KINDS: Final = ("name", "image", "label")
_Id = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Selector(msgspec.Struct, frozen=True):
    """A parsed selector: `key` is the label's, `glob` "" when any value will do."""

    text: str
    kind: Literal["name", "image", "label"]
    pattern: re.Pattern[str]
    key: str = ""


class TargetSet(msgspec.Struct, frozen=True):
    """Which containers match each selector now, as one enricher knows it.

    `partial`: a runtime has not told its containers yet, so what is missing here may be there.
    `truncated`: there are more than may be told.
    """

    node: str
    instance: str
    selectors: dict[str, list[_Id]]
    partial: bool = False
    truncated: bool = False


def is_selector(text: str) -> bool:
    """Say whether a target is meant as a selector."""
    return text.partition(":")[0] in _KINDS and "://" not in text


def parse(text: str) -> Selector:
    """Return a selector.  Raises `ValueError` saying what is wrong with it."""
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ValueError("a selector begins with name:, image: or label:")
    key, equals, glob = "", "", rest
    if kind == "label":
        key, equals, glob = rest.partition("=")
        if not key:
            raise ValueError("label: needs a key, as in label:com.example.team=web*")
        if any(c in key for c in "*?["):
            raise ValueError("a label's key has no wildcard")
    if kind != "label" or equals:
        if not glob:
            raise ValueError(f"{kind}: needs a pattern, as in {kind}:web*")
    else:
        glob = "*"
    if len(glob) > MAX_GLOB or not text.isprintable():
        raise ValueError(f"a pattern is printable, and has {MAX_GLOB} characters at the most")
    return Selector(text, kind, re.compile(fnmatch.translate(glob)), key)  # type: ignore[arg-type]


def of_image(glob: str) -> str:
    """Return the selector of containers whose image's name a glob matches."""
    return f"image:{glob}"


def selectors(targets: Iterable[str]) -> list[Selector]:
    """Return the selectors among `filters.target_containers`."""
    return [parse(text) for text in targets if is_selector(text)]


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(TargetSet)


def encode_target_set(targets: TargetSet) -> bytes:
    """Return a set for the bus."""
    return _encoder.encode(targets)


def decode_target_set(data: bytes) -> TargetSet:
    """Return a set from the bus.  Raises `BrokenPromise` for what is none, or holds more than it may."""
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BrokenPromise(f"a set of targets: {e}") from None
    if sum(len(ids) for ids in found.selectors.values()) > MAX_CONTAINERS:
        raise BrokenPromise(f"a set of targets holds more than {MAX_CONTAINERS} containers")
    return found
