"""``stripe_meter``: the handler for everything that runs in a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.reentry import inside

if TYPE_CHECKING:
    from langchain_stripe_meter.handler import StripeMeterCallbackHandler


@dataclass(eq=False)
class _Block:
    """One ``with stripe_meter(...)`` block; without its ``handler`` once it was left in another context."""

    handler: StripeMeterCallbackHandler | None


class _Blocks:
    """Where LangChain looks for the handler of the blocks around a run, as in a context variable. A block in a
    generator is left when that ends: maybe before those that were entered later, maybe in another context."""

    def __init__(self) -> None:
        self.around: ContextVar[tuple[_Block, ...]] = ContextVar("stripe_meter", default=())

    def standing(self, without: _Block | None = None) -> tuple[_Block, ...]:
        """The blocks around the present code, the innermost last."""
        return tuple(block for block in self.around.get() if block is not without and block.handler is not None)

    def get(self) -> StripeMeterCallbackHandler | None:
        return next((block.handler for block in self.around.get() if block.handler is not None), None)


_everywhere: WeakKeyDictionary[StripeMeterCallbackHandler, _Blocks] = WeakKeyDictionary()
_everywhere_lock = threading.Lock()


@contextmanager
def stripe_meter(handler: StripeMeterCallbackHandler) -> Iterator[StripeMeterCallbackHandler]:
    """Meter every run in the block, without touching its config.

    It follows context variables: tasks and runnables inside the block are metered, a plain ``threading.Thread`` is
    not. Blocks may nest; a run is billed once per meter.
    """
    if not isinstance(handler, BaseCallbackHandler):
        raise ConfigurationError(f"stripe_meter() takes a StripeMeterCallbackHandler, not {type(handler).__name__}.")
    with inside(), _everywhere_lock:
        if (blocks := _everywhere.get(handler)) is None:
            blocks = _everywhere[handler] = _Blocks()
            register_configure_hook(cast("ContextVar[Any]", blocks), inheritable=True)
    block = _Block(handler)
    token = blocks.around.set((*blocks.standing(), block))
    try:
        yield handler
    finally:
        others = blocks.standing(without=block)
        try:
            blocks.around.reset(token)
            blocks.around.set(others)
        except ValueError:  # entered in a context that is out of reach, where the block must not go on
            block.handler = None
