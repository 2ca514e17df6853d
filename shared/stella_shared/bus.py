"""The bus, as the services see it: the one module that speaks to NATS.

    async with Bus.connect(url, name="collector") as bus:
        await bus.publish(subject, data, msg_id="…")          # returns when JetStream has stored it
        async with bus.work(stream, durable, …) as work:      # explicit acks, redelivered until acked
            for message in await work.get(64, 0.0): await message.ack()

What a caller may rely on:
* `publish` returns only after the server's ack, or raises `TryAgain`; repeating it with the same message id
  inside the duplicate window stores the message once.
* A full stream refuses (discard new) and `publish` says so: the caller keeps the message.
* Every wait has a time limit.  Lost connections heal by themselves; waiting consumers go on afterwards, also
  when the server restarted or somebody deleted the consumer meanwhile.

Two traps of the client library shape this module: `flush()` is no barrier (only acks are), and `drain()`
after JetStream use may hang until its own time-out (so subscriptions are settled and the connection closed).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NamedTuple

import anyio
import msgspec
import nats
import nats.aio.client
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from stella_shared import bus_tls, subjects
from stella_shared.config import BusTls, BusUser
from stella_shared.errors import BrokenPromise, NotPermitted, StellaError, TryAgain
from stella_shared.wire import Beat, decode_beat, encode_beat

_MSG_ID = "Nats-Msg-Id"
#: What an outage may leave in the client's own buffer; a publisher is told "try again" beyond it.
_PENDING_BYTES = 32 << 20
_CONSUMER_CHECK_SECONDS = 2.0
# The library reads 32 KiB at a time; our messages have ten times that, and every read costs a trip round the
# event loop. It is a constant of its module, read at each use.
nats.aio.client.DEFAULT_BUFFER_SIZE = 1 << 20
_CONNECT_SECONDS = 3.0
_CLOSE_SECONDS = 0.5
#: A request for messages lives this long on the server; it is what a worker that hangs goes on being given.
_REQUEST_SECONDS = 5
_REQUEST_TIMEOUT = "408"


class Message:
    """A message that was received.  `head` is the text of the batch header, or ""."""

    __slots__ = ("_msg", "data", "subject")

    def __init__(self, msg: Msg) -> None:
        self._msg = msg
        self.subject: str = msg.subject
        self.data: bytes = msg.data

    @property
    def head(self) -> str:
        """The JSON text of the batch head that travels in the header."""
        return str((self._msg.headers or {}).get(subjects.HEAD_HEADER, ""))

    @property
    def msg_id(self) -> str:
        """The publisher's message id."""
        return str((self._msg.headers or {}).get(_MSG_ID, ""))

    @property
    def deliveries(self) -> int:
        """How often this message has been delivered, 1 at first."""
        return int(self._msg.metadata.num_delivered or 1)

    async def _answer(self, verb: bytes) -> None:
        # An ack that cannot be sent is not an error: the server delivers again, and receivers deduplicate.
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._msg._client.publish(self._msg.reply, verb)

    async def ack(self) -> None:
        """Tell the server that this message is dealt with."""
        await self._answer(b"+ACK")

    async def nak(self, delay_seconds: float = 0.0) -> None:
        """Ask for this message again, after `delay_seconds`."""
        await self._answer(b'-NAK {"delay": %d}' % int(delay_seconds * 1e9) if delay_seconds else b"-NAK")

    async def term(self) -> None:
        """Ask never to see this message again.  The caller has counted the loss."""
        await self._answer(b"+TERM")

    async def in_progress(self) -> None:
        """Ask for another full ack wait."""
        await self._answer(b"+WPI")


class Lag(NamedTuple):
    """What a durable has not finished, and what the stream may hold before it refuses or drops (0: no limit)."""

    bytes: int
    limit_bytes: int


class Work:
    """A durable consumer's messages, asked for as there is room for them.  Made by `Bus.work`.

    A worker is given what it has asked for and no more.  So one that hangs holds at most `ahead` messages, for one ack
    wait; what is stored afterwards goes to those who go on asking.
    """

    def __init__(self, bus: Bus, stream: str, config: ConsumerConfig, ahead: int) -> None:
        self._bus = bus
        self._stream = stream
        self._durable = str(config.durable_name)
        self._config = config
        self._ahead = ahead
        self._ready: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._heard = False
        self._inbox = bus._nc.new_inbox()
        #: Requests that the server may still serve, oldest first: name, messages due, and when it forgets them.
        self._asked: deque[tuple[str, list[int], float]] = deque()
        self._requests = 0
        self._sub: Any = None

    async def _on_message(self, msg: Msg) -> None:
        if not msg.reply:
            # What a request ends with: its time is over (408), or there is no consumer (the watcher looks after that).
            self._asked = deque(entry for entry in self._asked if entry[0] != msg.subject)
            if (msg.headers or {}).get("Status") == _REQUEST_TIMEOUT:
                await self._ask()
            return
        if self._asked:
            due = self._asked[0][1]
            due[0] -= 1
            if not due[0]:
                self._asked.popleft()
        self._ready.append(Message(msg))
        self._heard = True
        self._arrived.set()

    async def _ask(self) -> None:
        """Ask for more once half of what may wait here has been fetched."""
        now = asyncio.get_running_loop().time()
        while self._asked and self._asked[0][2] < now:
            self._asked.popleft()
        room = self._ahead - len(self._ready) - sum(due[0] for _, due, _ in self._asked)
        if 2 * room < self._ahead or not self._bus.connected:
            return
        self._requests += 1
        name = f"{self._inbox}.{self._requests}"
        self._asked.append((name, [room], now + 2 * _REQUEST_SECONDS))
        request = b'{"batch":%d,"expires":%d}' % (room, _REQUEST_SECONDS * 1_000_000_000)
        with contextlib.suppress(nats.errors.Error, OSError):
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}"
            await self._bus._nc.publish(subject, request, reply=name)

    async def _start(self) -> None:
        await self._ensure_consumer()
        # Flow is bounded by what is asked for, so the client's own limits only get in the way.
        self._sub = await self._bus._nc.subscribe(
            f"{self._inbox}.*", cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        await self._ask()

    async def _ensure_consumer(self) -> None:
        js = self._bus._js
        try:
            try:
                info = await js.add_consumer(self._stream, config=self._config)
            except nats.js.errors.APIError:
                info = await js.consumer_info(self._stream, self._durable, timeout=2.0)
                if not info.config.deliver_subject:
                    raise
            # After a power cut the server may know a consumer to be further than its stream is, and gives it nothing
            # until the stream has come that far again; and an older release had messages pushed. Made anew, it gets
            # all there is once more, of which what was acked is known to be there.
            stream = await js.stream_info(self._stream)
            seen = info.delivered.stream_seq if info.delivered else 0
            done = info.ack_floor.stream_seq if info.ack_floor else 0
            queue = stream.config.retention == RetentionPolicy.WORK_QUEUE  # nothing that is done stays in one
            ahead = seen > stream.state.last_seq or (queue and 0 < stream.state.first_seq <= done)
            if ahead or info.config.deliver_subject:
                await js.delete_consumer(self._stream, self._durable)
                await js.add_consumer(self._stream, config=self._config)
        except nats.js.errors.APIError as e:
            raise TryAgain(f"consumer {self._durable} of stream {self._stream}: {e}") from None

    async def _watch(self) -> None:
        # A consumer that was deleted, or lost with its server's store, is silent: look, and make it again.
        while True:
            self._heard = False
            await asyncio.sleep(_CONSUMER_CHECK_SECONDS)
            if self._heard:
                continue
            try:
                await self._bus._js.consumer_info(self._stream, self._durable, timeout=2.0)
            except nats.js.errors.NotFoundError:
                with contextlib.suppress(TryAgain, nats.errors.Error, TimeoutError):
                    await self._bus.ensure_streams()
                    await self._ensure_consumer()
                self._asked.clear()
            except (TimeoutError, nats.errors.Error):
                continue
            await self._ask()

    async def _again(self) -> None:
        """Ask anew: the server has forgotten what was asked for with the connection."""
        self._asked.clear()
        await self._ask()

    async def get(self, max_messages: int, linger_seconds: float) -> list[Message]:
        """Wait for at least one message, then at most `linger_seconds` for more, up to `max_messages`.

        Cancelling this loses nothing: what was not returned stays queued.
        """
        await self._ask()
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
        if linger_seconds > 0 and len(self._ready) < max_messages:
            await self._ask()
            await asyncio.sleep(linger_seconds)
        return [self._ready.popleft() for _ in range(min(max_messages, len(self._ready)))]

    @property
    def waiting(self) -> int:
        """Messages that have arrived and were not fetched yet."""
        return len(self._ready)

    async def pending(self) -> tuple[int, int]:
        """Return how many messages wait to be delivered, and how many are delivered and not acked.

        Raises `TryAgain` when the bus does not answer.
        """
        info = await self._bus._info(self._stream, self._durable)
        return int(info.num_pending or 0), int(info.num_ack_pending or 0)


class _Transport(TcpTransport):
    """A connection whose end is waited for, but not for ever: after a handshake that failed nobody tells of it."""

    async def wait_closed(self) -> None:
        ending = asyncio.ensure_future(super().wait_closed())  # type: ignore[no-untyped-call]
        await asyncio.wait({ending}, timeout=_CLOSE_SECONDS)
        if not ending.cancel() and not ending.cancelled():
            ending.result()


# The library makes its connections of this name.
nats.aio.client.TcpTransport = _Transport  # type: ignore[attr-defined]


class _Client(Client):
    """The library's client, which takes its TLS anew from the files at each connection, and insists on it.

    `fault` is why the last attempt to connect was refused, by either side; None once a connection stands.
    """

    def __init__(self, url: str, tls: BusTls) -> None:
        super().__init__()
        self.fault: StellaError | None = None
        self._url = url
        self._tls = tls

    @property
    def ssl_context(self) -> ssl.SSLContext:
        try:
            return bus_tls.context(self._tls)
        except StellaError as e:
            raise bus_tls.Unusable(e) from None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # The library would go on in the clear, whatever the URL says, for a server that does not ask for TLS; and
        # anybody on the way can make it one.
        if initial_connection and self._url.startswith("tls://") and not info.get("tls_required"):
            raise bus_tls.no_tls(self._url)
        await super()._process_info(info, initial_connection=initial_connection)

    async def give_up(self) -> None:
        """Close what an attempt left, whatever state it was cut off in: the library's `close` may think it is done."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.close(), 1.0)
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
            with contextlib.suppress(Exception):
                await self._transport.wait_closed()  # type: ignore[no-untyped-call]

    def failed(self, e: Exception, who: str) -> bool:
        """Note what `e` says of trust; return whether it says anything."""
        fault = bus_tls.fault(e, self._url, self._tls)
        if fault is None and "uthorization" in str(e):
            fault = NotPermitted(
                f"the NATS server at {self._url} refuses {who}",
                hint="check bus.credentials_file, or the state directory's bus.json",
            )
        self.fault = fault or self.fault
        return fault is not None


class Bus:
    """One connection to NATS.  Use `async with Bus.connect(…)`."""

    def __init__(self, nc: _Client) -> None:
        self._nc = nc
        #: Who must hear of it when the connection is made anew.
        self._workers: list[Work] = []
        self._before = nc._reconnected_cb
        nc._reconnected_cb = self._again
        self._js = nc.jetstream(timeout=5.0)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        url: str,
        *,
        name: str,
        account: BusUser | None = None,
        tls: BusTls = BusTls(),  # noqa: B008  # it is frozen
        patience_seconds: float = 30.0,
    ) -> AsyncIterator[Bus]:
        """Connect to `url` and close at the end of the block.

        Without an `account` the server decides who that is.  Waits up to `patience_seconds` for a server that
        is still starting.  Raises `TryAgain` when there is none or its certificate has expired, `NotPermitted`
        when either side refuses the other, `ConfigError` for files of `tls` that cannot be used.
        """
        urls = [part.strip() for part in url.split(",")]
        who = "a client without a name" if account is None else f"user {account.user}" if account.user else "our nkey"
        nc = _Client(url, tls)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_seconds
        while True:
            try:
                # A client that reconnects for ever also tries for ever at first: bound each try ourselves.
                async with asyncio.timeout(_CONNECT_SECONDS) as limit:

                    async def quiet(e: Exception, nc: _Client = nc, limit: asyncio.Timeout = limit) -> None:
                        # Disconnects and slow spells show in heartbeats and counters; the library's default is a
                        # traceback. At first it is the only one to hear that a server refuses us: `connect` just
                        # goes on trying. Another server of several may take us.
                        if nc.failed(e, who) and len(urls) == 1:
                            with contextlib.suppress(RuntimeError):  # the block was left: it is about a reconnect
                                limit.reschedule(loop.time())

                    async def well(nc: _Client = nc) -> None:
                        nc.fault = None

                    await nc.connect(
                        urls,
                        name=f"stella {name}",
                        user=(account and account.user) or None,
                        password=(account and account.password) or None,
                        nkeys_seed_str=(account and account.seed) or None,
                        allow_reconnect=True,
                        max_reconnect_attempts=-1,
                        reconnect_time_wait=0.2,  # type: ignore[arg-type]  # the library takes fractions
                        connect_timeout=2,
                        ping_interval=10,
                        max_outstanding_pings=3,
                        pending_size=_PENDING_BYTES,
                        error_cb=quiet,
                        reconnected_cb=well,
                    )
                nc.fault = None
                break
            except (nats.errors.Error, OSError, TimeoutError) as e:
                await nc.give_up()
                nc.failed(e, who)
                if nc.fault is not None and (not isinstance(nc.fault, TryAgain) or loop.time() > deadline):
                    raise nc.fault from None
                if loop.time() > deadline:
                    raise TryAgain(
                        f"no NATS server answers at {url}: {str(e) or 'time-out'}",
                        hint="start one, or leave bus.url empty to run the embedded server",
                    ) from None
                await asyncio.sleep(0.1)
                nc = _Client(url, tls)
        try:
            yield cls(nc)
        finally:
            # Whoever leaves because it was cancelled closes too; each step has its time limit.
            with anyio.CancelScope(shield=True):
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(nc.flush(timeout=2), 2.0)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(nc.close(), 2.0)

    async def _again(self) -> None:
        if self._before is not None:
            await self._before()
        for worker in self._workers:
            await worker._again()

    @property
    def connected(self) -> bool:
        """Whether the connection stands at this moment."""
        return bool(self._nc.is_connected)

    def _away(self) -> TryAgain:
        """Return the error for a connection that does not stand."""
        why = self._nc.fault
        return TryAgain(f"the bus is not connected{f': {why}' if why else ''}", hint=why.hint if why else "")

    async def ping(self) -> None:
        """Ask the server for a sign of life.  Raises `TryAgain`."""
        # `flush` returns at once when the read loop has died with the connection, so look at that first.
        if not self._nc.is_connected:
            raise self._away()
        try:
            async with asyncio.timeout(2.5):
                await self._nc.flush(timeout=2)
        except (nats.errors.Error, OSError, TimeoutError) as e:
            raise TryAgain(f"the NATS server does not answer: {str(e) or type(e).__name__}") from None

    async def ensure_streams(self) -> None:
        """Make the streams that `subjects` declares, or bring existing ones to those limits."""
        raw = StreamConfig(
            name=subjects.RAW_STREAM,
            subjects=[subjects.RAW_SUBJECTS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=subjects.RAW_MAX_BYTES,
            duplicate_window=subjects.DUPLICATE_WINDOW_SECONDS,
        )
        enriched = StreamConfig(
            name=subjects.ENRICHED_STREAM,
            subjects=[subjects.ENRICHED_SUBJECTS],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_bytes=subjects.ENRICHED_MAX_BYTES,
            max_age=subjects.ENRICHED_MAX_AGE_SECONDS,
            duplicate_window=subjects.DUPLICATE_WINDOW_SECONDS,
        )
        for config in (raw, enriched):
            try:
                try:
                    await self._js.stream_info(str(config.name))
                except nats.js.errors.NotFoundError:
                    await self._js.add_stream(config)
                else:
                    await self._js.update_stream(config)
            except (TimeoutError, nats.errors.Error) as e:
                raise TryAgain(f"stream {config.name}: {str(e) or type(e).__name__}") from None

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        msg_id: str,
        head: str = "",
        encoding: str = "",
        timeout_seconds: float = 5.0,
    ) -> None:
        """Store one message; `encoding` says how `data` is compressed.

        Returns after the server's ack; raises `TryAgain` (repeat with the same id).
        """
        if not self._nc.is_connected:
            raise self._away()
        headers = {_MSG_ID: msg_id}
        if head:
            headers[subjects.HEAD_HEADER] = head
        if encoding:
            headers[subjects.ENCODING_HEADER] = encoding
        try:
            # Not `publish_async`: there the library loses the server's refusals, and a full stream shows as silence.
            async with asyncio.timeout(timeout_seconds + 1.0):
                await self._js.publish(subject, data, timeout=timeout_seconds, headers=headers)
        except nats.errors.MaxPayloadError:
            raise BrokenPromise(f"a message of {len(data)} bytes is over the server's max_payload") from None
        except (nats.errors.Error, TimeoutError, OSError) as e:
            raise TryAgain(f"the bus did not take a message on {subject}: {str(e) or type(e).__name__}") from None

    @contextlib.asynccontextmanager
    async def work(
        self, stream: str, durable: str, *, filter_subject: str, max_ack_pending: int, ahead: int = 64
    ) -> AsyncIterator[Work]:
        """Consume a durable's messages, shared with every other worker of that name; at most `ahead` wait here."""
        config = ConsumerConfig(
            durable_name=durable,
            filter_subject=filter_subject,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=subjects.ACK_WAIT_SECONDS,
            max_ack_pending=max_ack_pending,
        )
        work = Work(self, stream, config, ahead)
        deadline = asyncio.get_running_loop().time() + 15.0
        while True:
            try:
                await work._start()
                break
            except (TimeoutError, TryAgain, nats.errors.Error) as e:
                if asyncio.get_running_loop().time() > deadline:
                    raise TryAgain(f"stream {stream} is not there: {str(e) or type(e).__name__}") from None
                # Services that run apart have nobody who makes the streams for them.
                with contextlib.suppress(TryAgain):
                    await self.ensure_streams()
                await asyncio.sleep(0.2)
        watcher = asyncio.create_task(work._watch())
        self._workers.append(work)
        try:
            yield work
        finally:
            self._workers.remove(work)
            # The library's own time-outs may swallow a cancellation that meets them: insist.
            with anyio.CancelScope(shield=True):
                while not watcher.done():
                    watcher.cancel()
                    await asyncio.wait({watcher}, timeout=0.2)
                with contextlib.suppress(nats.errors.Error, OSError):
                    await work._sub.unsubscribe()

    async def _info(self, stream: str, durable: str) -> Any:
        try:
            return await self._js.consumer_info(stream, durable, timeout=2.0)
        except (TimeoutError, nats.errors.Error, OSError) as e:
            raise TryAgain(f"consumer {durable} of {stream}: {str(e) or type(e).__name__}") from None

    async def lag(self, stream: str, durable: str) -> Lag:
        """Return how much of what is stored `durable` has not finished; nothing while it does not exist.

        The server counts messages per consumer, not bytes, so this is their share of the stream's bytes.
        Raises `TryAgain` when the bus does not answer.
        """
        try:
            found = await self._js.stream_info(stream)
            info = await self._js.consumer_info(stream, durable, timeout=2.0)
        except nats.js.errors.NotFoundError:
            return Lag(0, 0)
        except (TimeoutError, nats.errors.Error, OSError) as e:
            raise TryAgain(f"stream {stream}: {str(e) or type(e).__name__}") from None
        waiting = int(info.num_pending or 0) + int(info.num_ack_pending or 0)
        stored = found.state.messages
        share = min(1.0, waiting / stored) if stored else 0.0
        return Lag(int(found.state.bytes * share), max(0, int(found.config.max_bytes or 0)))

    async def purge_finished(self, stream: str, durable: str) -> int:
        """Remove what `durable` has finished from a stream that keeps it; return how many messages that were."""
        try:
            info = await self._js.consumer_info(stream, durable, timeout=2.0)
            before = (await self._js.stream_info(stream)).state.messages
            floor = info.ack_floor.stream_seq if info.ack_floor else 0
            await self._js.purge_stream(stream, seq=floor + 1)
            return max(0, before - (await self._js.stream_info(stream)).state.messages)
        except (TimeoutError, nats.errors.Error, OSError) as e:
            raise TryAgain(f"stream {stream}: {str(e) or type(e).__name__}") from None

    async def server(self, what: str) -> dict[str, Any]:
        """Ask the server about itself (`VARZ`, `HEALTHZ`); it answers its system account alone.  Raises `TryAgain`."""
        try:
            answer = await self._nc.request(f"$SYS.REQ.SERVER.PING.{what}", b"{}", timeout=2.0)
            return dict(msgspec.json.decode(answer.data)["data"])
        except (nats.errors.Error, OSError, TimeoutError, msgspec.MsgspecError, LookupError, TypeError) as e:
            raise TryAgain(f"the NATS server does not tell {what}: {str(e) or type(e).__name__}") from None

    async def beat(self, beat: Beat) -> None:
        """Send a heartbeat.  Silent when the bus is away: silence is what the gateway reports then."""
        await self.tell(subjects.beat(beat.service, beat.instance), encode_beat(beat))

    async def tell(self, subject: str, data: bytes) -> None:
        """Send a message that is not stored.  Silent when the bus is away: who tells, tells again."""
        if self._nc.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._nc.publish(subject, data)

    async def beats(self) -> AsyncIterator[Beat]:
        """Yield heartbeats of every service as they come.  What is no heartbeat is passed over."""
        async for message in self.tail(subjects.BEATS):
            with contextlib.suppress(BrokenPromise):
                yield decode_beat(message.data)

    async def tail(self, subject: str) -> AsyncGenerator[Message, None]:
        """Yield messages on `subject` from now on, without storage or acks."""
        sub = await self._nc.subscribe(subject)
        try:
            async for msg in sub.messages:
                yield Message(msg)
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await sub.unsubscribe()
