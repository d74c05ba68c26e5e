"""``on_unidentified="raise"``: a run that names nobody who pays is refused before its model is called."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from langchain_stripe_meter.callbacks import MeteringCallbacks
from langchain_stripe_meter.core.customers import Facts, Skip
from langchain_stripe_meter.core.tenants import Untold
from langchain_stripe_meter.errors import UnidentifiedError
from langchain_stripe_meter.observed import facts_of, surrounding_run

logger = logging.getLogger("langchain_stripe_meter")


class _Gate:
    """The start of a model call, which may refuse it.

    LangChain awaits coroutine functions in its asynchronous flow, and loses what they raise in its synchronous one. So
    whoever can await is given a coroutine function where the ledger must be asked, and everybody else a plain one.
    """

    def __init__(self, start: Callable[..., None]) -> None:
        self._start = start
        self.__doc__ = start.__doc__

    def __get__(self, handler: RefusingCallbacks | None, owner: type | None = None) -> Any:
        if handler is None:
            return self
        start = self._start.__get__(handler)
        if not handler._refuses:
            return start
        if handler._recorder.needs_lookup and sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE:

            async def astarted(*args: Any, **kwargs: Any) -> None:
                facts = handler.facts_at_start(kwargs.get("metadata"), kwargs.get("parent_run_id"))
                await asyncio.to_thread(handler._check_payer, facts)
                start(*args, **kwargs)

            return astarted

        def started(*args: Any, **kwargs: Any) -> None:
            handler._check_payer(handler.facts_at_start(kwargs.get("metadata"), kwargs.get("parent_run_id")))
            start(*args, **kwargs)

        return started


class RefusingCallbacks(MeteringCallbacks):
    """The callbacks, with a gate before each model call."""

    _refuses = False

    on_chat_model_start = _Gate(MeteringCallbacks.on_chat_model_start)
    on_llm_start = _Gate(MeteringCallbacks.on_llm_start)

    @property
    def raise_error(self) -> bool:  # type: ignore[override]
        """LangChain asks this while it handles what an event raised.

        Only a refusal goes on into the chain, nothing else ever.
        """
        return isinstance(sys.exception(), UnidentifiedError)

    def facts_at_start(self, metadata: Mapping[str, Any] | None, parent_run_id: UUID | None = None) -> Facts:
        """Who could pay for a call that starts here and now, as it will be recorded; ``parent_run_id`` is as LangChain
        tells it of the call, if it does."""
        facts = facts_of(metadata, self._recorder.ledger.now())
        if facts.auth_user is not None:
            return facts
        user = self._runs.user_around(parent_run_id, surrounding_run() if parent_run_id is None else None)
        return facts if user is None else replace(facts, auth_user=user, on_server=True)

    def _check_payer(self, facts: Facts) -> None:
        try:
            _, who = self._recorder.payer(facts)
        except Exception as error:  # noqa: BLE001 - not to know is no reason to break the chain
            logger.error("stripe-meter: who pays could not be looked up: %s", type(error).__name__)  # noqa: TRY400
            return
        if isinstance(who, Skip) and not isinstance(who, Untold):
            raise UnidentifiedError(
                f"Nobody pays for this run: {who.reason}. It was refused before the model was called, as "
                "on_unidentified='raise' says."
            )
