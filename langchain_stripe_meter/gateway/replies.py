"""What Stripe's replies mean for an event, the one place where exceptions become outcomes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

import stripe

from langchain_stripe_meter.core.states import Move, Outcome
from langchain_stripe_meter.core.totals import DUPLICATE, GONE_CODES

MAX_MESSAGE = 300
_GONE_WORDS = ("No such customer", "No such meter", "No active meter")
_AHEAD = "minutes in the future"
"""What Stripe says where its clock is behind ours: it takes it once that time has come."""
_KNOWN = "already exists with identifier"
"""What v1 says of an identifier that it has; v2 has a code."""
_ELSEWHERE = "Unrecognized request URL"
"""What Stripe says to another request than ours: a redirect on the way has made a GET of it."""
_SECRET = re.compile(r"\b([srp]k_(?:test|live)_)\w+")
_EMAIL = re.compile(r"[^\s'\"<>]+@[^\s'\"<>]+")
_NOTHING_SENT = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ConnectTimeout", "gaierror",
                 "ConnectionRefusedError")  # fmt: skip


def classify(error: Exception, account: str = "") -> Outcome:
    """The outcome of an attempt that raised, on a connected account or, where it is ``""``, on the key's own.

    A *definite* refusal means that Stripe has not taken the event; after anything else nobody knows. Stripe's own
    words say when an identifier is known already, and that means delivered.
    """
    request_id = getattr(error, "request_id", None)
    message = explain(error)
    if isinstance(error, stripe.APIConnectionError):
        move = Move.REFUSED_FOR_NOW if _nothing_was_sent(error) else Move.UNKNOWN
        return Outcome(move, message, request_id)
    if not isinstance(error, stripe.StripeError):
        return Outcome(Move.UNKNOWN, message)
    return Outcome(_move(error, account), message, request_id, _retry_after(error), date_of(error.headers))


_NOT_FINAL = (408, 409, 423, 424, 425)
"""Statuses that speak of now: too slow, in conflict, locked, something Stripe depends on failed, too early."""
_NOT_FINAL_CODES = ("lock_timeout", "idempotency_key_in_use", "too_many_concurrent_requests")


def _move(error: stripe.StripeError, account: str) -> Move:
    """A final no needs Stripe's own words: a cut answer, or the page of a box on the way, says nothing of it.

    A 401 is about the key. A 403 about a connected account says that this one is closed to us, as after its owner has
    revoked our access; only on the key's own account does it say that the key may do nothing.
    """
    status, code, said = error.http_status or 0, code_of(error), str(error.user_message or error)
    if code == DUPLICATE or (status == 400 and _KNOWN in said):
        return Move.DUPLICATE
    if status in (401, 403) and has_words(error):
        return Move.NO_ACCESS if status == 403 and account else Move.UNAUTHORISED
    is_ahead = status == 400 and (code == "timestamp_in_future" or _AHEAD in said)
    if status == 429 or isinstance(error, stripe.RateLimitError) or is_ahead:
        return Move.REFUSED_FOR_NOW
    if status in (400, 404) and (code in GONE_CODES or any(words in said for words in _GONE_WORDS)):
        return Move.UNSEAL  # the customer, or the meter, may come back
    final = 400 <= status < 500 and status not in _NOT_FINAL and not isinstance(error, stripe.IdempotencyError)
    final = final and _header(error.headers, "stripe-should-retry") != "true" and code not in _NOT_FINAL_CODES
    return Move.REFUSED if final and _ELSEWHERE not in said and has_words(error) else Move.UNKNOWN


def has_words(error: BaseException | None) -> bool:
    """Whether it is Stripe itself that says so: what v1 refuses always has a type, unlike the JSON of other boxes."""
    return isinstance(getattr(getattr(error, "error", None), "type", None), str)


def code_of(error: BaseException | None) -> str | None:
    """Stripe's code for what was wrong, where it has one."""
    return getattr(error, "code", None) or getattr(getattr(error, "error", None), "code", None)


def _retry_after(error: stripe.StripeError) -> int | None:
    text = _header(error.headers, "retry-after") or ""
    return min(int(text), 3600) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _header(headers: Mapping[str, str] | None, wanted: str) -> str | None:
    return next((value for name, value in (headers or {}).items() if name.lower() == wanted), None)


def date_of(headers: Mapping[str, str] | None) -> int | None:
    """When an answer was given, by Stripe's clock, in Unix seconds; None where it does not say."""
    text = _header(headers, "date")
    try:
        return None if text is None else int(parsedate_to_datetime(text).timestamp())
    except ValueError:
        return None


def _nothing_was_sent(error: BaseException) -> bool:
    return any(type(cause).__name__ in _NOTHING_SENT for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and everything behind it, including what urllib3 keeps in ``reason`` and ``args``."""
    seen: list[BaseException] = []
    queue: list[object] = [error]
    while queue:
        current = queue.pop()
        if not isinstance(current, BaseException) or current in seen:
            continue
        seen.append(current)
        yield current
        queue += [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]


def explain(error: Exception) -> str:
    """One short line without keys or addresses, fit for a log and for the ledger."""
    if isinstance(error, stripe.APIConnectionError):
        causes = [type(cause).__name__ for cause in _causes(error)]
        return f"no answer from Stripe ({causes[-1]})"
    said = str(getattr(error, "user_message", None) or error)
    line = " ".join(_EMAIL.sub("<email>", _SECRET.sub(r"\1***", said)).split())
    status = getattr(error, "http_status", None)
    return (f"HTTP {status}: {line}" if status else f"{type(error).__name__}: {line}")[:MAX_MESSAGE]


def advise(error: Exception) -> str:
    """As ``explain``, for a person: with what to do, where that is known."""
    said = explain(error)
    if isinstance(error, stripe.APIConnectionError):
        base = ", and $STRIPE_METER_API_BASE: a Stripe must run there, as at 'http://127.0.0.1:12111'"
        return f"{said}. Check the network{base if os.environ.get('STRIPE_METER_API_BASE') else ''}."
    if getattr(error, "http_status", None) == 401:
        return f"{said.rstrip('.')}. Set $STRIPE_API_KEY to a key that is in use."
    return said
