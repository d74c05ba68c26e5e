"""How the audit tells what a person must know: one log line, and ``on_error``."""

from __future__ import annotations

import logging
from collections.abc import Callable

from langchain_stripe_meter.errors import MeteringError

logger = logging.getLogger("langchain_stripe_meter")

OnError = Callable[[MeteringError], None]


def tell(on_error: OnError | None, error: MeteringError) -> None:
    """Log ``error`` and hand it on; a callback that fails is logged and stops nothing."""
    logger.warning("stripe-meter: %s", error)
    if on_error is None:
        return
    try:
        on_error(error)
    except Exception as own:  # noqa: BLE001 - the caller's callback must not stop the audit
        logger.warning("stripe-meter: on_error itself failed: %s", type(own).__name__)
