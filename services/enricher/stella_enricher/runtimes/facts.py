"""What a runtime says of a container, and how far it is believed.  Pure.

A runtime may be another's software, another version, or an impostor on a socket: what it says is taken
where it has the right form and size, and otherwise it is nonsense.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

MAX_NAME_LENGTH: Final = 512
MAX_REPO_DIGESTS: Final = 8
#: Labels of a container that are looked at; and those that go into a line, each value so long at the most.
MAX_LABELS: Final = 256
MAX_CHOSEN_LABELS: Final = 16
MAX_LABEL_KEY: Final = 256
MAX_LABEL_VALUE: Final = 256

CONTAINER_ID: Final = re.compile(r"[0-9a-f]{64}")
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_REPO_DIGEST = re.compile(r"[!-~]{1,255}@(sha256:[0-9a-f]{64})")

#: Reasons that say the socket itself is not well; they start the back-off.
SOCKET_REASONS: Final = frozenset(
    {"no_runtime_socket", "runtime_denied", "runtime_timeout", "runtime_error", "runtime_nonsense"}
)
#: The runtime has spoken: these are not asked about again.
FINAL_REASONS: Final = frozenset({"", "container_not_found", "not_a_container_id", "no_image", "pod_sandbox"})


class Pod(msgspec.Struct, frozen=True):
    """Where Kubernetes put a container; `container` is its name in the pod, "" for the pod's own sandbox."""

    namespace: str
    name: str
    container: str = ""


class Facts(msgspec.Struct, frozen=True):
    """What a runtime says about a container; without a digest `reason` says why.

    `digest_kind` is `config` or `manifest`; the digest of an image index counts as a manifest's.
    `repo_digests` are `name@sha256:…`, the names under which a registry knows the image.  `runtime` is
    whose container it is, `teller` who said so.  `name` is the container's own.  `selected` are the selectors
    that it matches.  `provisional`: another API of the same socket will know better in a moment.
    """

    digest: str = ""
    digest_kind: str = ""
    image: str = ""
    repo_digests: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    pod: Pod | None = None
    name: str = ""
    runtime: str = ""
    teller: str = ""
    selected: tuple[str, ...] = ()
    provisional: bool = False
    reason: str = ""


class Listed(msgspec.Struct, frozen=True):
    """A container in a runtime's list."""

    id: str
    running: bool = True


class Change(msgspec.Struct, frozen=True):
    """A container came to be or started (`here`), was renamed (`altered`), or is no more (`gone`)."""

    kind: Literal["here", "altered", "gone"]
    id: str


class Refusal(Exception):
    """Carries a reason from a runtime's module to its contact; never leaves this package."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Runtime(Protocol):
    """One API on one socket.  Every method raises `Refusal` and nothing else, and is bounded in time and size.

    `serves` are the runtimes whose containers it may know.  `streams` says whether `changes` is worth
    following; `watch_seconds` is how often the list is taken beside it.
    """

    api: str
    socket: str
    serves: frozenset[str]
    streams: bool
    watch_seconds: float

    async def facts_of(self, container_id: str) -> Facts:
        """Return what is known of the container with this id (64 hex)."""

    async def containers(self) -> list[Listed]:
        """Return the containers there are."""

    def changes(self) -> AsyncGenerator[Change, None]:
        """Yield what happens to containers from now on."""

    async def close(self) -> None:
        """Give the connections back."""


def name_text(text: str) -> str:
    """Return a name as it came.  Raises `Refusal` for one that no name is: too long, or not printable."""
    if len(text) > MAX_NAME_LENGTH or not text.isprintable():
        raise Refusal("runtime_nonsense")
    return text


def digest_text(text: str) -> str:
    """Return a digest.  Raises `Refusal` for anything else."""
    if not DIGEST.fullmatch(text):
        raise Refusal("runtime_nonsense")
    return text


def is_digest(name: str) -> bool:
    """Say whether a name of an image is its digest, with or without the algorithm."""
    return bool(DIGEST.fullmatch(name) or CONTAINER_ID.fullmatch(name))


def repo_digests_of(listed: Iterable[str]) -> tuple[str, ...]:
    """Return the repository digests among `listed`, sorted, no more than are kept; others are left out."""
    return tuple(sorted(d for d in listed if _REPO_DIGEST.fullmatch(d))[:MAX_REPO_DIGESTS])


def labels_of(said: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Return the labels by key.  Raises `Refusal` where there are too many, or a key is endless."""
    labels = sorted((said or {}).items())
    if len(labels) > MAX_LABELS or any(len(key) > MAX_LABEL_KEY for key, _ in labels):
        raise Refusal("runtime_nonsense")
    return tuple(labels)


def chosen(labels: Iterable[tuple[str, str]], globs: Sequence[re.Pattern[str]]) -> tuple[tuple[str, str], ...]:
    """Return the labels whose key matches one of `globs`: the first 16 by key, long values cut and marked `…`.

    Keys are ASCII, as the runtimes' manuals want them: other keys are left out.
    """
    kept = [(key, value) for key, value in labels if key.isascii() and any(glob.fullmatch(key) for glob in globs)]
    return tuple((key, _cut(value)) for key, value in kept[:MAX_CHOSEN_LABELS])


def pod_of(labels: Iterable[tuple[str, str]]) -> Pod | None:
    """Return the pod that the kubelet's own labels name."""
    said = dict(labels)
    namespace, name = said.get("io.kubernetes.pod.namespace", ""), said.get("io.kubernetes.pod.name", "")
    if not namespace or not name:
        return None
    return Pod(name_text(namespace), name_text(name), name_text(said.get("io.kubernetes.container.name", "")))


def _cut(value: str) -> str:
    return value if len(value) <= MAX_LABEL_VALUE else value[: MAX_LABEL_VALUE - 1] + "…"
