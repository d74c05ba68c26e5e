"""Stand-ins for LLM providers on 127.0.0.1, so that tests drive the real LangChain clients without a network.

    with OpenAIServer() as server:
        server.reply(Reply("Good morning", usage=openai_usage(100, 20, cached=64)), Reply(status=429))
        message = server.chat().invoke("Hi")

What every stand-in shares is in `providers_http`, each provider's words are in the module of its name.
"""

from __future__ import annotations

from providers_anthropic import AnthropicServer, anthropic_usage
from providers_http import USUAL, Call, ProviderServer, Reply
from providers_openai import OpenAIServer, openai_usage, responses_usage

__all__ = [
    "USUAL",
    "AnthropicServer",
    "Call",
    "OpenAIServer",
    "ProviderServer",
    "Reply",
    "anthropic_usage",
    "openai_usage",
    "responses_usage",
]
