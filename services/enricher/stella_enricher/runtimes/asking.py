"""Questions to the runtimes and their answers: known at once from memory, or asked beside.

    facts(container) ──known──▶ answer                    streams and lists of the runtimes
            │ not yet: `pending`                                      │ a container came
            └──▶ queue ──▶ the runtime of its name, then others ◀─────┘
                               │
                               └──▶ memory, the set of selected containers, whoever waits in `settle`

A container is mostly asked about before its first process runs, for the runtime tells of its creation.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import anyio
import msgspec
from anyio.abc import TaskGroup

from stella_enricher.container_names import ContainerName
from stella_enricher.remembering import Memory, text_bytes
from stella_enricher.runtimes.contact import Contact
from stella_enricher.runtimes.facts import FINAL_REASONS, Change, Facts, Listed, Runtime, chosen
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection

LOOK_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 5.0
TICK_SECONDS: Final = 1.0
#: A runtime may start a container before it knows it: so often it is asked, after 5 ms, 10 ms and so on.
NOT_FOUND_TRIES: Final = 8
NOT_FOUND_SECONDS: Final = 0.005
#: Containers that wait to be asked about; what a runtime tells of beyond it is asked about when it is seen.
MAX_WAITING: Final = 8192

_NO_SOCKET: Final = Facts(reason="no_runtime_socket")


class _Question:
    """A container about which nothing is known yet."""

    __slots__ = ("asked_for", "name", "reason", "retry_at", "tries")

    def __init__(self, name: ContainerName) -> None:
        self.name = name
        #: `pending` until a runtime has answered once, then its last excuse.
        self.reason = "pending"
        self.retry_at = float("inf")
        self.asked_for = 0.0
        self.tries = 0


class Asking:
    """Knows what the runtimes say.  `run` must be running; everything belongs to one event loop."""

    def __init__(
        self,
        finder: SocketFinder,
        *,
        labels: Sequence[str] = (),
        selection: Selection | None = None,
        max_bytes: int,
        ttl_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._finder = finder
        self._labels = [re.compile(fnmatch.translate(glob)) for glob in labels]
        self.selection = selection or Selection([])
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._contacts: list[Contact] = []
        self._known: Memory[str, Facts] = Memory(_size_of, max_bytes=max_bytes, ttl_seconds=ttl_seconds, clock=clock)
        #: By container id.  A container is known or asked about, not both.
        self._questions: dict[str, _Question] = {}
        self._wanted: deque[str] = deque()
        self._bell = anyio.Event()
        self._answered = anyio.Event()
        #: Runtimes that were waited for in vain.
        self._slow: set[str] = set()
        self._refused = 0
        self._looked = False
        self._ready = False
        self._tasks: TaskGroup | None = None

    def facts(self, name: ContainerName) -> Facts:
        """Return what is known now; with reason `pending`, or a runtime's excuse, it is being asked about."""
        known = self._known.get(name.id)
        if known is not None:
            return known
        if not self._contacts and self._looked:
            return _NO_SOCKET
        question = self._questions.get(name.id)
        if question is None:
            question = self._ask(name)
        if question is None:
            return Facts(reason="pending")
        question.asked_for = self._clock()
        return Facts(reason=question.reason)

    async def settle(self, container_ids: Iterable[str], timeout_seconds: float) -> None:
        """Wait until the runtimes have answered about these containers, `timeout_seconds` at the most.

        Once it has waited for a runtime in vain it waits no more for that until it answers again: a hanging socket
        costs one such wait, not one per batch.
        """
        awaited = {
            i for i in container_ids if self._is_pending(i) and self._questions[i].name.runtime not in self._slow
        }
        if not awaited:
            return
        with anyio.move_on_after(timeout_seconds) as scope:
            while any(self._is_pending(i) for i in awaited):
                await self._answered.wait()
        if scope.cancelled_caught:
            self._slow |= {self._questions[i].name.runtime for i in awaited if self._is_pending(i)}

    async def run(self) -> None:
        """Find runtimes, follow them, ask and ask again, forget, until cancelled."""
        look_at = 0.0
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                tasks.start_soon(self._fetch, tasks)
                while True:
                    if self._clock() >= look_at:
                        look_at = self._clock() + LOOK_SECONDS
                        for contact in self._meet(self._finder.look()):
                            tasks.start_soon(self._watch, contact)
                    self._tick()
                    await anyio.sleep(TICK_SECONDS)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
                for contact in self._contacts:
                    await contact.close()

    @property
    def ready(self) -> bool:
        """Whether every runtime that was found has told its containers once, and they were asked about."""
        if not self._ready:
            listed = self._looked and all(contact.listed for contact in self._contacts)
            self._ready = listed and not any(q.reason == "pending" for q in self._questions.values())
        return self._ready

    def stats(self) -> dict[str, float]:
        """Return the memory's figures, and `asked` (containers without an answer), `refused` (the queue was full)."""
        return {**self._known.stats(), "asked": len(self._questions), "refused": self._refused}

    def reasons(self) -> dict[str, int]:
        """Return why containers have no image now, with how many."""
        counts: dict[str, int] = {}
        for question in self._questions.values():
            counts[question.reason] = counts.get(question.reason, 0) + 1
        return counts

    def status(self) -> list[dict[str, object]]:
        """Return how each runtime is."""
        return [contact.status() for contact in self._contacts]

    def _meet(self, runtimes: Iterable[Runtime]) -> list[Contact]:
        new = [Contact(runtime, clock=self._clock) for runtime in runtimes]
        self._contacts += new
        self._looked = True
        if new:
            # Who was said not to be known may be known to the new one.
            for question in self._questions.values():
                question.retry_at = min(question.retry_at, self._clock())
        return new

    async def _watch(self, contact: Contact) -> None:
        def on_list(listed: list[Listed], begun: float) -> None:
            for container in listed:
                if container.running or self.selection.wanted:
                    self._came(contact, container.id)
            self.selection.keep(contact.who, {container.id for container in listed}, begun)

        def on_change(change: Change) -> None:
            if change.kind == "gone":
                self.selection.gone(change.id)
                return
            if change.kind == "altered":
                self._known.drop(change.id)
            self._came(contact, change.id)

        await contact.watch(on_change, on_list)

    def _came(self, contact: Contact, container_id: str) -> None:
        """Have ready what is said of a container that exists."""
        known = self._known.keep(container_id)
        if known is not None:
            self.selection.consider(known.teller, container_id, known.selected, self._clock())
        elif container_id not in self._questions:
            self._ask(ContainerName(contact.usual, container_id, "assumed"))

    def _ask(self, name: ContainerName) -> _Question | None:
        if len(self._questions) >= MAX_WAITING:
            self._refused += 1
            return None
        question = self._questions[name.id] = _Question(name)
        question.asked_for = self._clock()
        self._want(name.id)
        return question

    def _want(self, container_id: str) -> None:
        self._wanted.append(container_id)
        self._bell.set()
        self._bell = anyio.Event()

    async def _want_later(self, container_id: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        self._want(container_id)

    def _is_pending(self, container_id: str) -> bool:
        question = self._questions.get(container_id)
        return question is not None and question.reason == "pending"

    async def _fetch(self, tasks: TaskGroup) -> None:
        # Each question by itself: those that wait for a runtime that hangs are in nobody's way.
        while True:
            while self._wanted:
                tasks.start_soon(self._answer, self._wanted.popleft())
            await self._bell.wait()

    async def _answer(self, container_id: str) -> None:
        question = self._questions.get(container_id)
        if question is None:
            return
        contact, facts, retry_seconds = await self._first_answer(question.name)
        if container_id not in self._questions:
            return  # Forgotten meanwhile.
        question.tries += 1
        early = facts.provisional or facts.reason == "container_not_found"
        if early and question.tries < NOT_FOUND_TRIES and self._tasks is not None:
            question.reason = "not_known_yet"
            self._tasks.start_soon(self._want_later, container_id, NOT_FOUND_SECONDS * 2.0 ** (question.tries - 1))
        elif facts.reason in FINAL_REASONS:
            selected = self.selection.matches(facts)
            facts = msgspec.structs.replace(
                facts,
                labels=chosen(facts.labels, self._labels),
                selected=selected,
                teller=contact.who if contact is not None else "",
            )
            self._known.put(container_id, facts)
            del self._questions[container_id]
            self._slow.discard(question.name.runtime)
            self.selection.consider(facts.teller, container_id, selected, self._clock())
        else:
            question.reason = facts.reason
            question.retry_at = self._clock() + max(RETRY_SECONDS, retry_seconds)
        self._answered.set()
        self._answered = anyio.Event()

    async def _first_answer(self, name: ContainerName) -> tuple[Contact | None, Facts, float]:
        """Ask the runtimes that may know it, the likeliest first; return who answered, and when to ask again.

        The others are asked too where the runtime is only assumed from the form of the cgroup's name.
        """
        own = [contact for contact in self._contacts if contact.serves(name.runtime)]
        others = [c for c in self._contacts if c not in own and c.answers] if name.basis == "assumed" else []
        excuse: Facts | None = None
        provisional: tuple[Contact, Facts, float] | None = None
        retry_seconds = 0.0
        for contact in [*own, *others]:
            facts = await contact.facts_of(name.id)
            if facts.reason in ("container_not_found", "not_a_container_id"):
                excuse = excuse or facts
            elif facts.provisional:
                provisional = (contact, facts, 0.0)
                if selected := self.selection.matches(facts):
                    # A target is to be watched from its first moment, whoever tells of it first.
                    self.selection.consider(contact.who, name.id, selected, self._clock())
            elif facts.reason in FINAL_REASONS:
                return contact, facts, 0.0
            elif not retry_seconds:
                # Somebody who cannot be asked may know it, whatever the others say.
                excuse, retry_seconds = facts, max(contact.retry_seconds, RETRY_SECONDS)
        return provisional or (None, excuse or _NO_SOCKET, retry_seconds)

    def _tick(self) -> None:
        self._known.tick()
        now = self._clock()
        for container_id, question in list(self._questions.items()):
            if now - question.asked_for > self._ttl_seconds:
                del self._questions[container_id]
            elif question.retry_at <= now:
                question.retry_at = float("inf")
                self._want(container_id)


def _size_of(container_id: str, facts: Facts) -> int:
    size = _FACTS_BYTES + text_bytes(container_id, facts.digest, facts.image, facts.name, *facts.repo_digests)
    size += sum(_TUPLE_BYTES + text_bytes(key, value) for key, value in facts.labels)
    if facts.pod is not None:
        size += _TUPLE_BYTES + text_bytes(facts.pod.namespace, facts.pod.name, facts.pod.container)
    return size


#: A `Facts` with its tuples, without their content; a pair of a label.
_FACTS_BYTES: Final = 280
_TUPLE_BYTES: Final = 72
