"""The bus on a real NATS server: nothing doubled, nothing dropped, whatever the server does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import nats
import pytest
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from stella_collector.spool import Spool
from stella_shared import subjects
from stella_shared.bus import Bus
from stella_shared.errors import BrokenPromise, TryAgain
from stella_shared.wire import HEAD_VERSION, Beat, PartHead, decode_head, encode_head
from tests.shared.nats_kit import Server, serving

pytestmark = pytest.mark.anyio
RAW = subjects.raw("n")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


@pytest.fixture
async def bus(server: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(server.url, name="test") as connected:
        await connected.ensure_streams()
        yield connected


async def stored(bus: Bus, stream: str = subjects.RAW_STREAM) -> int:
    """Return how many messages a stream holds."""
    return int((await bus._js.stream_info(stream)).state.messages)


def pool(bus: Bus, **more: Any) -> Any:
    """Consume as an enricher does."""
    return bus.work(
        subjects.RAW_STREAM, subjects.RAW_DURABLE, filter_subject=subjects.RAW_SUBJECTS,
        max_ack_pending=more.pop("max_ack_pending", 512), **more,
    )  # fmt: skip


async def until(holds: Any, seconds: float = 15.0) -> None:
    """Wait until `holds()` is true."""
    with anyio.fail_after(seconds):
        while not holds():
            await anyio.sleep(0.02)


async def test_a_message_id_is_stored_once(bus: Bus) -> None:
    """Publishing again under the same id returns as if it were new, and stores nothing."""
    for _ in range(3):
        await bus.publish(RAW, b"x", msg_id="run.0")
    await bus.publish(RAW, b"y", msg_id="run.1")
    assert 2 == await stored(bus)


async def test_a_head_travels_whatever_it_says(bus: Bus) -> None:
    """A head of any text and of 60 KB (JetStream's limit is 64) arrives as it was sent, with id and delivery count."""
    head = PartHead(HEAD_VERSION, 'weiß "\u2028', "b", "r", 7, 0, 1, 3, coverage="ü" * 30_000)
    async with pool(bus) as work:
        await bus.publish(RAW, b"body", msg_id="a.7", head=encode_head(head))
        with anyio.fail_after(5):
            (message,) = await work.get(8, 0.0)
        assert (b"body", "a.7", 1, RAW) == (message.data, message.msg_id, message.deliveries, message.subject)
        assert head == decode_head(message.head)
        await message.ack()


async def test_a_message_over_the_limit_is_a_broken_promise(bus: Bus) -> None:
    """What no server will ever take is not something to try again."""
    with pytest.raises(BrokenPromise, match="max_payload"):
        await bus.publish(RAW, bytes(subjects.MAX_PAYLOAD_BYTES + 1), msg_id="big")


async def test_publishing_without_a_stream_says_try_again(server: Server) -> None:
    """Nobody has made the streams yet: the caller keeps the message."""
    async with Bus.connect(server.url, name="test") as bus:
        with pytest.raises(TryAgain):
            await bus.publish(RAW, b"x", msg_id="a", timeout_seconds=1)
        await bus.ensure_streams()
        await bus.publish(RAW, b"x", msg_id="a")
        assert 1 == await stored(bus)


async def test_no_server_is_told_in_time(tmp_path: Path) -> None:
    """Connecting to nothing ends after its patience, with a hint."""
    server = Server(tmp_path)
    with anyio.fail_after(10), pytest.raises(TryAgain, match="no NATS server answers"):
        async with Bus.connect(server.url, name="test", patience_seconds=0.5):
            pass


async def test_the_spool_survives_a_server_that_dies(server: Server, bus: Bus) -> None:
    """kill -9 of the server while batches are published: after its return each is stored exactly once."""
    done: list[int] = []
    spool = Spool(bus, RAW, 1 << 20)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(spool.run)
        for i in range(600):
            spool.put(f"run.{i}", b"%d" % i * 100, lambda i=i: done.append(i))  # type: ignore[misc]
            if i == 150:
                await until(lambda: len(done) > 50)
                server.kill()
            if i == 250:
                await until(lambda: spool.last_error)
                server.start()
        with anyio.fail_after(25):
            await spool.wait_empty()
        tasks.cancel_scope.cancel()
    assert list(range(600)) == sorted(done)
    assert (600, 0, "") == (spool.published, spool.bytes, spool.last_error)
    assert spool.retries > 0
    assert 600 == await stored(bus)


async def test_a_full_stream_is_waited_for(bus: Bus) -> None:
    """A full work queue refuses; nothing is dropped on either side, and room lets the rest through."""
    await bus._js.update_stream(StreamConfig(
        name=subjects.RAW_STREAM, subjects=[subjects.RAW_SUBJECTS], retention="workqueue", discard="new",  # type: ignore[arg-type]
        storage="file", max_bytes=20_000, duplicate_window=120,  # type: ignore[arg-type]
    ))  # fmt: skip
    spool = Spool(bus, RAW, 30_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(spool.run)
        for i in range(50):
            spool.put(f"run.{i}", bytes(1000))
        await until(lambda: "maximum bytes exceeded" in spool.last_error)
        assert spool.full
        assert await stored(bus) < 50
        seen = []
        async with pool(bus) as work:
            with anyio.fail_after(20):
                while len(seen) < 50:
                    for message in await work.get(64, 0.0):
                        seen.append(message.msg_id)
                        await message.ack()
        with anyio.fail_after(15):
            await spool.wait_empty()
        tasks.cancel_scope.cancel()
    assert sorted(f"run.{i}" for i in range(50)) == sorted(seen)
    assert "" == spool.last_error


async def test_two_workers_share_without_doubling(server: Server, bus: Bus) -> None:
    """Members of a pool get each message once between them; both get some."""
    shares: list[list[str]] = [[], []]

    async def member(share: list[str]) -> None:
        async with Bus.connect(server.url, name="member") as own, pool(own) as work:
            while True:
                for message in await work.get(8, 0.0):
                    share.append(message.msg_id)
                    await message.ack()

    async with anyio.create_task_group() as tasks:
        for share in shares:
            tasks.start_soon(member, share)
        await anyio.sleep(0.3)
        async with anyio.create_task_group() as publishers:
            for i in range(200):
                publishers.start_soon(lambda i=i: bus.publish(RAW, b"x", msg_id=f"run.{i}"))  # type: ignore[misc]
        await until(lambda: sum(map(len, shares)) >= 200)
        await anyio.sleep(0.2)
        tasks.cancel_scope.cancel()
    assert all(shares)
    assert sorted(f"run.{i}" for i in range(200)) == sorted(shares[0] + shares[1])
    assert 0 == await stored(bus)


async def test_a_worker_goes_on_after_restart_and_deletion(server: Server, bus: Bus) -> None:
    """The server dies, then the consumer is deleted: messages keep coming without the worker's doing."""
    async with pool(bus) as work:
        for step in range(3):
            if step == 1:
                server.kill()
                server.start()
                await until(lambda: bus.connected)
            if step == 2:
                await bus._js.delete_consumer(subjects.RAW_STREAM, subjects.RAW_DURABLE)
            with anyio.fail_after(15):
                while True:
                    try:
                        await bus.publish(RAW, b"x", msg_id=f"run.{step}", timeout_seconds=1)
                        break
                    except TryAgain:
                        await anyio.sleep(0.1)
                got = ""
                while got != f"run.{step}":  # an ack that died with server or consumer brings its message again
                    for message in await work.get(1, 0.0):
                        got = message.msg_id
                        await message.ack()


async def test_what_is_not_acked_comes_again(bus: Bus) -> None:
    """nak asks again at once, with a count; term never; pending tells what is out."""
    async with pool(bus) as work:
        await bus.publish(RAW, b"x", msg_id="a")
        with anyio.fail_after(5):
            (first,) = await work.get(8, 0.0)
            assert (0, 1) == await work.pending()
            await first.nak()
            (second,) = await work.get(8, 0.0)
            assert (2, "a") == (second.deliveries, second.msg_id)
            await second.nak(0.2)
            (third,) = await work.get(8, 0.0)
            assert 3 == third.deliveries
            await third.term()
            while await work.pending() != (0, 0):
                await anyio.sleep(0.02)
        assert 0 == await stored(bus)


async def test_flow_is_bounded_by_acks(bus: Bus) -> None:
    """No more than `max_ack_pending` messages are ever out."""
    for i in range(10):
        await bus.publish(RAW, b"x", msg_id=f"run.{i}")
    async with pool(bus, max_ack_pending=4) as work:
        await until(lambda: work.waiting == 4)
        await anyio.sleep(0.2)
        assert 4 == work.waiting
        with anyio.fail_after(5):
            taken = await work.get(3, 0.0)
        assert 3 == len(taken)
        assert (6, 4) == await work.pending()


async def test_a_worker_that_hangs_holds_what_it_asked_for_and_no_more(bus: Bus) -> None:
    """Who fetches nothing is sent `ahead` messages; all others go to the worker beside it, none of them later."""
    async with pool(bus, ahead=4) as hung, pool(bus, ahead=4) as busy:
        await until(lambda: hung._asked and busy._asked)
        for i in range(40):
            await bus.publish(RAW, b"x", msg_id=f"run.{i}")
        seen = []
        with anyio.fail_after(5):
            while len(seen) < 36:
                for message in await busy.get(4, 0.0):
                    seen.append(message.msg_id)
                    await message.ack()
        assert (4, 0) == (hung.waiting, busy.waiting)
        assert 36 == len(set(seen))
        while await busy.pending() != (0, 4):
            await anyio.sleep(0.02)


async def test_a_consumer_of_an_older_release_is_made_anew(bus: Bus) -> None:
    """A durable whose messages were pushed becomes one that is asked; what it had not acked is there."""
    config = ConsumerConfig(
        durable_name=subjects.RAW_DURABLE,
        deliver_subject="stella.deliver.enrichers",
        deliver_group=subjects.RAW_DURABLE,
        filter_subject=subjects.RAW_SUBJECTS,
        ack_policy=AckPolicy.EXPLICIT,
    )
    await bus._js.add_consumer(subjects.RAW_STREAM, config=config)
    await bus.publish(RAW, b"x", msg_id="run.0")
    async with pool(bus) as work:
        with anyio.fail_after(5):
            (message,) = await work.get(8, 0.0)
        assert "run.0" == message.msg_id


@pytest.mark.parametrize("before", [0, 3, 30])
async def test_a_consumer_that_is_ahead_of_its_stream_is_made_anew(server: Server, bus: Bus, before: int) -> None:
    """As a power cut leaves it: the stream lost what the consumer had seen.  All new messages are given out.

    Also those that came before the worker, be they fewer or more than the consumer had seen.
    """
    async with pool(bus) as work:
        for i in range(20):
            await bus.publish(RAW, b"x", msg_id=f"run.{i}")
        with anyio.fail_after(10):
            while await work.pending() != (0, 0):
                for message in await work.get(64, 0.0) if work.waiting else []:
                    await message.ack()
    obs = f"obs/{subjects.RAW_DURABLE}"
    await until(lambda: any(b"\x14\x14" in p.read_bytes() for p in server.stored(subjects.RAW_STREAM, obs)))
    server.kill()
    await until(lambda: not bus.connected)
    for path in server.stored(subjects.RAW_STREAM, "msgs"):
        path.unlink()
    for path in server.stored(subjects.RAW_STREAM, obs):
        if path.name.startswith("meta."):
            path.write_bytes(b"")
    server.start()
    await until(lambda: bus.connected)
    for i in range(before):
        await bus.publish(RAW, b"x", msg_id=f"later.{i}")
    async with pool(bus) as work:
        await bus.publish(RAW, b"x", msg_id="last")
        seen = []
        with anyio.fail_after(10):
            while len(seen) < before + 1:
                seen += [message.msg_id for message in await work.get(64, 0.0)]
        assert {*(f"later.{i}" for i in range(before)), "last"} == set(seen)


async def test_the_lag_is_the_unseen_share_of_the_stream(bus: Bus) -> None:
    """0 without a consumer; then about the bytes it has not acked; 0 when it is through."""
    subject = subjects.enriched("n", "file_open")
    assert 0 == (await bus.lag(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)).bytes
    for i in range(20):
        await bus.publish(subject, bytes(10_000), msg_id=f"e.{i}")
    async with bus.work(
        subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE, filter_subject=subjects.ENRICHED_SUBJECTS, max_ack_pending=64
    ) as work:
        assert 200_000 <= (await bus.lag(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)).bytes <= 220_000
        for _ in range(2):
            await until(lambda: work.waiting >= 10)
            for message in await work.get(10, 0.0):
                await message.ack()
            await work.pending()
        with anyio.fail_after(5):
            while (await bus.lag(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)).bytes:
                await anyio.sleep(0.05)


async def test_publishes_that_were_given_up_leave_nothing_behind(server: Server, bus: Bus) -> None:
    """A server that never answers costs each publish its time-out, and the connection nothing."""
    silent = await nats.connect(server.url)
    try:
        heard = await silent.subscribe("other.subject")  # somebody listens, so nobody says "no responders"
        # A client's PING overtakes its SUB, so flush() proves nothing. A message that comes back does.
        await silent.publish("other.subject", b"is anybody there")
        await heard.next_msg(timeout=5)
        for i in range(20):
            with pytest.raises(TryAgain, match="nats: timeout"):
                await bus.publish("other.subject", b"x", msg_id=f"{i}", timeout_seconds=0.01)
    finally:
        await silent.close()
    assert {} == bus._nc._resp_map
    await bus.publish(RAW, b"x", msg_id="a")


async def test_beats_and_tails(server: Server, bus: Bus) -> None:
    """Heartbeats arrive decoded, what is none is passed over; a tail sees what is published from then on."""
    beats: list[Beat] = []
    tailed: list[bytes] = []

    async def listen() -> None:
        async for beat in bus.beats():
            beats.append(beat)

    async def tail() -> None:
        async for message in bus.tail("stella.enriched.>"):
            tailed.append(message.data)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        tasks.start_soon(tail)
        await anyio.sleep(0.2)
        plain = await nats.connect(server.url)
        await plain.publish("stella.beat.x.y", b"\xff no beat")
        await plain.publish("stella.beat.x.y", b'{"x":' + b"[" * 100_000)
        await plain.close()
        await bus.beat(Beat("collector", "a.b c", "n", 1, "v", 1.0, 0.0, "ok"))
        await bus.publish(subjects.enriched("n", "file_open"), b"line\n", msg_id="e.0")
        await until(lambda: beats and tailed)
        tasks.cancel_scope.cancel()
    assert (["a.b c"], [b"line\n"]) == ([b.instance for b in beats], tailed)


async def test_a_beat_without_a_server_is_silent(server: Server, bus: Bus) -> None:
    """Heartbeats are lost while the bus is away; nothing is raised, and `ping` says so."""
    server.kill()
    await until(lambda: not bus.connected)
    await bus.beat(Beat("collector", "a", "n", 1, "v", 1.0, 0.0, "ok"))
    with pytest.raises(TryAgain):
        await bus.ping()
    with pytest.raises(TryAgain):
        await bus.publish(RAW, b"x", msg_id="a")
    server.start()
    await until(lambda: bus.connected)
    await bus.ping()
