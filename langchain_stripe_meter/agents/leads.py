"""A tool with which an agent notes the address that a user types into the chat. Off unless you make it.

**A typed address proves nothing.** Whoever types somebody else's e-mail has that person billed. Give an agent this tool
only where that does no harm: behind your own sign-in, or where you confirm the address before it is charged.
"""

from __future__ import annotations

import logging
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import Field, create_model

from langchain_stripe_meter.core.customers import By
from langchain_stripe_meter.core.leads import lead_fields
from langchain_stripe_meter.errors import ConfigurationError, InvalidValueError, MeteringError
from langchain_stripe_meter.handler import StripeMeterCallbackHandler
from langchain_stripe_meter.ledger.leads import BillFrom

logger = logging.getLogger("langchain_stripe_meter")

_CALLED: dict[str, str] = {"email": "e-mail address", "name": "full name", "phone": "phone number with country code"}


def capture_lead_tool(
    meter: StripeMeterCallbackHandler, by: By = "email", *, region: str | None = None, bill_from: BillFrom = "now"
) -> BaseTool:
    """A LangChain tool ``capture_lead`` that remembers who the user says they are, for ``from_lead(by=...)``.

    **A typed address proves nothing**: with this tool, whoever types somebody else's address has them billed.

    The session is that of the run (``thread_id``, ``session_id`` or ``conversation_id`` of its metadata, on an agent
    server only the ``thread_id``); the model never chooses it. ``region`` and ``bill_from`` are as in
    ``meter.leads.capture``. What was captured before, by your application or by this tool, is not replaced. The tool
    never raises into the agent, and never repeats what was typed.

    Raises:
        ConfigurationError: The handler's ``customer=`` does not read the lead's ``by``.
    """
    if by not in lead_fields(meter.customer):
        raise ConfigurationError(f"capture_lead_tool(by={by!r}) needs a handler with customer=from_lead(by={by!r}).")
    meter.leads.check_bill_from(bill_from)
    called = _CALLED[by]
    there = f"{'An' if by == 'email' else 'A'} {called} was noted before and stays as it is. Do not ask for it again."
    sorry = f"That is not a complete {called}. Ask the user to write it once more."

    def capture_lead(config: RunnableConfig, **typed: str) -> str:
        place = meter._recorder.place_of_lead(meter.facts_at_start(config.get("metadata")))
        if place is None:
            return "This conversation has no session, so nothing can be noted. Go on without it."
        try:
            account, session = place
            if not meter.leads.note(session, **typed, account=account, region=region, bill_from=bill_from):
                return there
        except InvalidValueError:
            return sorry
        except MeteringError as error:  # the chat must not break over it
            logger.error("stripe-meter: a lead could not be captured: %s", error)  # noqa: TRY400 - it would quote it
            return "This cannot be noted just now. Go on without it."
        return f"The {called} is noted. Thank the user."

    fields: Any = {by: (str, Field(description=f"The user's {called}, exactly as the user wrote it."))}
    return StructuredTool.from_function(
        capture_lead,
        description=f"Note the user's own {called}, after the user gave it of their own accord.",
        args_schema=create_model("CaptureLead", **fields),
        handle_validation_error=sorry,
    )
