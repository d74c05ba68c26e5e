"""Whether Stripe's meters can bill what they are sent: asked at the start, by the doctor, and before sending."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from langchain_stripe_meter.errors import ConfigurationError, StripeError
from langchain_stripe_meter.gateway.client import Gateway, MeterInfo


def problem_with(event_name: str, info: MeterInfo | None) -> str | None:
    """Why usage sent to ``info``, Stripe's meter of this name or None, would be billed wrongly, and what to do."""
    if info is not None:
        return info.problem
    return (
        f"Stripe has no meter with the event name {event_name!r}; create it "
        f"(stripe-meter meters create {shlex.quote(event_name)}), or correct the name"
    )


def check_meters(gateway: Gateway, wanted: Mapping[str, Iterable[str]], account: str = "") -> None:
    """Refuse meters of an account that cannot bill what they will be sent. Asks Stripe anew.

    ``wanted`` maps event names to the payload keys that are sent along as dimensions. Raises ``ConfigurationError``,
    which names every wrong meter; ``StripeError`` where Stripe does not say.
    """
    gateway.forget_meters(account)
    found = {name: gateway.meter(name, account) for name in wanted}
    if not gateway.can_read_meters(account):
        raise StripeError("The key may not read meters. Give it 'Billing meters: Read', so that they can be checked.")
    problems = [
        problem
        for name, info in found.items()
        if (problem := problem_with(name, info) or _clash(info, wanted[name])) is not None
    ]
    if problems:
        raise ConfigurationError(f"{len(problems)} of {len(found)} meters cannot be billed on: {'; '.join(problems)}.")


def _clash(info: MeterInfo | None, dimensions: Iterable[str]) -> str | None:
    """A dimension that would lose its place in the payload to the customer or the value."""
    taken = sorted({info.customer_key, info.value_key}.intersection(dimensions)) if info is not None else []
    if not taken or info is None:
        return None
    return (
        f"the meter {info.event_name!r} takes the customer or the value from {taken[0]!r}, where a dimension goes; "
        "make one with other keys"
    )
