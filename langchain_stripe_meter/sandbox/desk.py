"""The way of one request: who asks, which fault it meets, whose turn it is, the work, the answer."""

from __future__ import annotations

import itertools
import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.account import Account, Rules, Stamp
from langchain_stripe_meter.sandbox.faults import Fault, Plan
from langchain_stripe_meter.sandbox.idempotency import Fingerprint
from langchain_stripe_meter.sandbox.keys import Key, Keyring
from langchain_stripe_meter.sandbox.params import decode_form, decode_json
from langchain_stripe_meter.sandbox.records import RecordedRequest
from langchain_stripe_meter.sandbox.replies import Json, Reply, StripeRefusalError, error_body
from langchain_stripe_meter.sandbox.routes import Route, Visit, find, owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_log = logging.getLogger(__name__)
_ECHOED = ("Idempotency-Key", "Stripe-Version")
_GLANCE = 0.05
"""Seconds between two looks at whether the sandbox is being stopped, while a request hangs."""


@dataclass(frozen=True)
class Call:
    """An HTTP request as it came off the wire; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def v2(self) -> bool:
        """Whether it asks API v2, whose errors have another shape."""
        return self.path.startswith("/v2/")

    @property
    def key(self) -> str:
        """Its idempotency key; only a POST has one."""
        return self.headers.get("idempotency-key", "") if self.method == "POST" else ""

    def params(self) -> Json:
        """Its decoded parameters."""
        if self.method != "POST":
            return decode_form(self.query)
        is_json = "json" in self.headers.get("content-type", "")
        if self.body and is_json != self.v2:
            wanted = "application/json" if self.v2 else "application/x-www-form-urlencoded"
            message = f"Invalid request (check that your POST content type is {wanted})."
            raise StripeRefusalError(message, stored=False)
        return decode_json(self.body) if self.v2 else decode_form(self.body.decode("utf-8", "replace"))


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, ready to be written."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Task:
    """A request that was let in."""

    call: Call
    request: RecordedRequest
    request_id: str
    route: Route
    name: str
    account: Account
    flaw: StripeRefusalError | None


class Desk:
    """Answers requests, from any thread; one lock guards all state."""

    def __init__(self, rules: Rules, clock: Callable[[], int]) -> None:
        self.lock = threading.RLock()
        self.keys = Keyring()
        self.plan = Plan()
        self.requests: list[RecordedRequest] = []
        self.outages = 0
        self.stopping = threading.Event()
        self._rules = rules
        self._clock = clock
        self._accounts: dict[tuple[str, bool], Account] = {}
        self._connected: set[str] = set()
        self._busy: set[tuple[str, ...]] = set()
        self._count = itertools.count(1)

    def account(self, account_id: str, *, livemode: bool, connected: bool = False) -> Account:
        """The state of an account in one mode, made on first demand."""
        with self.lock:
            if connected:
                self._connected.add(account_id)
            known = self._accounts.get((account_id, livemode))
            if known is None:
                context = account_id if connected else None
                known = Account(account_id, self._rules, livemode=livemode, context=context)
                self._accounts[account_id, livemode] = known
            return known

    def answer(self, call: Call) -> Answer | None:
        """The answer to ``call``; None: close the connection without one."""
        request_id = f"req_sandbox{next(self._count):08d}"
        params, flaw = _decoded(call)
        request = RecordedRequest(call.method, call.path, params, call.headers, self._clock())
        reply, sends = self._reply(call, request, request_id, flaw)
        answered = None if reply is None or sends == "nothing" else reply
        with self.lock:
            self.requests.append(replace(request, status=answered.status if answered else None))
        return self._written(call, answered, request_id, half=sends == "half") if answered else None

    def _reply(
        self, call: Call, request: RecordedRequest, request_id: str, flaw: StripeRefusalError | None
    ) -> tuple[Reply | None, str]:
        try:
            with self.lock:
                route, name, account = self._admit(call)
            task = _Task(call, request, request_id, route, name, account, flaw)
            with self._turn(task):
                return self._meet_fault(task)
        except StripeRefusalError as refusal:
            return refusal.reply(v2=call.v2), "all"
        except Exception as error:  # noqa: BLE001 - a `where` that raises, or a bug: the client must not hang on it
            _log.exception("The sandbox failed on %s %s", call.method, call.path)
            message = f"The sandbox itself failed: {error!r}"
            return Reply(500, error_body({"type": "api_error", "message": message}), stored=False), "all"

    def _admit(self, call: Call) -> tuple[Route, str, Account]:
        if self.outages:
            raise StripeRefusalError("Stripe is unavailable.", status=503, kind="api_error", stored=False)
        route, name = find(call.method, call.path) or (None, "")
        authorization = call.headers.get("authorization", "")
        if route is not None and route.permission is None:
            session = self.keys.session(authorization, self._clock())
            return route, name, self.account(session.account, livemode=session.livemode)
        key = self.keys.check(authorization)
        if route is None:
            raise StripeRefusalError(
                f"Unrecognized request URL ({call.method}: {call.path}).", status=404, stored=False
            )
        account = self._account_of(call, key)
        _check_permission(key, route, account)
        return route, name, account

    def _account_of(self, call: Call, key: Key) -> Account:
        wanted = call.headers.get("stripe-account") or call.headers.get("stripe-context") or key.account
        if wanted != key.account and (wanted not in self._connected or (wanted, key.livemode) not in self._accounts):
            raise StripeRefusalError(
                f"The provided key '{key.shown}' does not have access to account '{wanted}' "
                "(or that account does not exist). Application access may have been revoked.",
                status=403,
                code="account_invalid",
                stored=False,
            )
        return self.account(wanted, livemode=key.livemode)

    @contextmanager
    def _turn(self, task: _Task) -> Iterator[None]:
        """Refuse what Stripe does not take twice at the same time."""
        with self.lock:
            claims = self._claims(task)
            for claim, refusal in claims.items():
                if claim in self._busy:
                    raise refusal
            self._busy.update(claims)
        try:
            yield
        finally:
            with self.lock:
                self._busy.difference_update(claims)

    def _claims(self, task: _Task) -> dict[tuple[str, ...], StripeRefusalError]:
        scope = (task.account.id, str(task.account.livemode))
        claims: dict[tuple[str, ...], StripeRefusalError] = {}
        if task.call.key:
            claims["key", *scope, task.call.key] = _key_in_use(task.call.key)
        owned = owner(task.request.params, task.account.meters) if task.route.serial else None
        if owned:
            # Stripe takes one call at a time per customer and meter [doc].
            claims["owner", *scope, *owned] = _lock_timeout(v2=task.call.v2)
        return claims

    def _meet_fault(self, task: _Task) -> tuple[Reply | None, str]:
        with self.lock:
            fault = self.plan.take(task.request)
        if not self._wait(fault):
            return None, "nothing"
        with self.lock:
            return self._answered(task, fault), fault.sends

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
            return _shaped(fault.reply, v2=task.call.v2)
        try:
            return self._once(task, fault)
        except StripeRefusalError as refusal:
            return refusal.reply(v2=task.call.v2)

    def _once(self, task: _Task, fault: Fault) -> Reply:
        call, stamp = task.call, Stamp(self._clock(), task.request_id, task.call.key)
        if not call.key:
            return self._work(task, fault, stamp)
        fingerprint = Fingerprint(call.method, call.path, task.request.params)
        return task.account.replies.once(
            call.key, task.request_id, fingerprint, stamp.now, lambda: self._work(task, fault, stamp)
        )

    def _work(self, task: _Task, fault: Fault, stamp: Stamp) -> Reply:
        truth = self._truth(task, stamp) if fault.works else None
        reply = _shaped(fault.reply, v2=task.call.v2) or truth
        assert reply is not None, "a fault either works or answers"  # noqa: S101
        # v2 repeats a failed request in earnest; only v1 replays failures.
        return replace(reply, stored=False) if task.call.v2 and reply.status >= 300 else reply

    def _truth(self, task: _Task, stamp: Stamp) -> Reply:
        visit = Visit(task.account, task.request.params, task.call.path, stamp, self.keys, task.name)
        try:
            if task.flaw is not None:
                raise task.flaw
            return Reply(200, task.route.handle(visit))
        except StripeRefusalError as refusal:
            return refusal.reply(v2=task.call.v2)

    def _written(self, call: Call, reply: Reply, request_id: str, *, half: bool) -> Answer:
        body = reply.encoded()
        headers = {
            "Content-Type": "application/json",
            "Date": formatdate(self._clock(), usegmt=True),
            "Request-Id": request_id,
            **{name: call.headers[name.lower()] for name in _ECHOED if name.lower() in call.headers},
            **reply.headers,
        }
        return Answer(reply.status, headers, body[: len(body) // 2] if half else body)


def _decoded(call: Call) -> tuple[Json, StripeRefusalError | None]:
    try:
        return call.params(), None
    except StripeRefusalError as flaw:
        return {}, flaw


def _shaped(reply: Reply | None, *, v2: bool) -> Reply | None:
    if reply is None or not v2:
        return reply
    return replace(reply, body=error_body(reply.body["error"], v2=True))


def _check_permission(key: Key, route: Route, account: Account) -> None:
    if route.permission is not None and not key.may(route.permission):
        raise StripeRefusalError(
            f"The provided key '{key.shown}' does not have the required permissions for this endpoint on account "
            f"'{account.id}'. Having the '{route.permission}' permission would allow this request to continue.",
            status=403,
            stored=False,
        )


def _key_in_use(key: str) -> StripeRefusalError:
    return StripeRefusalError(
        f"There is currently another in-progress request using this idempotency key: {key}. Try again later.",
        status=409,
        kind="idempotency_error",
        code="idempotency_key_in_use",
        stored=False,
    )


def _lock_timeout(*, v2: bool) -> StripeRefusalError:
    return StripeRefusalError(
        "This object cannot be accessed right now because another API request or Stripe process is currently "
        "accessing it. Send meter events of one customer and meter one at a time.",
        status=429,
        kind="rate_limit" if v2 else "invalid_request_error",
        code="too_many_concurrent_requests" if v2 else "lock_timeout",
        stored=False,
    )
