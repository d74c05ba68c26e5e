"""``with stripe_meter(handler)``: metering everywhere at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from langchain_core.tracers.context import register_configure_hook

from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.reentry import inside

_everywhere: weakref.WeakKeyDictionary[StripeMeterCallbackHandler, ContextVar[StripeMeterCallbackHandler | None]]
_everywhere = weakref.WeakKeyDictionary()
_everywhere_lock = threading.Lock()


@contextmanager
def stripe_meter(handler: StripeMeterCallbackHandler) -> Iterator[StripeMeterCallbackHandler]:
    """Meter every run in the block, without touching its config.

    It follows context variables: tasks and runnables inside the block are metered, a plain ``threading.Thread`` is
    not. Blocks may nest; a run is billed once per meter.
    """
    with inside(), _everywhere_lock:
        variable = _everywhere.get(handler)
        if variable is None:
            variable = ContextVar(f"stripe_meter_{id(handler)}", default=None)
            register_configure_hook(variable, inheritable=True)
            _everywhere[handler] = variable
    token = variable.set(handler)
    try:
        yield handler
    finally:
        variable.reset(token)
