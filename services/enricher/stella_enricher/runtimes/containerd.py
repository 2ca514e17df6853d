"""containerd's own gRPC API: what `nerdctl` and `ctr` run, and Kubernetes' containers where CRI is off.

A container there has the name of its image, not its digest: the digest is what that name leads to when it is
asked for, and a name that was given to another image since leads to that one.

Numbers of fields from containerd's api/services/*/v1/*.proto and api/events/*.proto.  Docker's containers
stand there too, in the namespace `moby`, but without an image: they are Docker's to tell.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from typing import Final, Literal

from stella_enricher.runtimes.facts import (
    CONTAINER_ID,
    Change,
    Facts,
    Listed,
    Refusal,
    digest_text,
    labels_of,
    name_text,
    pod_of,
)
from stella_enricher.runtimes.protobuf import Message, field
from stella_enricher.runtimes.sockets import CALL_TIMEOUT_SECONDS, MAX_LIST_BYTES, GrpcSocket

_SERVICES: Final = "/containerd.services"
_DOCKERS_NAMESPACE: Final = "moby"
_KUBERNETES_NAMESPACE: Final = "k8s.io"
_MAX_NAMESPACES: Final = 64
_MAX_TOLD: Final = 1024
#: Label by which containerd's CRI tells a pod's own container from the others.
_KIND_LABEL: Final = "io.cri-containerd.kind"
_TOPICS: Final[dict[str, Literal["here", "altered", "gone"]]] = {
    "/containers/create": "here",
    "/tasks/create": "here",
    "/tasks/start": "here",
    "/containers/update": "altered",
    "/containers/delete": "gone",
}


class ContainerdApi:
    """A `Runtime` by containerd's own API.  Without `kubernetes` its word on the namespace `k8s.io` is provisional."""

    api: str = "containerd"
    streams: bool = True
    serves: frozenset[str] = frozenset({"containerd"})
    watch_seconds: float = 30.0

    def __init__(self, socket: str, *, kubernetes: bool = True, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        self.socket = socket
        self._provisional = "" if kubernetes else _KUBERNETES_NAMESPACE
        self._grpc = GrpcSocket(socket, timeout_seconds=timeout_seconds)
        # A stream keeps its connection; calls must not wait for its flow control.
        self._events = GrpcSocket(socket, timeout_seconds=timeout_seconds)
        self._namespaces: list[str] = []
        #: Where events say that containers are, the newest of them.
        self._told: OrderedDict[str, str] = OrderedDict()

    async def facts_of(self, container_id: str) -> Facts:
        """Return what is known of the container: one call for each namespace up to its own, and one for the image."""
        told = self._told.get(container_id)
        known = sorted(self._namespaces, key=lambda namespace: namespace != told)
        facts = await self._found_in(known, container_id)
        if facts is None:
            # The namespace may be newer than our list of them.
            facts = await self._found_in([n for n in await self._list_namespaces() if n not in known], container_id)
        if facts is None:
            raise Refusal("container_not_found")
        return facts

    async def containers(self) -> list[Listed]:
        """Return the containers that run."""
        listed = []
        for namespace in await self._list_namespaces():
            # ListTasksResponse{repeated Process tasks=1}; Process{container_id=1, id=2}
            answer = await self._grpc.call(
                f"{_SERVICES}.tasks.v1.Tasks/List", namespace=namespace, max_bytes=MAX_LIST_BYTES
            )
            with _decoding():
                ids = [task.text(1) or task.text(2) for task in Message(answer).messages(1)]
            listed += [Listed(container_id) for container_id in ids if CONTAINER_ID.fullmatch(container_id)]
        return listed

    async def changes(self) -> AsyncGenerator[Change, None]:
        """Yield creations, starts, updates and removals."""
        # SubscribeRequest{repeated string filters=1}
        wanted = b"".join(field(1, f'topic=="{topic}",namespace!={_DOCKERS_NAMESPACE}') for topic in _TOPICS)
        stream = self._events.stream(f"{_SERVICES}.events.v1.Events/Subscribe", wanted)
        async with contextlib.aclosing(stream) as messages:
            async for message in messages:
                with _decoding():
                    # Envelope{namespace=2, topic=3, event=4}; Any{value=2}; every event has the container's id at 1.
                    envelope = Message(message)
                    kind = _TOPICS.get(envelope.text(3))
                    container_id = envelope.message(4).message(2).text(1) if kind else ""
                    namespace = envelope.text(2)
                if kind and CONTAINER_ID.fullmatch(container_id):
                    self._told[container_id] = namespace
                    if len(self._told) > _MAX_TOLD:
                        self._told.popitem(last=False)
                    yield Change(kind, container_id)

    async def close(self) -> None:
        """Close the connections."""
        await self._grpc.close()
        await self._events.close()

    async def _list_namespaces(self) -> list[str]:
        # ListNamespacesResponse{repeated Namespace namespaces=1}; Namespace{name=1}
        answer = await self._grpc.call(f"{_SERVICES}.namespaces.v1.Namespaces/List")
        with _decoding():
            names = [name_text(entry.text(1)) for entry in Message(answer).messages(1)]
        if len(names) > _MAX_NAMESPACES or not all(name.isascii() for name in names):
            raise Refusal("runtime_nonsense")
        self._namespaces = [name for name in names if name != _DOCKERS_NAMESPACE]
        return self._namespaces

    async def _found_in(self, namespaces: list[str], container_id: str) -> Facts | None:
        for namespace in namespaces:
            try:
                # GetContainerRequest{id=1}
                answer = await self._grpc.call(
                    f"{_SERVICES}.containers.v1.Containers/Get", field(1, container_id), namespace=namespace
                )
            except Refusal as refusal:
                if refusal.reason == "container_not_found":
                    continue
                raise
            return await self._facts(namespace, container_id, answer)
        return None

    async def _facts(self, namespace: str, container_id: str, answer: bytes) -> Facts:
        with _decoding():
            # GetContainerResponse{container=1}; Container{id=1, map labels=2, image=3}
            container = Message(answer).message(1)
            labels, image = labels_of(container.map(2)), name_text(container.text(3))
            found = container.text(1)
        if found != container_id:
            raise Refusal("runtime_nonsense")
        pod = pod_of(labels) if namespace == _KUBERNETES_NAMESPACE else None
        if pod is not None and dict(labels).get(_KIND_LABEL) == "sandbox":
            return Facts(labels=labels, pod=pod, runtime="containerd", reason="pod_sandbox")
        digest = await self._digest_of(namespace, image) if image else ""
        return Facts(
            digest=digest,
            digest_kind="manifest" if digest else "",
            image=image,
            labels=labels,
            pod=pod,
            name=name_text(dict(labels).get("nerdctl/name", "")),
            runtime="containerd",
            provisional=namespace == self._provisional,
            reason="" if digest else "no_image",
        )

    async def _digest_of(self, namespace: str, image: str) -> str:
        """Return the digest that an image's name leads to; "" when the name is gone."""
        try:
            # GetImageRequest{name=1}
            answer = await self._grpc.call(f"{_SERVICES}.images.v1.Images/Get", field(1, image), namespace=namespace)
        except Refusal as refusal:
            if refusal.reason == "container_not_found":
                return ""
            raise
        with _decoding():
            # GetImageResponse{image=1}; Image{target=3}; Descriptor{digest=2}
            return digest_text(Message(answer).message(1).message(3).text(2))


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise Refusal("runtime_nonsense") from None
