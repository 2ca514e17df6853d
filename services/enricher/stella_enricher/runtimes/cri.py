"""The Container Runtime Interface (runtime.v1): Kubernetes' containers on containerd and CRI-O.

Numbers of fields from Kubernetes' cri-api, pkg/apis/runtime/v1/api.proto.  Not every runtime streams events
in CRI, so the list is taken once a second where nothing else tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Final

from stella_enricher.runtimes.facts import (
    CONTAINER_ID,
    DIGEST,
    Change,
    Facts,
    Listed,
    Pod,
    Refusal,
    digest_text,
    is_digest,
    labels_of,
    name_text,
    pod_of,
    repo_digests_of,
)
from stella_enricher.runtimes.protobuf import Message, field
from stella_enricher.runtimes.sockets import CALL_TIMEOUT_SECONDS, MAX_LIST_BYTES, GrpcSocket

_RUNTIME: Final = "/runtime.v1.RuntimeService"
_IMAGE: Final = "/runtime.v1.ImageService"
_EXITED: Final = 2


class CriApi:
    """A `Runtime` by CRI.  `serves` are the runtimes that may stand behind the socket; the first names its own.

    `watched` says that another API of the same socket streams its changes.
    """

    api: str = "cri"
    streams: bool = False

    def __init__(
        self,
        socket: str,
        *,
        serves: tuple[str, ...] = ("cri-o", "containerd"),
        watched: bool = False,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        self.socket = socket
        self.serves = frozenset(serves)
        self.watch_seconds = 30.0 if watched else 1.0
        self._runtime = serves[0] if len(serves) == 1 else ""
        self._grpc = GrpcSocket(socket, timeout_seconds=timeout_seconds)

    async def facts_of(self, container_id: str) -> Facts:
        """Return what is known of the container: two or three calls."""
        # ListContainersRequest{filter=1}; ContainerFilter{id=1}
        answer = await self._grpc.call(f"{_RUNTIME}/ListContainers", field(1, field(1, container_id)))
        with _decoding():
            container = _only(Message(answer).messages(1), container_id)
            if container is None:
                return await self._sandbox(container_id)
            # Container{id=1, pod_sandbox_id=2, metadata=3, image=4, image_ref=5, map labels=8}
            # ContainerMetadata{name=1}; ImageSpec{image=1, user_specified_image=18}
            labels, name = labels_of(container.map(8)), name_text(container.message(3).text(1))
            spec, reference, sandbox = container.message(4), name_text(container.text(5)), container.text(2)
            asked = name_text(spec.text(18) or spec.text(1))
        digest, tags, repo_digests = await self._image(reference or asked)
        pod = pod_of(labels) or await self._pod(sandbox)
        return Facts(
            digest=digest,
            digest_kind="config" if digest else "",
            image=tags[0] if tags and is_digest(asked) else asked,
            repo_digests=repo_digests,
            labels=labels,
            pod=Pod(pod.namespace, pod.name, pod.container or name) if pod is not None else None,
            name=name,
            runtime=self._runtime,
            reason="" if digest else "no_image",
        )

    async def containers(self) -> list[Listed]:
        """Return all containers."""
        answer = await self._grpc.call(f"{_RUNTIME}/ListContainers", max_bytes=MAX_LIST_BYTES)
        with _decoding():
            # Container{id=1, state=6}
            listed = [Listed(c.text(1), c.number(6) != _EXITED) for c in Message(answer).messages(1)]
        return [c for c in listed if CONTAINER_ID.fullmatch(c.id)]

    async def changes(self) -> AsyncGenerator[Change, None]:
        """End at once: the list serves."""
        return
        yield  # what makes it a generator

    async def close(self) -> None:
        """Close the connections."""
        await self._grpc.close()

    async def _image(self, reference: str) -> tuple[str, list[str], tuple[str, ...]]:
        """Return the config digest, tags and repository digests of an image; ("", [], ()) when it is gone."""
        # ImageStatusRequest{image=1}; ImageStatusResponse{image=1}; Image{id=1, repo_tags=2, repo_digests=3}
        answer = await self._grpc.call(f"{_IMAGE}/ImageStatus", field(1, field(1, reference)))
        with _decoding():
            image = Message(answer).message(1)
            found = image.text(1)
            if not found:
                # Removed under its container; what the container refers to may be the digest itself.
                return (reference if DIGEST.fullmatch(reference) else ""), [], ()
            # CRI-O leaves the algorithm out.
            digest = digest_text(found if found.startswith("sha256:") else f"sha256:{found}")
            return digest, [name_text(tag) for tag in image.texts(2)[:1]], repo_digests_of(image.texts(3))

    async def _pod(self, sandbox_id: str) -> Pod | None:
        # ListPodSandboxRequest{filter=1}; PodSandboxFilter{id=1}; PodSandbox{id=1, metadata=2}
        # PodSandboxMetadata{name=1, namespace=3}
        answer = await self._grpc.call(f"{_RUNTIME}/ListPodSandbox", field(1, field(1, sandbox_id)))
        with _decoding():
            sandbox = _only(Message(answer).messages(1), sandbox_id)
            if sandbox is None:
                return None
            said = sandbox.message(2)
            return Pod(name_text(said.text(3)), name_text(said.text(1)))

    async def _sandbox(self, container_id: str) -> Facts:
        """Return the pod whose sandbox this id is: its own container has no image that anybody chose."""
        pod = await self._pod(container_id)
        if pod is None:
            raise Refusal("container_not_found")
        return Facts(pod=pod, runtime=self._runtime, reason="pod_sandbox")


def _only(entries: list[Message], wanted: str) -> Message | None:
    """Return the entry with this id.  A filter matches prefixes too; an answer to another question is nonsense."""
    found = [entry for entry in entries if entry.text(1) == wanted]
    if entries and not found:
        raise Refusal("runtime_nonsense")
    return found[0] if found else None


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise Refusal("runtime_nonsense") from None
