"""How an application is told what goes wrong: the log, and its own ``on_error``."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from langchain_stripe_meter.errors import MeteringError, OnError, logger
from langchain_stripe_meter.workers import Workers

telling = Workers(1, "stripe-meter-on-error")
"""One thread, so that what comes first is told first."""


def tell(on_error: OnError | None, error: MeteringError) -> None:
    """Log ``error`` and hand it on."""
    logger.warning("stripe-meter: %s", error)
    hand_on(on_error, error)


def hand_on(on_error: OnError | None, error: MeteringError) -> None:
    """Call ``on_error``, if there is one, in a thread of ours where an event loop runs in this one: it may write a file
    or send a mail. Where it fails, that is logged and stops nothing."""
    if on_error is None:
        return
    if asyncio._get_running_loop() is not None:
        with suppress(RuntimeError):  # the interpreter is shutting down and starts no threads: better to block
            telling.submit(_call, on_error, error)
            return
    _call(on_error, error)


def _call(on_error: OnError, error: MeteringError) -> None:
    try:
        on_error(error)
    except Exception as own:  # noqa: BLE001 - it is the application's own
        logger.warning("stripe-meter: on_error itself failed: %s", type(own).__name__)
