"""A TCP proxy between the Stripe client and the sandbox that does to connections what networks do."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Forward = Callable[[], Awaitable[bytes]]
"""Hands the request to the sandbox, and returns the whole answer."""
EVENTS = b"POST /v1/billing/meter_events "
NO_LINGER = struct.pack("ii", 1, 0)


class GoneError(Exception):
    """The connection ends here."""


def reset(client: Writer) -> None:
    """Abort the connection: the client sees a reset, not an end."""
    client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    client.transport.abort()
    raise GoneError


def page(status: str) -> bytes:
    """What a box on the way to Stripe says in Stripe's place."""
    body = b"<html>This is not Stripe</html>"
    return f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def stranger() -> bytes:
    """An accepted event, but another one's."""
    body = b'{"object": "billing.meter_event", "identifier": "somebody-elses"}'
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def late(client: Writer, forward: Forward) -> None:
    answer = await forward()
    await asyncio.sleep(0.05)
    client.write(answer)


async def dribbled(client: Writer, forward: Forward) -> None:
    for byte in await forward():
        client.write(bytes([byte]))
        await client.drain()


async def reset_before(client: Writer, _forward: Forward) -> None:
    reset(client)


async def reset_after(client: Writer, forward: Forward) -> None:
    await forward()
    reset(client)


async def reset_once_answered(client: Writer, forward: Forward) -> None:
    """The answer arrives, and the connection that the client keeps for the next request is dead."""
    client.write(await forward())
    await client.drain()
    client.close()
    raise GoneError


async def cut_in_the_head(client: Writer, forward: Forward) -> None:
    client.write((await forward())[:40])
    await client.drain()
    client.close()
    raise GoneError


async def cut_in_the_body(client: Writer, forward: Forward) -> None:
    client.write((await forward())[:-20])
    await client.drain()
    client.close()
    raise GoneError


async def garbage(client: Writer, forward: Forward) -> None:
    await forward()
    client.write(bytes(range(256)) * 4)
    await client.drain()
    client.close()
    raise GoneError


async def page_after(client: Writer, forward: Forward) -> None:
    await forward()
    client.write(page("200 OK"))


async def page_instead(client: Writer, _forward: Forward) -> None:
    client.write(page("200 OK"))


async def bad_gateway_after(client: Writer, forward: Forward) -> None:
    await forward()
    client.write(page("502 Bad Gateway"))


async def bad_request_after(client: Writer, forward: Forward) -> None:
    await forward()
    client.write(page("400 Bad Request"))


async def redirect_after(client: Writer, forward: Forward) -> None:
    await forward()
    client.write(b"HTTP/1.1 302 Found\r\nLocation: /v1/billing/meter_events\r\nContent-Length: 0\r\n\r\n")


async def not_found_instead(client: Writer, _forward: Forward) -> None:
    client.write(page("404 Not Found"))


async def answer_of_another_event(client: Writer, _forward: Forward) -> None:
    client.write(stranger())


async def black_hole_before(_client: Writer, _forward: Forward) -> None:
    await asyncio.Event().wait()  # until the client gives up


async def black_hole_after(_client: Writer, forward: Forward) -> None:
    await forward()
    await asyncio.Event().wait()


Misdeed = Callable[[Writer, Forward], Awaitable[None]]


class FaultProxy:
    """Forwards HTTP to a port; each request that ``hits`` meets the next planned misdeed, until none is left."""

    def __init__(self, port: int, hits: Callable[[bytes], bool] = lambda request: request.startswith(EVENTS)) -> None:
        self._upstream = port
        self._hits = hits
        self.plan: list[Misdeed] = []
        self.met = 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: Reader, client: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(GoneError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                request = await _message(reader)
                await self._answer(request, reader, client)
                await client.drain()
        client.close()

    async def _answer(self, request: bytes, reader: Reader, client: Writer) -> None:
        async def forward() -> bytes:
            theirs, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
            upstream.write(request)
            answer = await _message(theirs)
            upstream.close()
            return answer

        if not self._hits(request) or not self.plan:
            client.write(await forward())
            return
        misdeed = self.plan.pop(0)
        self.met += 1
        doing = asyncio.ensure_future(misdeed(client, forward))
        leaving = asyncio.ensure_future(reader.read(1))  # the client speaks only when it was answered, or hangs up
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for one in (leaving, doing):
            one.cancel()
        await asyncio.wait({doing, leaving})
        if doing.cancelled():
            raise GoneError
        doing.result()


async def _message(reader: Reader) -> bytes:
    """One whole HTTP message."""
    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(sizes[0]) if sizes else 0)
