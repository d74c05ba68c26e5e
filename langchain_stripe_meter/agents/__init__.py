"""Metering where strangers start the runs: agent servers, LangServe, an application of one's own.

Who is believed about who pays:

- An agent server authenticates its users: ``from_auth_user`` reads whom it authenticated.
- Everywhere else the application does: ``metered_config`` replaces what a client said by what the application knows.
- A front end that must carry the customer's id itself carries a signed token: ``sign_customer`` makes it,
  ``from_signed_token`` reads it.
- An agent may note what a user types into the chat, where that does no harm: ``capture_lead_tool``.
"""

from langchain_stripe_meter.agents.servers import capture_lead_tool, from_signed_token, metered_config, sign_customer

__all__ = ["capture_lead_tool", "from_signed_token", "metered_config", "sign_customer"]
