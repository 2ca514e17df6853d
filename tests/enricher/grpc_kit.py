"""A gRPC server on a UNIX socket for tests, honest or not: what it answers is bytes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import h2.config
import h2.connection
import h2.events
import h2.exceptions

#: Gets the method, the message and what sends: frames of messages, or raw bytes on the socket.
Answer = Callable[[str, bytes, "Sender"], Awaitable[None]]


class Sender:
    """Answers one call.  `raw` sends bytes that no HTTP/2 need be."""

    def __init__(
        self,
        connection: h2.connection.H2Connection,
        send: Callable[[bytes], Awaitable[None]],
        number: int,
    ) -> None:
        self._connection = connection
        self.raw = send
        self._number = number

    async def headers(self, *more: tuple[str, str], end: bool = False) -> None:
        """Send the headers; with `end` they are all."""
        said = [(":status", "200"), ("content-type", "application/grpc"), *more]
        self._connection.send_headers(self._number, said, end_stream=end)
        await self.raw(self._connection.data_to_send())

    async def data(self, data: bytes) -> None:
        """Send bytes of the body, as the other side's window allows."""
        while data:
            room = min(
                self._connection.local_flow_control_window(self._number), self._connection.max_outbound_frame_size
            )
            if room == 0:
                await anyio.sleep(0.001)
                continue
            self._connection.send_data(self._number, data[:room])
            data = data[room:]
            await self.raw(self._connection.data_to_send())

    async def message(self, message: bytes) -> None:
        """Answer with one message, and end well."""
        await self.headers()
        await self.data(b"\0" + len(message).to_bytes(4, "big") + message)
        self._connection.send_headers(self._number, [("grpc-status", "0")], end_stream=True)
        await self.raw(self._connection.data_to_send())

    async def refuse(self, status: int) -> None:
        """Answer with an error."""
        await self.headers(("grpc-status", str(status)), end=True)


@asynccontextmanager
async def serving(path: Path, answer: Answer) -> AsyncIterator[list[str]]:
    """Serve on `path`; yields the methods that were called."""
    called: list[str] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        one_at_a_time = anyio.Lock()

        async def send(data: bytes) -> None:
            async with one_at_a_time:
                await stream.send(data)

        methods: dict[int, str] = {}
        bodies: dict[int, bytes] = {}
        async with stream, anyio.create_task_group() as tasks:
            try:
                await send(connection.data_to_send())
                while True:
                    for event in connection.receive_data(await stream.receive()):
                        if isinstance(event, h2.events.RequestReceived):
                            methods[event.stream_id] = dict(event.headers)[b":path"].decode()
                            bodies[event.stream_id] = b""
                        elif isinstance(event, h2.events.DataReceived):
                            bodies[event.stream_id] += event.data
                            connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        elif isinstance(event, h2.events.StreamEnded):
                            called.append(methods[event.stream_id])
                            sender = Sender(connection, send, event.stream_id)
                            tasks.start_soon(_answer, answer, called[-1], bodies[event.stream_id][5:], sender)
                    await send(connection.data_to_send())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                tasks.cancel_scope.cancel()

    listener = await anyio.create_unix_listener(path)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield called
        # Let the streams see their clients' end first: anyio's UNIX streams do not like both at once.
        await anyio.sleep(0.02)
        tasks.cancel_scope.cancel()


async def _answer(answer: Answer, method: str, message: bytes, sender: Sender) -> None:
    gone = (anyio.BrokenResourceError, anyio.ClosedResourceError, h2.exceptions.ProtocolError)
    with contextlib.suppress(*gone):  # The client's end is no error of ours.
        await answer(method, message, sender)
