"""The one handler of this server: graph files are imported once for each graph in them, and this module only once.

Without a Stripe key it only records: see what with `stripe-meter tail`.
"""

import os

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_auth_user

meter = StripeMeterCallbackHandler(
    Tokens("ai_tokens_used"), customer=from_auth_user("stripe_customer_id"), deliver="STRIPE_API_KEY" in os.environ
)
