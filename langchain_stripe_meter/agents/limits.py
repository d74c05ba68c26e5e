"""Limits on what a customer may use: for agents as middleware, for everything else as a callback.

budget = Budget(meter, SpendLimit("ai_tokens_used", 100_000, per="month"))
agent = create_agent(model, tools, middleware=[SpendLimitMiddleware(budget)])
chain.invoke(question, config={"callbacks": [meter, SpendLimitCallback(budget)]})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from langchain_core.messages import AIMessage

from langchain_stripe_meter.agents.budget import (
    Allowance,
    Budget,
    Spender,
    SpendLimit,
    SpendLimitCallback,
    check_budget,
)
from langchain_stripe_meter.agents.credit import StripeCredit
from langchain_stripe_meter.core.events import is_async
from langchain_stripe_meter.errors import ConfigurationError, SpendLimitError, logger, place_of
from langchain_stripe_meter.workers import in_worker

try:
    from langchain.agents.middleware import AgentMiddleware, hook_config
except ModuleNotFoundError as error:
    raise ConfigurationError(
        "SpendLimitMiddleware needs langchain: pip install 'langchain-stripe-meter[agents]'. "
        "For chains without agents, import from langchain_stripe_meter.agents.budget."
    ) from error

__all__ = [
    "Allowance",
    "Budget",
    "SpendLimit",
    "SpendLimitCallback",
    "SpendLimitError",
    "SpendLimitMiddleware",
    "Spender",
    "StripeCredit",
]

Message = str | Callable[[SpendLimitError], str]


class SpendLimitMiddleware(AgentMiddleware):  # langchain 1.0.0 has fewer type parameters for it than later versions
    """Ends an agent's run before its next model call when the customer's budget is used up.

    Args:
        budget: What the customers may use.
        exit_behavior: ``"end"`` answers with a message instead of calling the model; ``"error"`` raises
            ``SpendLimitError``.
        message: What to answer: a text, or a callable that makes one of the ``SpendLimitError``. By default, that
            error's own words.

    It sees the agent's own model calls. Those of its tools, of a sub-agent without this middleware or of a summariser
    are counted all the same, and stopped by ``SpendLimitCallback``.
    """

    def __init__(
        self, budget: Budget, *, exit_behavior: Literal["end", "error"] = "end", message: Message = str
    ) -> None:
        super().__init__()
        check_budget(budget, "SpendLimitMiddleware")
        if exit_behavior not in ("end", "error"):
            raise ConfigurationError(f"exit_behavior={exit_behavior!r}: use 'end' or 'error'.")
        if not isinstance(message, str) and (not callable(message) or is_async(message)):
            raise ConfigurationError(
                f"message={message!r}: a text, or a plain function that makes one of the SpendLimitError."
            )
        self.budget = budget
        self._ends = exit_behavior == "end"
        self._message = message

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Check the budget of whoever pays for this run."""
        try:
            self.budget.check()
        except SpendLimitError as error:
            if not self._ends:
                raise
            return {"jump_to": "end", "messages": [AIMessage(self._said(error))]}
        return None

    def _said(self, error: SpendLimitError) -> str:
        """What to answer; where the application's own words fail, the error's."""
        if isinstance(self._message, str):
            return self._message
        try:
            return str(self._message(error))
        except Exception as own:  # noqa: BLE001 - it is the application's own
            logger.warning("stripe-meter: message= itself failed: %s at %s", type(own).__name__, place_of(own))
            return str(error)

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """As ``before_model``, without blocking the event loop."""
        return await in_worker(self.before_model, state, runtime)
