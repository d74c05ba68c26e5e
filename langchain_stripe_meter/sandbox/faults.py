"""Scriptable faults: the ways in which one request to Stripe can go wrong.

Whether the request's work was done is the question that matters for billing, so every fault says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox.wire import RecordedRequest, Reply, StripeRefusalError

if TYPE_CHECKING:
    import threading


@dataclass(frozen=True)
class Fault:
    """What happens to one request: wait, do the work or not, then answer, and how.

    ``wait`` in seconds; ``until`` an event to wait for; ``works`` whether the request is carried out;
    ``reply`` what is answered in place of the truth (``reply.stored``: kept for the idempotency key).
    """

    wait: float = 0.0
    until: threading.Event | None = None
    works: bool = True
    reply: Reply | None = None
    sends: Literal["all", "half", "nothing"] = "all"


NO_FAULT = Fault()
Condition = Callable[[RecordedRequest], bool]


def refuse(
    status: int = 429, *, code: str | None = None, message: str | None = None, headers: Mapping[str, str] | None = None
) -> Fault:
    """Answer with a 4xx or 5xx; the work is not done and nothing is stored."""
    if not 400 <= status <= 599:
        raise ConfigurationError(f"refuse() takes a status from 400 to 599, not {status!r}.")
    return Fault(works=False, reply=_error(status, code, message, headers))


def rate_limited(retry_after: float | None = None, reason: str | None = "global-rate") -> Fault:
    """Answer 429 without doing the work; ``retry_after`` in seconds, ``reason`` as Stripe's header has it."""
    headers = {"Stripe-Rate-Limited-Reason": reason} if reason else {}
    if retry_after is not None:
        headers["Retry-After"] = f"{retry_after:g}"
    return refuse(429, code="rate_limit", message="Request rate limit exceeded.", headers=headers)


def server_error() -> Fault:
    """Answer 500 without doing the work; it is stored, and replayed for the same idempotency key for 24 h."""
    return Fault(works=False, reply=_error(500, stored=True))


def server_error_after_accept() -> Fault:
    """Do the work, then answer 500; it is stored under the idempotency key like any other answer."""
    return Fault(reply=_error(500, stored=True))


def drop_answer() -> Fault:
    """Do the work, then close the connection without an answer."""
    return Fault(sends="nothing")


def drop_request() -> Fault:
    """Close the connection without doing the work."""
    return Fault(works=False, sends="nothing")


def delay(seconds: float) -> Fault:
    """Wait (real seconds), then go on as usual."""
    return Fault(wait=seconds)


def broken_body() -> Fault:
    """Do the work, then answer with half of the JSON."""
    return Fault(sends="half")


def hang(event: threading.Event) -> Fault:
    """Do the work only once ``event`` is set."""
    return Fault(until=event)


def _error(
    status: int,
    code: str | None = None,
    message: str | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    stored: bool = False,
) -> Reply:
    kind, words = "invalid_request_error", "The sandbox was told to refuse this."
    if status >= 500:
        kind, words = "api_error", "An unknown error occurred."
    return StripeRefusalError(
        message or words, status=status, kind=kind, code=code, headers=headers, stored=stored
    ).reply


@dataclass
class _Planned:
    fault: Fault
    path: str | None
    left: int | None
    where: Condition | None

    def hits(self, request: RecordedRequest) -> bool:
        on_path = self.path is None or fnmatchcase(request.path, self.path)
        return self.left != 0 and on_path and (self.where is None or self.where(request))


class Plan:
    """The faults to come, in order; each request meets the first that is meant for it."""

    def __init__(self) -> None:
        self._planned: list[_Planned] = []

    def add(self, fault: Fault, path: str | None, times: int | None, where: Condition | None) -> None:
        """Plan ``fault`` for the next ``times`` requests that match (None: for all, until cleared)."""
        if not isinstance(fault, Fault):
            raise ConfigurationError(f"{fault!r} is no fault. Use one of the sandbox's, such as rate_limited().")
        self._planned.append(_Planned(fault, path, times, where))

    def clear(self) -> None:
        """Plan nothing."""
        self._planned.clear()

    def take(self, request: RecordedRequest) -> Fault:
        """The fault that this request meets."""
        for planned in self._planned:
            if planned.hits(request):
                if planned.left is not None:
                    planned.left -= 1
                return planned.fault
        return NO_FAULT
