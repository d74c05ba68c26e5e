"""Arguments that would fail late, or never be noticed: refused where they are given."""

from __future__ import annotations

import inspect
from datetime import datetime

from langchain_stripe_meter.errors import ConfigurationError

LAST_SECOND = 10**11
"""Beyond this, a number of seconds was meant as milliseconds."""


def is_async(function: object) -> bool:
    """Whether a call of ``function`` does nothing until it is awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def check_on_error(on_error: object) -> None:
    """None, or what a plain call with an error tells it to."""
    if on_error is None:
        return
    if not callable(on_error):
        raise ConfigurationError(f"on_error= takes a function of one MeteringError, or None, not {_kind(on_error)}.")
    if is_async(on_error):
        raise ConfigurationError("on_error= takes a plain function; an async one would never be awaited.")


def check_tenant(tenant: object) -> None:
    """None, or what a plain call with a run's facts gives its tenant."""
    if tenant is None:
        return
    if not callable(tenant):
        raise ConfigurationError(
            f"tenant= takes a function from a run's facts to its Tenant, or None, not {_kind(tenant)}. "
            "For one account, use stripe_account='acct_…'."
        )
    if is_async(tenant):
        raise ConfigurationError("tenant= takes a plain function; an async one would never be awaited.")


def check_webhook_secret(secret: object) -> None:
    """None (or ``""``), or a signing secret as Stripe makes them; it is never repeated."""
    if secret not in (None, "") and not (isinstance(secret, str) and secret.startswith("whsec_")):
        raise ConfigurationError(
            "webhook_secret= takes the signing secret of the webhook's endpoint, which Stripe begins with 'whsec_', or "
            "None for $STRIPE_WEBHOOK_SECRET. (An API key is none.)"
        )


def seconds(moment: datetime | int, name: str) -> int:
    """A datetime with a time zone, or Unix seconds, as Unix seconds."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ConfigurationError(f"{name}={moment!r} has no time zone; use datetime(..., tzinfo=timezone.utc).")
        return int(moment.timestamp())
    if type(moment) is not int:
        raise ConfigurationError(
            f"{name}= takes a datetime with a time zone or Unix seconds (an int), not {_kind(moment)}."
        )
    if abs(moment) > LAST_SECOND:
        raise ConfigurationError(f"{name}={moment} is too far away for Unix seconds; are these milliseconds?")
    return moment


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
