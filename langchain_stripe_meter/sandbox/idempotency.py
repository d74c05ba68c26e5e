"""Idempotency keys: the same request is answered once, and its answer repeated for 24 hours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.records import DAY
from langchain_stripe_meter.sandbox.replies import Json, Reply, StripeRefusalError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Fingerprint:
    """What makes two requests the same for Stripe."""

    method: str
    path: str
    params: Json


@dataclass(frozen=True)
class _Kept:
    fingerprint: Fingerprint
    reply: Reply
    request: str
    at: int


class Replies:
    """The stored answers of one account, by idempotency key."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def once(self, key: str, request: str, fingerprint: Fingerprint, now: int, work: Callable[[], Reply]) -> Reply:
        """The stored answer for ``key``, or that of ``work``, which is stored unless it says otherwise."""
        kept = self._kept.get(key)
        if kept is not None and now - kept.at < DAY:
            return _replay(key, kept, fingerprint)
        reply = work()
        if reply.stored:
            self._kept[key] = _Kept(fingerprint, reply, request, now)
        return reply


def _replay(key: str, kept: _Kept, fingerprint: Fingerprint) -> Reply:
    if kept.fingerprint != fingerprint:
        raise StripeRefusalError(
            "Keys for idempotent requests can only be used with the same parameters they were first used with. "
            f"Try using a key other than '{key}' if you meant to execute a different request.",
            kind="idempotency_error",
            stored=False,
        )
    headers = {**kept.reply.headers, "Idempotent-Replayed": "true", "Original-Request": kept.request}
    return replace(kept.reply, headers=headers)
