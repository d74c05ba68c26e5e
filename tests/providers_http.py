"""What the stand-ins for LLM providers share: the script, HTTP/1.1 and server-sent events."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json = dict[str, Any]

CREATED = 1_760_000_000
"""When every answer was made, in Unix seconds."""

PATIENCE = 60.0
"""Seconds after which a stand-in stops waiting, so that a mistaken test fails and does not hang."""

USUAL: Mapping[str, Any] = MappingProxyType({})
"""Stands for the usual report of each provider: 12 tokens in, 3 out, in its own shape."""


@dataclass(frozen=True)
class Reply:
    """One scripted answer.

    A piece, below, is one delta of text, refusal or tool arguments: the events around them do not count, so that
    the same script means the same with every provider. Text is cut into words.
    """

    text: str = "Hello!"
    usage: Mapping[str, Any] | None = field(default_factory=lambda: USUAL)
    """The numbers in the provider's own shape; None: it reports no usage at all."""
    final_usage: Mapping[str, Any] | None = field(default_factory=lambda: USUAL)
    """Anthropic streams only: the last report, where it is not to follow from ``usage``."""
    running: bool = False
    """Chat completions only: each chunk of a stream reports what the call came to so far, as some gateways do."""
    model: str | None = None
    """The model that answers; None: the one asked for."""
    status: int = 200
    n: int | None = None
    """Number of choices; None: as many as asked for."""
    tool_calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    refusal: str | None = None
    finish: str | None = None
    """Why the model stopped, in the provider's word; None: as fits the rest."""
    service_tier: str | None = None
    body: Mapping[str, Any] | str | None = None
    """Sent as it stands instead of everything above, also where a stream was asked for."""
    break_after: int | None = None
    """Drop the connection after this many pieces; a plain answer is then never sent.

    With a ``status`` other than 200 the provider says so: an error event, as when it is overloaded in mid-stream.
    """
    gate: threading.Event | None = None
    """Wait for it after the first piece, or before a plain answer."""


@dataclass(frozen=True)
class Call:
    """A request as it arrived, and the reply that was due."""

    number: int
    path: str
    body: Json
    reply: Reply

    @property
    def model(self) -> str:
        return self.reply.model or self.body["model"]

    @property
    def n(self) -> int:
        return self.reply.n or self.body.get("n") or 1

    def usage(self, usual: Mapping[str, Any]) -> Json | None:
        reported = usual if self.reply.usage is USUAL else self.reply.usage
        return None if reported is None else dict(reported)


class Event(NamedTuple):
    """A server-sent event; ``piece`` marks those that carry a part of the answer."""

    data: Json | str
    piece: bool = False

    def encoded(self) -> bytes:
        # Both providers name an event after the type in its data; chat completions have neither.
        name = f"event: {self.data['type']}\n" if isinstance(self.data, dict) and "type" in self.data else ""
        return f"{name}data: {_as_text(self.data)}\n\n".encode()


def pieces(text: str) -> list[str]:
    """Words with the space before them; together they are the text."""
    return re.findall(r"\s*\S+|\s+$", text)


def without_none(**fields: Any) -> Json:
    """The fields that a provider sends: what is None is left out."""
    return {name: value for name, value in fields.items() if value is not None}


class ProviderServer:
    """A provider on a free port of 127.0.0.1 for as long as the ``with`` block lasts.

    Replies go out in the order in which requests arrive. Leaving the block opens every gate, waits for the answers
    under way, and raises what went wrong inside the stand-in.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._last = Reply()
        self._queue: deque[Reply] = deque()
        self._arrived = threading.Condition()
        self._http = _Http(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="provider")

    def plain(self, call: Call) -> Json:
        """The body of a plain answer."""
        raise NotImplementedError

    def stream(self, call: Call) -> list[Event]:
        """The events of a streamed answer."""
        raise NotImplementedError

    def error(self, status: int) -> Json:
        """The body that goes with a status other than 200."""
        raise NotImplementedError

    def error_event(self, call: Call) -> Event:
        """How the provider reports an error in mid-stream."""
        return Event(self.error(call.reply.status))

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def requests(self) -> list[Json]:
        """The decoded bodies received so far."""
        return [call.body for call in self.calls]

    def reply(self, *replies: Reply) -> None:
        """Queue answers; the last one repeats."""
        with self._arrived:
            self._queue.extend(replies)

    def wait_for_requests(self, count: int = 1) -> None:
        """Block until so many requests have arrived: a call is then under way and may be cancelled."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.calls) >= count, PATIENCE):
                raise TimeoutError(f"{len(self.calls)} of {count} requests arrived within {PATIENCE} s")

    def take(self, path: str, body: Json) -> Call:
        """Record a request and give it the reply that is due."""
        with self._arrived:
            if self._queue:
                self._last = self._queue.popleft()
            call = Call(len(self.calls) + 1, path, body, self._last)
            self.calls.append(call)
            self._arrived.notify_all()
        return call

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        for call in self.calls:
            if call.reply.gate is not None:
                call.reply.gate.set()
        self._http.server_close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # An error of the test itself says more than what followed from it here.
        if error is None and self._http.errors:
            raise ExceptionGroup("the stand-in failed", self._http.errors)


class _Http(ThreadingHTTPServer):
    daemon_threads = False  # so that closing joins the answers under way, and no thread outlives its test
    request_queue_size = 128

    def __init__(self, provider: ProviderServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.provider = provider
        self.errors: list[Exception] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # A client that leaves a stream is what many tests are about.
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: _Http

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # LangChain keeps a client's connections for good; one that outlives its event loop warns when collected.
        self.close_connection = True
        call = self.server.provider.take(self.path.partition("?")[0], body)
        if call.reply.body is not None:
            self._send(call.reply.status, call.reply.body)
        elif call.reply.status != 200 and call.reply.break_after is None:
            self._send(call.reply.status, self.server.provider.error(call.reply.status))
        elif body.get("stream"):
            self._stream(call)
        else:
            self._plain(call)

    def _plain(self, call: Call) -> None:
        answer = self.server.provider.plain(call)
        _wait(call.reply.gate)
        if call.reply.break_after is None:
            self._send(200, answer)

    def _send(self, status: int, answer: Mapping[str, Any] | str) -> None:
        data = _as_text(answer).encode()
        self._start(status, "application/json", {"Content-Length": str(len(data))})
        self.wfile.write(data)

    def _stream(self, call: Call) -> None:
        events = self.server.provider.stream(call)
        first = next((event for event in events if event.piece), None)
        # Chunks, because without them a client could not tell a dropped connection from the end.
        self._start(200, "text/event-stream", {"Transfer-Encoding": "chunked"})
        for event in _until_break(events, call.reply.break_after):
            self._chunk(event.encoded())
            if event is first:
                _wait(call.reply.gate)
        if call.reply.status != 200:
            self._chunk(self.server.provider.error_event(call).encoded())
        if call.reply.break_after is None or call.reply.status != 200:
            self._chunk(b"")

    def _start(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        # The official clients then try again at once, not after half a second.
        retry = {"Retry-After-Ms": "1"} if status >= 400 else {}
        for name, value in {"Content-Type": content_type, "Connection": "close", **headers, **retry}.items():
            self.send_header(name, value)
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are in ``ProviderServer.calls``."""


def _until_break(events: list[Event], break_after: int | None) -> list[Event]:
    if break_after is None:
        return events
    places = [place for place, event in enumerate(events) if event.piece]
    if break_after > len(places):
        raise ValueError(f"cannot break after {break_after} pieces: the answer has {len(places)}")
    if break_after == 0:
        return events[: places[0]] if places else events[:1]
    return events[: places[break_after - 1] + 1]


def _wait(gate: threading.Event | None) -> None:
    if gate is not None and not gate.wait(PATIENCE):
        raise TimeoutError(f"nobody opened the gate within {PATIENCE} s")


def _as_text(data: Mapping[str, Any] | str) -> str:
    return data if isinstance(data, str) else json.dumps(data, default=dict)
