"""What a call probably consumed, where its provider reports nothing. Always marked as an estimate.

tiktoken downloads its vocabularies when it first needs them, without a time limit. So they are loaded by a helper
thread that is given a moment; until it succeeds (never, perhaps, without a network), LangChain's approximation serves.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.messages.utils import count_tokens_approximately

from langchain_stripe_meter.core.usage import Usage, beside_text
from langchain_stripe_meter.errors import logger
from langchain_stripe_meter.reentry import inside

if TYPE_CHECKING:
    from tiktoken import Encoding

LOAD_SECONDS = 1.0
"""How long estimates wait for a vocabulary, counted from when it was first asked for: enough to read one that is on
this machine."""
RETRY_SECONDS = 600.0
"""How long a load that failed, or hangs, is remembered; nobody waits for the next ones."""
DOWNLOAD_SECONDS = 15.0
"""How long somebody waits who asks whether it can be had."""
PER_MESSAGE = 3
PER_REPLY = 3
PER_TOOLS = 12
PER_TOOL = 7
PER_OLDER_TOOL = 10
PER_LINE = 3
"""Tokens that a chat prompt costs beyond its text: per message and reply, for having tools at all, and for each tool
(more for models before gpt-4o) and each line of its schema, as OpenAI's cookbook has them."""

PER_IMAGE = 85
"""Tokens of an image of low detail, as OpenAI counts them, and as LangChain's approximation counts each."""
_IMAGES = ("image", "image_url", "input_image")
_APART = (*_IMAGES, "tool_use", "tool_call", "function_call", "thinking", "reasoning")
"""Blocks of a prompt whose text is counted otherwise, or left out by the providers: the thoughts of earlier turns."""
_TEXTS = ("text", "refusal", "title", "context", "output", "content")
"""Where blocks hold text, or further blocks."""


class Encodings:
    """tiktoken's vocabularies, loaded once each, off the caller's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Encoding] = {}
        self._loading: dict[str, tuple[threading.Event, float]] = {}  # and until when it is waited for

    def get(self, name: str, patience: float | None = None) -> Encoding | None:
        """The vocabulary, or None while it cannot be had, by default after ``LOAD_SECONDS``."""
        encoding = self._loaded.get(name)
        if encoding is not None:
            return encoding
        now = time.monotonic()
        with inside(), self._lock:
            ready, until = self._loading.get(name, (None, now + (LOAD_SECONDS if patience is None else patience)))
            if ready is None or now - until > RETRY_SECONDS:
                until = until if ready is None else now
                ready = threading.Event()
                self._loading[name] = (ready, until)
                thread = threading.Thread(
                    target=self._load, args=(name, ready), name="stripe-meter-tiktoken", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down and starts no threads
                    ready.set()
        ready.wait(max(until - now, 0))
        return self._loaded.get(name)

    def _load(self, name: str, ready: threading.Event) -> None:
        try:
            import tiktoken

            self._loaded[name] = tiktoken.get_encoding(name)
        except Exception as error:  # noqa: BLE001 - a network fault of any kind; the approximation serves
            logger.info("stripe-meter: tiktoken has no %s here (%s); estimating without it", name, type(error).__name__)
        finally:
            ready.set()


_ENCODINGS = Encodings()


def has_vocabulary() -> bool:
    """Whether estimates can be close: whether the vocabulary of current models is here, or could be downloaded."""
    return _ENCODINGS.get("o200k_base", DOWNLOAD_SECONDS) is not None


def encoding_name(model: str | None) -> str:
    """The vocabulary of a model; o200k_base, that of current models, for names that tiktoken does not know."""
    from tiktoken.model import encoding_name_for_model

    try:
        return encoding_name_for_model(model or "")
    except KeyError:
        return "o200k_base"


def estimate_usage(prompt: Any, tools: Any, output: Sequence[BaseMessage | str], model: str | None) -> Usage:
    """Estimate a call: ``prompt`` is its messages or its text, ``tools`` the schemas it was given, ``output`` what
    came back, whole or in part. Never raises for lack of a vocabulary, and waits for it a second, once."""
    encoding = _ENCODINGS.get(encoding_name(model))
    return Usage(
        input=_count_prompt(prompt, encoding) + _count_tools(tools, encoding),
        output=sum(_count_output(item, encoding) for item in output),
        estimated=True,
    )


def _as_messages(prompt: Any) -> list[BaseMessage]:
    items = prompt if isinstance(prompt, list) else [prompt]
    return [item if isinstance(item, BaseMessage) else HumanMessage(str(item)) for item in items if item is not None]


def _count_prompt(prompt: Any, encoding: Encoding | None) -> int:
    if isinstance(prompt, str):  # a text completion: nothing is put around it
        return _count_text(prompt, encoding)
    messages = _as_messages(prompt)
    if encoding is None:
        return count_tokens_approximately(messages)
    total = PER_REPLY
    for message in messages:
        text = _content_text(message.content) + _calls(message)
        total += PER_MESSAGE + 1 + _count_text(text, encoding) + PER_IMAGE * _images(message.content)
        if message.name:
            total += 1 + _count_text(message.name, encoding)
    return total


def _count_output(item: BaseMessage | str, encoding: Encoding | None) -> int:
    if not isinstance(item, str):
        item = str(item.text) + _calls(item) + beside_text(item) + _unreadable_calls(item)
    return _count_text(item, encoding) if item else 0


def _count_tools(tools: Any, encoding: Encoding | None) -> int:
    if not tools:
        return 0
    each = PER_OLDER_TOOL if encoding is not None and encoding.name == "cl100k_base" else PER_TOOL
    several = tools if isinstance(tools, list | tuple) else [tools]
    return PER_TOOLS + sum(each + _count_tool(tool, encoding) for tool in several)


def _count_tool(tool: Any, encoding: Encoding | None) -> int:
    try:
        return _count_signature(tool, encoding)
    except Exception:  # noqa: BLE001 - a schema of a shape that nobody expected: all of it counts, marks included
        return _count_text(str(tool), encoding)


def _count_signature(tool: Any, encoding: Encoding | None) -> int:
    """Providers render a tool as a signature, so its names, types and descriptions count, and JSON's marks do not."""
    if not isinstance(tool, Mapping):
        return _count_text(json.dumps(tool, default=str), encoding)
    tool = tool.get("function") or tool
    title = f"{tool.get('name') or tool.get('type')}:{tool.get('description') or ''}".removesuffix(".")
    lines = _schema_lines(tool.get("parameters") or tool.get("input_schema"))
    return _count_text(title, encoding) + sum(PER_LINE + _count_text(line, encoding) for line in lines)


def _schema_lines(schema: Any) -> Iterator[str]:
    """One line for each property and each value of an enumeration, at any depth."""
    if isinstance(schema, list):
        for part in schema:
            yield from _schema_lines(part)
    if not isinstance(schema, Mapping):
        return
    for value in schema.get("enum") or ():
        yield str(value)
    for name, part in {**(schema.get("properties") or {}), **(schema.get("$defs") or {})}.items():
        about = part if isinstance(part, Mapping) else {}
        yield f"{name}:{about.get('type') or ''}:{about.get('description') or ''}".removesuffix(".")
        yield from _schema_lines(part)
    for key in ("items", "anyOf", "allOf", "oneOf"):
        yield from _schema_lines(schema.get(key))


def _count_text(text: str, encoding: Encoding | None) -> int:
    if encoding is None:
        return -(-len(text) // 4)  # LangChain's rule of thumb: four characters a token
    try:
        return len(encoding.encode(text, disallowed_special=()))
    except Exception:  # noqa: BLE001 - tiktoken gives up on some texts, such as a million spaces
        return _count_text(text, None)


def _content_text(content: Any) -> str:
    """The text of a message of the prompt, in blocks of any kind and depth: documents, results of tools."""
    if isinstance(content, list):
        return "".join(map(_content_text, content))
    if not isinstance(content, Mapping):
        return content if isinstance(content, str) else ""
    if content.get("type") in _APART:
        return ""
    source = content.get("source")
    told = source.get("data") if isinstance(source, Mapping) and source.get("type") == "text" else ""
    return _content_text(told) + "".join(_content_text(content.get(key)) for key in _TEXTS)


def _calls(message: BaseMessage) -> str:
    calls = getattr(message, "tool_calls", None)
    return json.dumps([[call["name"], call["args"]] for call in calls], default=str) if calls else ""


def _unreadable_calls(message: BaseMessage) -> str:
    """Calls of tools whose arguments are no JSON: maybe they broke off."""
    calls = getattr(message, "invalid_tool_calls", None) or ()
    return "".join(f"{call.get('name') or ''}{call.get('args') or ''}" for call in calls)


def _images(content: Any) -> int:
    blocks = [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []
    return sum(block.get("type") in _IMAGES or _images(block.get("content")) for block in blocks)
