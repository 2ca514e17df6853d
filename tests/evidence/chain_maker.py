"""Makes real chains in a folder, with the signer's own store: keys, chunks, signatures, all as on a node."""

from __future__ import annotations

import itertools
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from stella_shared import clock, config
from stella_shared.evidence import canonical, dsse, merkle, records, statement
from stella_shared.evidence.compressed import Packed, frames_of, pack
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.names import DATA
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.store import Places, initialise, places, read_chain
from stella_shared.evidence.verify import verify_chain
from stella_shared.wire import HEAD_VERSION, Closing, LaneRow, PartHead
from stella_shared.wire import Ledger as BatchLedger
from stella_signer.chunks import ChunkStore
from stella_signer.signing import LocalKey
from stella_signer.steps import Settle

BOOT = "b0" * 16
RUN = "0123456789abcdef"
COVERAGE = canonical.dumps(
    {
        "collector_version": "0.1.0",
        "config_sha256": "c" * 64,
        "probes": [{"name": "sys_enter_openat", "attached": True}, {"name": "openssl_read", "attached": False}],
        "bpf_object_sha256": "d" * 64,
        "btf": {"source": "kernel", "sha256": "e" * 64},
        "kernel_release": "6.8.0",
        "arch": "x86_64",
    }
).decode()


class Clock:
    """A wall clock that moves one second a look."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1_700_000_000)

    def __call__(self) -> str:
        return clock.utc_text(next(self._ticks) * 10**9)


def line(node: str, lane: int, seq: int, run: str = RUN, boot: str = BOOT) -> bytes:
    """Return an evidence line with the fields that place it."""
    return (
        canonical.dumps(
            {"boot_id": boot, "comm": "sh", "event": {"type": "file_open"}, "lane": lane, "node": node, "run": run,
             "seq": seq}
        )
        + b"\n"
    )  # fmt: skip


class Source:
    """One run's batches, as a collector and an enricher would make them."""

    line = staticmethod(line)

    def __init__(self, node: str, run: str = RUN, boot: str = BOOT, since_ns: int = 1000) -> None:
        self.node, self.run, self.boot = node, run, boot
        self.number = 0
        self.at: dict[int, int] = {}
        self.now_ns = since_ns

    def batch(
        self,
        recorded: dict[int, int],
        *,
        filtered: int = 0,
        lost: int = 0,
        kernel_filtered: int = 0,
        coverage: str = "",
        final: bool = False,
        closings: list[Closing] | None = None,
    ) -> tuple[Settle, bytes]:
        """Return the next batch: `recorded` lines a lane, and `filtered` and `lost` numbers on the first lane."""
        rows, body = [], b""
        for i, (lane, count) in enumerate(recorded.items()):
            first = self.at.get(lane, 0)
            extra_filtered, extra_lost = (filtered, lost) if i == 0 else (0, 0)
            after = first + count + extra_filtered + extra_lost
            body += b"".join(self.line(self.node, lane, first + n, self.run, self.boot) for n in range(count))
            rows.append(LaneRow(lane, first, after, count, extra_filtered, extra_lost))
            self.at[lane] = after
        ledger = BatchLedger(
            self.now_ns,
            self.now_ns + 10,
            rows,
            {k: v for k, v in (("user_path", filtered), ("kernel_path", kernel_filtered)) if v},
            {"ring_full": lost} if lost else {},
        )
        self.now_ns += 10
        lines = sum(recorded.values())
        step = Settle(self.boot, self.run, self.number, lines, ledger, coverage, final, closings or [])
        self.number += 1
        return step, body


class Node:
    """A node's evidence and state in a folder."""

    def __init__(self, folder: Path, name: str = "node-a", disk: Disk | None = None) -> None:
        self.signals = config.load(None, {}, {"output_directory": str(folder / "evidence"), "node": name})
        self.name = name
        self.where: Places = places(self.signals)
        self.made = initialise(self.signals, disk)
        self.clock = Clock()

    @property
    def evidence(self) -> Path:
        return self.where.evidence

    @property
    def key(self) -> LocalKey:
        return LocalKey.load(self.where.state)

    def open(self, disk: Disk | None = None) -> ChunkStore:
        """Open the store as the signer does."""
        return ChunkStore.open(self.where, self.key, version="0.1.0", now=self.clock, disk=disk)

    def verify(self, **options: Any) -> ChainReport:
        """Verify the evidence as the command does on the node itself."""
        return verify_chain(self.evidence, **options)

    def codes(self, **options: Any) -> set[tuple[str, int | None]]:
        """Return the faults as (code, chunk)."""
        return {(fault.code, fault.chunk) for fault in self.verify(**options).faults}

    def file(self, index: int, kind: str) -> Path:
        return self.where.chunk(index, kind)

    def lines(self, index: int) -> bytes:
        """Return the lines of a closed chunk."""
        return b"".join(frames_of(self.file(index, DATA)))

    def put_lines(self, index: int, lines: bytes) -> None:
        """Replace the lines of a closed chunk."""
        self.file(index, DATA).write_bytes(pack(lines))


def small_chain(folder: Path, name: str = "node-a", run: str = RUN) -> Node:
    """Return a node with four signed chunks: genesis, two with events of every kind, one without any."""
    node = Node(folder, name)
    store = node.open()
    source = Source(name, run)
    store.commit(*one(source.batch({0: 3, 5: 2}, coverage=COVERAGE, kernel_filtered=7)))
    store.commit(*one(source.batch({0: 2}, filtered=2, lost=1)))
    store.close("size")
    store.commit(*one(source.batch({5: 4}, final=True)))
    store.close("size")
    store.close("age")
    store.release()
    return node


def packed(lines: bytes) -> Packed:
    """Return lines as the signer takes them from the bus."""
    return Packed.of(pack(lines))


def one(batch: tuple[Settle, bytes]) -> tuple[list[Any], list[Packed]]:
    """Return the arguments of `commit` for one batch."""
    return [batch[0]], [packed(batch[1])]


def resign(node: Node, index: int, data: bytes | None = None, *, file: bytes | None = None, **changes: Any) -> None:
    """Rewrite the newest chunk with other lines or another ledger, and sign that with the node's own key.

    `file` is what lies there in place of a frame of the lines.

    This is what a signer with a bug, or the holder of the key, could do.
    """
    ledger = canonical.loads(node.file(index, "ledger.json").read_bytes(), Ledger)
    if data is not None:
        file = pack(data) if file is None else file
        node.file(index, DATA).write_bytes(file)
        tree = merkle.Frontier()
        tree.add(merkle.leaves(data.split(b"\n")[:-1]))
        ledger = msgspec.structs.replace(
            ledger,
            bytes=len(data),
            lines=data.count(b"\n"),
            sha256=sha256(file).hexdigest(),
            merkle_root=tree.root().hex(),
        )
    ledger = msgspec.structs.replace(ledger, **changes)
    ledger_bytes = canonical.dumps(ledger)
    node.file(index, "ledger.json").write_bytes(ledger_bytes)
    before = dsse.open_envelope(node.file(index - 1, "dsse.json").read_bytes()).payload
    chain = read_chain(node.evidence)
    assert chain is not None
    context = statement.Context(
        chain.node,
        sha256((node.evidence / "chain.json").read_bytes()).hexdigest(),
        chain.predecessor,
        statement.Previous(index - 1, statement.decode(before).subject[0].digest["sha256"], sha256(before).hexdigest()),
        "0.1.0",
    )
    stated = statement.build(ledger, sha256(ledger_bytes).hexdigest(), context)
    put_statement(node, index, stated, ledger)


def put_statement(node: Node, index: int, stated: statement.Statement, ledger: Ledger) -> None:
    """Sign any statement as chunk `index`, and let the head tell of it."""
    payload = statement.encode(stated)
    node.file(index, "dsse.json").write_bytes(node.key.envelope(payload))
    head = records.head_of(ledger, sha256(payload).hexdigest(), node.key.key_id)
    node.where.head.write_bytes(canonical.dumps(head))


def parts_of(step: Settle, body: bytes, parts: int, node: str = "node-a") -> list[tuple[PartHead, bytes]]:
    """Cut a batch as an enricher would, one part an event type."""
    lines = body.splitlines(keepends=True)
    cut = [lines[i::parts] for i in range(parts)]
    return [
        (
            PartHead(
                HEAD_VERSION, node, step.boot_id, step.run, step.number, i, parts, len(mine),
                step.ledger if i == 0 else None, step.coverage if i == 0 else "", step.final and i == 0,
                step.closings if i == 0 else [],
            ),
            pack(b"".join(mine)),
        )
        for i, mine in enumerate(cut)
    ]  # fmt: skip
