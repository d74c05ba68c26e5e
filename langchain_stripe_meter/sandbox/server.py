"""HTTP on loopback, and the way of one request: who asks, which fault it meets, whose turn it is, the answer."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from langchain_stripe_meter.sandbox import wire
from langchain_stripe_meter.sandbox.account import Account, Settings, Stamp
from langchain_stripe_meter.sandbox.faults import Fault, Plan
from langchain_stripe_meter.sandbox.keys import Key, Keyring
from langchain_stripe_meter.sandbox.routes import Route, Visit, find, owner
from langchain_stripe_meter.sandbox.wire import Json, RecordedRequest, Reply, StripeRefusalError

_log = logging.getLogger(__name__)
_ECHOED = ("Idempotency-Key", "Stripe-Version")
_GLANCE = 0.05
"""Seconds between two looks at whether the sandbox is being stopped, while a request hangs."""
_PATIENCE = 5.0
"""Seconds that ``close`` waits for a thread; in practice they end at once."""


class _Connection(BaseHTTPRequestHandler):
    """One client's connection, kept alive until either side closes it."""

    protocol_version = "HTTP/1.1"
    # Without these two, every answer would wait 40 ms for the client's delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1
    server: SandboxServer

    def _serve(self) -> None:
        body = self._body()
        headers = {name.lower(): " ".join(value.split()) for name, value in self.headers.items()}
        answer = None if body is None else self.server.desk.answer(self.command, self.path, headers, body)
        if answer is None:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _serve  # noqa: N815 - the names http.server calls

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or "Transfer-Encoding" in self.headers:
            return None
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else None

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)


class SandboxServer(ThreadingTCPServer):
    """Listens on 127.0.0.1 from its construction; a thread accepts, and one more serves each connection."""

    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, port: int, desk: Desk) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.desk = desk
        self.port: int = self.socket.getsockname()[1]
        self._workers: dict[threading.Thread, socket.socket] = {}
        self._acceptor = self._thread(self.serve_forever, 0.02)
        self._acceptor.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        worker = self._thread(self.process_request_thread, request, client_address)
        self._workers = {known: connection for known, connection in self._workers.items() if known.is_alive()}
        self._workers[worker] = request
        worker.start()

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        return threading.Thread(target=target, args=args, name="stripe-sandbox", daemon=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error; anything else is logged."""
        if not isinstance(sys.exception(), ConnectionError):
            _log.exception("The sandbox lost the connection %s", client_address)

    def close(self) -> None:
        """Stop listening, cut every connection, and wait until no thread is left."""
        self.shutdown()
        self._acceptor.join(_PATIENCE)
        self.server_close()
        for connection in self._workers.values():
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        for worker in self._workers:
            worker.join(_PATIENCE)


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, ready to be written."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Task:
    """A request that was let in; ``flaw`` is why its parameters could not be decoded."""

    request: RecordedRequest
    request_id: str
    flaw: StripeRefusalError | None
    route: Route
    name: str
    account: Account


class Desk:
    """Answers requests, from any thread; one lock guards all state."""

    def __init__(self, settings: Settings, clock: Callable[[], int]) -> None:
        self.lock = threading.RLock()
        self.keys = Keyring()
        self.plan = Plan()
        self.requests: list[RecordedRequest] = []
        self.outages = 0
        self.stopping = threading.Event()
        self._settings = settings
        self._clock = clock
        self._accounts: dict[tuple[str, bool], Account] = {}
        self._busy: set[tuple[object, ...]] = set()
        self._count = itertools.count(1)

    def account(self, account_id: str, *, livemode: bool) -> Account:
        """The state of an account in one mode, made on first demand."""
        with self.lock:
            if (account_id, livemode) not in self._accounts:
                self._accounts[account_id, livemode] = Account(account_id, self._settings, livemode=livemode)
            return self._accounts[account_id, livemode]

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer | None:
        """The answer to a request, whose header names are in lower case; None: close the connection."""
        request_id = f"req_sandbox{next(self._count):08d}"
        path, _, query = target.partition("?")
        request, flaw = RecordedRequest(method, path, {}, headers, self._clock()), None
        try:
            request = replace(request, params=_decoded(request, query, body))
        except StripeRefusalError as refusal:
            flaw = refusal
        reply, half = self._reply(request, request_id, flaw)
        with self.lock:
            self.requests.append(replace(request, status=reply.status if reply else None))
        return self._written(request, reply, request_id, half=half) if reply else None

    def _written(self, request: RecordedRequest, reply: Reply, request_id: str, *, half: bool) -> Answer:
        shaped = wire.v2_error(reply.body["error"]) if request.v2 and "error" in reply.body else reply.body
        body = json.dumps(shaped, indent=2).encode()
        body = body[: len(body) // 2] if half else body
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Date": formatdate(self._clock(), usegmt=True),
            "Request-Id": request_id,
            **{name: request.headers[name.lower()] for name in _ECHOED if name.lower() in request.headers},
            **reply.headers,
        }
        return Answer(reply.status, headers, body)

    def _reply(
        self, request: RecordedRequest, request_id: str, flaw: StripeRefusalError | None
    ) -> tuple[Reply | None, bool]:
        try:
            with self.lock:
                task = _Task(request, request_id, flaw, *self._admit(request))
            with self._turn(task):
                return self._meet_fault(task)
        except StripeRefusalError as refusal:
            return refusal.reply, False
        except Exception as error:  # noqa: BLE001 - a `where` that raises, or a bug: the client must not hang on it
            _log.exception("The sandbox failed on %s %s", request.method, request.path)
            message = f"The sandbox itself failed: {error!r}"
            return StripeRefusalError(message, status=500, kind="api_error").reply, False

    def _admit(self, request: RecordedRequest) -> tuple[Route, str, Account]:
        if self.outages:
            raise StripeRefusalError("Stripe is unavailable.", status=503, kind="api_error")
        route, name = find(request.method, request.path) or (None, "")
        authorization = request.headers.get("authorization", "")
        if route is not None and route.permission is None:
            return route, name, self.keys.session(authorization, self._clock())
        key = self.keys.check(authorization)
        if route is None or route.permission is None:
            raise StripeRefusalError(f"Unrecognized request URL ({request.method}: {request.path}).", status=404)
        account = self._account_of(request, key)
        if not key.may(route.permission):
            raise StripeRefusalError(
                f"The provided key '{key.shown}' does not have the required permissions for this endpoint on account "
                f"'{account.id}'. Having the '{route.permission}' permission would allow this request to continue.",
                status=403,
            )
        return route, name, account

    def _account_of(self, request: RecordedRequest, key: Key) -> Account:
        wanted = request.headers.get("stripe-account") or request.headers.get("stripe-context") or key.account
        if wanted == key.account:
            return self.account(wanted, livemode=key.livemode)
        account = self._accounts.get((wanted, key.livemode))
        if account is None or not account.connected:
            raise StripeRefusalError(
                f"The provided key '{key.shown}' does not have access to account '{wanted}' "
                "(or that account does not exist). Application access may have been revoked.",
                status=403,
                code="account_invalid",
            )
        return account

    @contextmanager
    def _turn(self, task: _Task) -> Iterator[None]:
        """Refuse what Stripe does not take twice at the same time."""
        with self.lock:
            claims = _claims(task)
            for claim, refusal in claims.items():
                if claim in self._busy:
                    raise refusal
            self._busy.update(claims)
        try:
            yield
        finally:
            with self.lock:
                self._busy.difference_update(claims)

    def _meet_fault(self, task: _Task) -> tuple[Reply | None, bool]:
        with self.lock:
            fault = self.plan.take(task.request)
        if not self._wait(fault):
            return None, False
        with self.lock:
            reply = self._answered(task, fault)
        return None if fault.sends == "nothing" else reply, fault.sends == "half"

    def _wait(self, fault: Fault) -> bool:
        """Whether the request may go on: not if the sandbox was stopped meanwhile."""
        if fault.wait:
            self.stopping.wait(fault.wait)
        while fault.until is not None and not fault.until.wait(_GLANCE) and not self.stopping.is_set():
            pass
        waited = fault.wait > 0 or fault.until is not None
        return not (waited and self.stopping.is_set())

    def _answered(self, task: _Task, fault: Fault) -> Reply | None:
        if not fault.works and (fault.reply is None or not fault.reply.stored):
            return fault.reply
        request = task.request
        stamp = Stamp(self._clock(), task.request_id, request.idempotency_key)
        asked = request.method, request.path, request.params
        try:
            return task.account.once(asked, stamp, lambda: self._work(task, fault, stamp))
        except StripeRefusalError as refusal:
            return refusal.reply

    def _work(self, task: _Task, fault: Fault, stamp: Stamp) -> Reply:
        truth = self._truth(task, stamp) if fault.works else None
        reply = fault.reply or truth
        assert reply is not None, "a fault either works or answers"  # noqa: S101
        # v2 repeats a failed request in earnest; only v1 replays failures.
        return replace(reply, stored=False) if task.request.v2 and reply.status >= 300 else reply

    def _truth(self, task: _Task, stamp: Stamp) -> Reply:
        visit = Visit(task.account, self.keys, stamp, task.request, task.name, task.request.params)
        try:
            if task.flaw is not None:
                raise task.flaw
            return Reply(200, task.route.answer(visit))
        except StripeRefusalError as refusal:
            return refusal.reply


def _decoded(request: RecordedRequest, query: str, body: bytes) -> Json:
    if request.method != "POST":
        return wire.decode_form(query)
    is_json = "json" in request.headers.get("content-type", "")
    if body and is_json != request.v2:
        wanted = "application/json" if request.v2 else "application/x-www-form-urlencoded"
        message = f"Invalid request (check that your POST content type is {wanted})."
        raise StripeRefusalError(message, stored=False)
    return wire.decode_json(body) if request.v2 else wire.decode_form(body.decode("utf-8", "replace"))


def _claims(task: _Task) -> dict[tuple[object, ...], StripeRefusalError]:
    """What the request needs for itself, each with the refusal when another request has it."""
    key = task.request.idempotency_key
    claims: dict[tuple[object, ...], StripeRefusalError] = {}
    if key:
        claims["key", task.account, key] = StripeRefusalError(
            f"There is currently another in-progress request using this idempotency key: {key}. Try again later.",
            status=409,
            kind="idempotency_error",
            code="idempotency_key_in_use",
        )
    owned = owner(task.request.params, task.account) if task.route.serial else None
    if owned:
        # Stripe takes one call at a time per customer and meter [doc].
        claims["owner", task.account, owned] = StripeRefusalError(
            "This object cannot be accessed right now because another API request or Stripe process is currently "
            "accessing it. Send meter events of one customer and meter one at a time.",
            status=429,
            kind="rate_limit" if task.request.v2 else "invalid_request_error",
            code="too_many_concurrent_requests" if task.request.v2 else "lock_timeout",
        )
    return claims
