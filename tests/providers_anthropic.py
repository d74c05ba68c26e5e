"""Anthropic's wire format: messages, plain and streamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from langchain_anthropic import ChatAnthropic
from providers_http import USUAL, Call, Event, Json, ProviderServer, pieces, without_none

if TYPE_CHECKING:
    from collections.abc import Iterator


def anthropic_usage(
    fresh: int = 12,
    output: int = 3,
    *,
    cache_read: int = 0,
    cache_creation: int = 0,
    ephemeral_5m: int | None = None,
    ephemeral_1h: int | None = None,
    thinking: int | None = None,
) -> Json:
    """Usage as Anthropic reports it: ``fresh`` input comes on top of what the cache read and wrote.

    With a time to live (``ephemeral_...``) the cache writes are the sum of both, and ``cache_creation`` is not used.
    """
    usage: Json = {"input_tokens": fresh, "cache_read_input_tokens": cache_read, "output_tokens": output}
    usage["cache_creation_input_tokens"] = cache_creation
    if ephemeral_5m is not None or ephemeral_1h is not None:
        lives = {"ephemeral_5m_input_tokens": ephemeral_5m or 0, "ephemeral_1h_input_tokens": ephemeral_1h or 0}
        usage |= {"cache_creation": lives, "cache_creation_input_tokens": sum(lives.values())}
    if thinking is not None:
        usage["output_tokens_details"] = {"thinking_tokens": thinking}
    return usage


class AnthropicServer(ProviderServer):
    """Speaks as Anthropic does; makes the client that talks to it."""

    @property
    def url(self) -> str:
        # The client itself adds /v1/messages.
        return self.origin

    def chat(self, model: str = "claude-sonnet-4-6", **kwargs: Any) -> ChatAnthropic:
        defaults: Json = {"base_url": self.url, "api_key": "test", "max_retries": 0}
        return ChatAnthropic(model_name=model, **{**defaults, **kwargs})

    def plain(self, call: Call) -> Json:
        _check_path(call)
        reason = {"stop_reason": _stop_reason(call), "stop_sequence": None}
        return {**_head(call), "content": _blocks(call), **reason, **without_none(usage=_usage(call))}

    def stream(self, call: Call) -> list[Event]:
        _check_path(call)
        return [*_opening(call), *_content(call), *_closing(call)]

    def error(self, status: int) -> Json:
        kind, message = _ERRORS.get(status, _ERRORS[500 if status >= 500 else 400])
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


_ERRORS = {
    400: ("invalid_request_error", "max_tokens: must be greater than or equal to 1"),
    401: ("authentication_error", "invalid x-api-key"),
    429: ("rate_limit_error", "This request would exceed your organization's rate limit."),
    500: ("api_error", "Internal server error"),
    529: ("overloaded_error", "Overloaded"),
}

_REPORTED_LAST = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
)
"""What ``message_delta`` may report: how long cache entries live is told only by ``message_start``."""


def _check_path(call: Call) -> None:
    if call.path != "/v1/messages":
        raise ValueError(f"no such path: {call.path}")


def _head(call: Call) -> Json:
    return {"id": f"msg_{call.number}", "type": "message", "role": "assistant", "model": call.model}


def _usage(call: Call) -> Json | None:
    usage = call.usage(anthropic_usage())
    return None if usage is None else {**usage, **without_none(service_tier=call.reply.service_tier)}


def _stop_reason(call: Call) -> str:
    reply = call.reply
    return reply.finish or ("refusal" if reply.refusal is not None else "tool_use" if reply.tool_calls else "end_turn")


def _blocks(call: Call) -> list[Json]:
    said = call.reply.text if call.reply.refusal is None else call.reply.refusal
    text = [{"type": "text", "text": said, "citations": None}] if said else []
    tools = [
        {"type": "tool_use", "id": f"toolu_{call.number}_{place}", "name": name, "input": dict(args)}
        for place, (name, args) in enumerate(call.reply.tool_calls)
    ]
    return text + tools


def _opening(call: Call) -> Iterator[Event]:
    usage = _usage(call)
    if usage is not None and "output_tokens" in usage:
        usage["output_tokens"] = min(1, usage["output_tokens"])
    begun = {"content": [], "stop_reason": None, "stop_sequence": None, **without_none(usage=usage)}
    yield Event({"type": "message_start", "message": {**_head(call), **begun}})
    yield Event({"type": "ping"})


def _content(call: Call) -> Iterator[Event]:
    for index, block in enumerate(_blocks(call)):
        empty: Json = {"text": ""} if block["type"] == "text" else {"input": {}}
        yield Event({"type": "content_block_start", "index": index, "content_block": {**block, **empty}})
        for delta in _deltas(block):
            yield Event({"type": "content_block_delta", "index": index, "delta": delta}, piece=True)
        yield Event({"type": "content_block_stop", "index": index})


def _deltas(block: Json) -> list[Json]:
    if block["type"] == "text":
        return [{"type": "text_delta", "text": piece} for piece in pieces(block["text"])]
    return [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]


def _closing(call: Call) -> Iterator[Event]:
    delta = {"stop_reason": _stop_reason(call), "stop_sequence": None}
    yield Event({"type": "message_delta", "delta": delta, **without_none(usage=_final_usage(call))})
    yield Event({"type": "message_stop"})


def _final_usage(call: Call) -> Json | None:
    if call.reply.final_usage is not USUAL:
        return None if call.reply.final_usage is None else dict(call.reply.final_usage)
    usage = _usage(call)
    return None if usage is None else {name: usage[name] for name in _REPORTED_LAST if name in usage}
