"""The one handler of this server. The server imports graph files once per graph, so it lives in a module of its own."""

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_auth_user

meter = StripeMeterCallbackHandler(Tokens("ai_tokens_used"), customer=from_auth_user("stripe_customer_id"))
