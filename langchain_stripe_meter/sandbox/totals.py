"""What events add up to on a meter: Stripe's three formulas, and the windows of event summaries."""

from __future__ import annotations

import hashlib
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.records import DAY, AcceptedEvent, Meter
from langchain_stripe_meter.sandbox.replies import Json, bad_parameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WINDOWS = {"hour": 3600, "day": DAY}


def aggregate(meter: Meter, events: Iterable[AcceptedEvent]) -> Decimal:
    """What ``events`` add up to; cancelled and rejected ones count for nothing."""
    counted = sorted((event for event in events if event.billed), key=lambda event: (event.timestamp, event.created))
    if meter.event_time_window is not None:
        # Only the newest event of each window counts, which is why deltas under-bill on such a meter.
        counted = list({event.timestamp // WINDOWS[meter.event_time_window]: event for event in counted}.values())
    if meter.formula == "count":
        return Decimal(len(counted))
    if meter.formula == "last":
        return counted[-1].value if counted else Decimal(0)
    with localcontext() as context:
        context.prec = 60
        return sum((event.value for event in counted), Decimal(0))


def summaries(
    meter: Meter, customer: str, events: Sequence[AcceptedEvent], span: tuple[int, int], grouping: str | None
) -> list[Json]:
    """Meter event summaries, newest first; a window in which nothing happened has none."""
    start, end = span
    width = WINDOWS[grouping] if grouping else 60
    _check_span(start, end, width)
    width = width if grouping else end - start
    windows: dict[int, list[AcceptedEvent]] = {}
    for event in events:
        if start <= event.timestamp < end and event.billed:
            windows.setdefault(start + (event.timestamp - start) // width * width, []).append(event)
    return [
        _summary(meter, customer, (opens, opens + width), windows[opens]) for opens in sorted(windows, reverse=True)
    ]


def _check_span(start: int, end: int, width: int) -> None:
    for name, moment in (("start_time", start), ("end_time", end)):
        if moment % width:
            raise bad_parameter(
                f"{name} must be aligned with {_WIDTHS[width]} boundaries (UTC); {moment} is not.", name
            )
    if end <= start:
        raise bad_parameter("end_time must be after start_time.", "end_time")


_WIDTHS = {60: "minute", 3600: "hour", DAY: "day"}


def _summary(meter: Meter, customer: str, span: tuple[int, int], events: list[AcceptedEvent]) -> Json:
    facts = f"{meter.id} {customer} {span[0]} {span[1]}"
    return {
        "id": f"mtrusg_{hashlib.sha256(facts.encode()).hexdigest()[:20]}",
        "object": "billing.meter_event_summary",
        "aggregated_value": float(aggregate(meter, events)),
        "start_time": span[0],
        "end_time": span[1],
        "livemode": meter.livemode,
        "meter": meter.id,
    }
