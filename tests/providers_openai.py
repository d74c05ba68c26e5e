"""OpenAI's wire formats: chat completions, responses, legacy completions and embeddings."""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from providers_http import CREATED, Call, Event, Json, ProviderServer, pieces, without_none

if TYPE_CHECKING:
    from collections.abc import Iterator


def openai_usage(
    prompt: int = 12,
    completion: int = 3,
    *,
    cached: int = 0,
    cache_written: int | None = None,
    audio_in: int = 0,
    reasoning: int = 0,
    audio_out: int = 0,
) -> Json:
    """Usage as chat completions report it: details are parts of ``prompt`` and ``completion``."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": without_none(
            cached_tokens=cached, audio_tokens=audio_in, cache_write_tokens=cache_written
        ),
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": audio_out,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def responses_usage(
    prompt: int = 12, completion: int = 3, *, cached: int = 0, cache_written: int | None = None, reasoning: int = 0
) -> Json:
    """Usage as the responses API reports it."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": without_none(cached_tokens=cached, cache_write_tokens=cache_written),
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


class OpenAIServer(ProviderServer):
    """Speaks as OpenAI does; makes the clients that talk to it."""

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    def chat(self, model: str = "gpt-4o", **kwargs: Any) -> ChatOpenAI:
        """A client of chat completions. ``stream_usage=None`` is LangChain's own default: no usage when streaming."""
        return ChatOpenAI(model=model, **{**self._client(), "stream_usage": True, **kwargs})

    def responses_chat(self, model: str = "gpt-4o", **kwargs: Any) -> ChatOpenAI:
        return self.chat(model, **{"use_responses_api": True, **kwargs})

    def completion(self, model: str = "gpt-3.5-turbo-instruct", **kwargs: Any) -> OpenAI:
        return OpenAI(model=model, **{**self._client(), **kwargs})

    def embeddings(self, model: str = "text-embedding-3-small", **kwargs: Any) -> OpenAIEmbeddings:
        # The length check would have tiktoken download its vocabulary.
        return OpenAIEmbeddings(model=model, **{**self._client(), "check_embedding_ctx_length": False, **kwargs})

    def _client(self) -> Json:
        return {"base_url": self.url, "api_key": "test", "max_retries": 0}

    def plain(self, call: Call) -> Json:
        formats = {
            "/v1/chat/completions": _chat,
            "/v1/responses": _response,
            "/v1/completions": _completion,
            "/v1/embeddings": _embeddings,
        }
        return formats[call.path](call)

    def stream(self, call: Call) -> list[Event]:
        formats = {
            "/v1/chat/completions": _chat_events,
            "/v1/responses": _response_events,
            "/v1/completions": _completion_events,
        }
        return list(formats[call.path](call))

    def error(self, status: int) -> Json:
        message, kind, code = _ERRORS.get(status, _ERRORS[500 if status >= 500 else 400])
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}

    def error_event(self, call: Call) -> Event:
        error = self.error(call.reply.status)
        if call.path != "/v1/responses":
            return Event(error)
        return Event({**error["error"], "type": "error", "sequence_number": 99})


_ERRORS = {
    400: ("Invalid value: the request could not be understood.", "invalid_request_error", None),
    401: ("Incorrect API key provided: test.", "invalid_request_error", "invalid_api_key"),
    429: ("Rate limit reached on requests per min (RPM): Limit 3.", "requests", "rate_limit_exceeded"),
    500: ("The server had an error while processing your request.", "server_error", None),
}


# Chat completions


def _chat(call: Call) -> Json:
    choices = [
        {"index": index, "message": _chat_message(call), "logprobs": None, "finish_reason": _finish(call)}
        for index in range(call.n)
    ]
    return _envelope(call, "chat.completion", choices, **without_none(usage=call.usage(openai_usage())))


def _chat_message(call: Call) -> Json:
    reply = call.reply
    message: Json = {"role": "assistant", "content": reply.text or None, "refusal": reply.refusal}
    if reply.refusal is not None:
        message["content"] = None
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": _tool_id(call, place), "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}
            for place, (name, args) in enumerate(reply.tool_calls)
        ]
    return message


def _chat_events(call: Call) -> Iterator[Event]:
    yield from _chat_chunks(call, {"role": "assistant", "content": "", "refusal": None})
    for count, delta in enumerate(_chat_deltas(call), 1):
        so_far = {"usage": openai_usage(12, count)} if call.reply.running else {}
        for event in _chat_chunks(call, delta, piece=True):
            yield event._replace(data={**event.data, **so_far}) if isinstance(event.data, dict) else event
    yield from _chat_chunks(call, {}, finish=_finish(call))
    yield from _usage_chunk(call, "chat.completion.chunk", openai_usage())
    yield Event("[DONE]")


def _chat_deltas(call: Call) -> Iterator[Json]:
    said = "content" if call.reply.refusal is None else "refusal"
    for piece in pieces(call.reply.refusal or call.reply.text):
        yield {said: piece}
    for index, (name, args) in enumerate(call.reply.tool_calls):
        start = {"name": name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": _tool_id(call, index), "type": "function", "function": start}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": json.dumps(args)}}]}


def _chat_chunks(call: Call, delta: Json, *, finish: str | None = None, piece: bool = False) -> Iterator[Event]:
    """The same delta of every choice, each in a chunk of its own, as the API sends them."""
    for index in range(call.n):
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        yield Event(_envelope(call, "chat.completion.chunk", [choice], **_no_usage_yet(call)), piece)


# Legacy completions


def _completion(call: Call) -> Json:
    choices = [_completion_choice(index, call.reply.text, _finish(call)) for index in range(_completion_count(call))]
    return _envelope(call, "text_completion", choices, **without_none(usage=call.usage(_completion_usage())))


def _completion_events(call: Call) -> Iterator[Event]:
    for piece in pieces(call.reply.text):
        for index in range(_completion_count(call)):
            choices = [_completion_choice(index, piece, None)]
            yield Event(_envelope(call, "text_completion", choices, **_no_usage_yet(call)), piece=True)
    for index in range(_completion_count(call)):
        choices = [_completion_choice(index, "", _finish(call))]
        yield Event(_envelope(call, "text_completion", choices, **_no_usage_yet(call)))
    yield from _usage_chunk(call, "text_completion", _completion_usage())
    yield Event("[DONE]")


def _completion_choice(index: int, text: str, finish: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _completion_count(call: Call) -> int:
    """One request may carry many prompts: the choices of the first come first, the usage is that of all."""
    prompts = call.body["prompt"]
    return call.n * (1 if isinstance(prompts, str) else len(prompts))


def _completion_usage() -> Json:
    usage = openai_usage()
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


# What both kinds of completions share


def _envelope(call: Call, kind: str, choices: list[Json], **fields: Any) -> Json:
    head = {"id": f"cmpl-{call.number}", "object": kind, "created": CREATED, "model": call.model}
    return {**head, "choices": choices, **without_none(service_tier=call.reply.service_tier), **fields}


def _usage_wanted(call: Call) -> bool:
    """Streams report usage only to those who ask."""
    asked = (call.body.get("stream_options") or {}).get("include_usage", False)
    return bool(asked) and call.reply.usage is not None


def _no_usage_yet(call: Call) -> Json:
    return {"usage": None} if _usage_wanted(call) else {}


def _usage_chunk(call: Call, kind: str, usual: Json) -> Iterator[Event]:
    if _usage_wanted(call):
        yield Event(_envelope(call, kind, [], usage=call.usage(usual)))


def _finish(call: Call) -> str:
    return call.reply.finish or ("tool_calls" if call.reply.tool_calls else "stop")


def _tool_id(call: Call, place: int) -> str:
    return f"call_{call.number}_{place}"


# Embeddings


def _embeddings(call: Call) -> Json:
    inputs = call.body["input"] if isinstance(call.body["input"], list) else [call.body["input"]]
    vector = [0.25, 0.5, -1.0]
    packed = base64.b64encode(struct.pack("<3f", *vector)).decode()
    embedding = packed if call.body.get("encoding_format") == "base64" else vector
    data = [{"object": "embedding", "index": index, "embedding": embedding} for index in range(len(inputs))]
    usage = call.usage({"prompt_tokens": 12, "total_tokens": 12})
    return {"object": "list", "data": data, "model": call.model, **without_none(usage=usage)}


# Responses


def _response(call: Call) -> Json:
    usage = without_none(usage=call.usage(responses_usage()))
    return {**_response_head(call), "status": _status(call), **_incomplete(call), "output": _items(call), **usage}


def _response_head(call: Call) -> Json:
    return {
        "id": f"resp_{call.number}",
        "object": "response",
        "created_at": CREATED,
        "status": "in_progress",
        "model": call.model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "tool_choice": "auto",
        "tools": [],
        **without_none(service_tier=call.reply.service_tier),
    }


def _status(call: Call) -> str:
    return "completed" if call.reply.finish is None else "incomplete"


def _incomplete(call: Call) -> Json:
    """Here ``Reply.finish`` is the reason why an answer is incomplete, as in ``max_output_tokens``."""
    return {"incomplete_details": call.reply.finish and {"reason": call.reply.finish}}


def _items(call: Call) -> list[Json]:
    says = [_message_item(call)] if call.reply.text or call.reply.refusal else []
    return says + [_function_item(call, place) for place in range(len(call.reply.tool_calls))]


def _message_item(call: Call) -> Json:
    item = {"id": f"msg_{call.number}", "type": "message", "role": "assistant", "status": "completed"}
    return {**item, "content": [_part(call, call.reply.refusal or call.reply.text)]}


def _part(call: Call, text: str) -> Json:
    if call.reply.refusal is not None:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _function_item(call: Call, place: int) -> Json:
    name, args = call.reply.tool_calls[place]
    ids = {"id": f"fc_{call.number}_{place}", "call_id": _tool_id(call, place)}
    return {**ids, "type": "function_call", "name": name, "arguments": json.dumps(args), "status": "completed"}


def _response_events(call: Call) -> Iterator[Event]:
    """The events in their order, numbered as the API numbers them."""
    for number, event in enumerate(_unnumbered(call)):
        assert isinstance(event.data, dict)
        yield Event({**event.data, "sequence_number": number}, event.piece)


def _unnumbered(call: Call) -> Iterator[Event]:
    for kind in ("response.created", "response.in_progress"):
        yield Event({"type": kind, "response": _response_head(call)})
    for index, item in enumerate(_items(call)):
        said = _message_events if item["type"] == "message" else _function_events
        yield Event({"type": "response.output_item.added", "output_index": index, "item": _begun(item)})
        yield from said(call, index, item)
        yield Event({"type": "response.output_item.done", "output_index": index, "item": item})
    yield Event({"type": f"response.{_status(call)}", "response": _response(call)})


def _begun(item: Json) -> Json:
    empty: Json = {"content": []} if item["type"] == "message" else {"arguments": ""}
    return {**item, "status": "in_progress", **empty}


def _message_events(call: Call, index: int, item: Json) -> Iterator[Event]:
    place = {"item_id": item["id"], "output_index": index, "content_index": 0}
    kind, text = ("output_text", call.reply.text) if call.reply.refusal is None else ("refusal", call.reply.refusal)
    whole = {"text": text, "logprobs": []} if kind == "output_text" else {"refusal": text}
    yield Event({"type": "response.content_part.added", **place, "part": _part(call, "")})
    for piece in pieces(text):
        yield Event({"type": f"response.{kind}.delta", **place, "delta": piece, "logprobs": []}, piece=True)
    yield Event({"type": f"response.{kind}.done", **place, **whole})
    yield Event({"type": "response.content_part.done", **place, "part": _part(call, text)})


def _function_events(call: Call, index: int, item: Json) -> Iterator[Event]:
    place = {"item_id": item["id"], "output_index": index}
    kind = "response.function_call_arguments"
    yield Event({"type": f"{kind}.delta", **place, "delta": item["arguments"]}, piece=True)
    yield Event({"type": f"{kind}.done", **place, "name": item["name"], "arguments": item["arguments"]})
