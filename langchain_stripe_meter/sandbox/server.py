"""HTTP on loopback: reads requests, hands them to the desk, writes the answers."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from langchain_stripe_meter.sandbox.desk import Answer, Call, Desk

_log = logging.getLogger(__name__)
_PATIENCE = 5.0
"""Seconds that ``close`` waits for a thread; in practice they end at once."""


class _Connection(BaseHTTPRequestHandler):
    """One client's connection, kept alive until either side closes it."""

    protocol_version = "HTTP/1.1"
    # Without this, every answer would wait 40 ms for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    server: SandboxServer

    def _serve(self) -> None:
        call = self._read()
        answer = self.server.desk.answer(call) if call else None
        if answer is None:
            self.close_connection = True
        else:
            self._write(answer)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _serve  # noqa: N815 - the names http.server calls

    def _read(self) -> Call | None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or "Transfer-Encoding" in self.headers:
            return None
        body = self.rfile.read(int(length))
        path, _, query = self.path.partition("?")
        headers = {name.lower(): " ".join(value.split()) for name, value in self.headers.items()}
        return Call(self.command, path, query, headers, body) if len(body) == int(length) else None

    def _write(self, answer: Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}", f"Content-Length: {len(answer.body)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        head = "\r\n".join(lines).encode("latin-1", "replace")
        self.wfile.write(head + b"\r\n\r\n" + answer.body)

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


class SandboxServer(ThreadingTCPServer):
    """Listens on 127.0.0.1 from its construction; a thread accepts, and one more serves each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int, desk: Desk) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.desk = desk
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        self._workers: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.02,), name="stripe-sandbox", daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.socket.getsockname()[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        worker = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="stripe-sandbox", daemon=True
        )
        with self._guard:
            self._open.add(request)
            self._workers = [known for known in self._workers if known.is_alive()]
            # Started under the guard: a worker that has not started yet would pass for a dead one.
            worker.start()
            self._workers.append(worker)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error; anything else is logged."""
        if not isinstance(sys.exception(), ConnectionError):
            _log.exception("The sandbox lost the connection %s", client_address)

    def close(self) -> None:
        """Stop listening, cut every connection, and wait until no thread is left."""
        self.shutdown()
        self._acceptor.join(_PATIENCE)
        self.server_close()
        with self._guard:
            for connection in self._open:
                _cut(connection)
            workers = list(self._workers)
        for worker in workers:
            worker.join(_PATIENCE)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client was faster
        _log.debug("The connection was closed already.")
