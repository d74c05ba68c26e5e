"""Estimates: what a call probably consumed, where its provider reports nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from conftest import wait_until
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from metering import Shop
from providers import OpenAIServer, Reply
from tiktoken import registry

from langchain_stripe_meter import estimate
from langchain_stripe_meter.estimate import Encodings, encoding_name, estimate_usage

JARGON = [
    SystemMessage(
        "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."
    ),
    SystemMessage("New synergies will help drive top-line growth.", name="example_user"),
    SystemMessage("Things working well together will increase revenue.", name="example_assistant"),
    SystemMessage(
        "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
        name="example_user",
    ),
    SystemMessage("Let's talk later when we're less busy about how to do better.", name="example_assistant"),
    HumanMessage("This late pivot means we don't have time to boil the ocean for the client deliverable."),
]
WEATHER = [
    SystemMessage("You are a helpful assistant that can answer to questions about the weather."),
    HumanMessage("What's the weather like in San Francisco?"),
]
UNIT = {"type": "string", "description": "The unit of temperature to return", "enum": ["celsius", "fahrenheit"]}
PLACE = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
SCHEMA = {"type": "object", "properties": {"location": PLACE, "unit": UNIT}, "required": ["location"]}
WEATHER_TOOL = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": SCHEMA,
}


def prompt_tokens(messages: list[BaseMessage], model: str, tools: Any = None) -> int | None:
    return estimate_usage(messages, tools, [], model).input


@pytest.fixture
def no_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has no vocabulary and reaches no network: every connection is refused at once."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setattr(estimate, "_ENCODINGS", Encodings())


# Counts that OpenAI has published beside what its API charged: "How to count tokens with tiktoken", in its cookbook


@pytest.mark.parametrize(("model", "tokens"), [("gpt-3.5-turbo", 129), ("gpt-4", 129), ("gpt-4o", 124)])
def test_a_prompt_of_messages_is_counted_as_openai_charged_it(model: str, tokens: int) -> None:
    assert prompt_tokens([*JARGON], model) == tokens


@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt-4o", 101), ("gpt-4o-mini", 101), ("gpt-4", 105), ("gpt-3.5-turbo", 105)]
)
def test_the_schemas_of_tools_are_counted_as_openai_charged_them(model: str, tokens: int) -> None:
    assert prompt_tokens([*WEATHER], model, [{"type": "function", "function": WEATHER_TOOL}]) == tokens


def test_the_same_prompt_without_its_tools_is_counted_as_openai_charged_it() -> None:
    assert prompt_tokens([*WEATHER], "gpt-4") == 34


def test_a_tool_counts_the_same_in_every_providers_shape() -> None:
    shapes = [
        {"type": "function", "function": WEATHER_TOOL},
        {"type": "function", **WEATHER_TOOL},
        {"name": WEATHER_TOOL["name"], "description": WEATHER_TOOL["description"], "input_schema": SCHEMA},
    ]
    assert {prompt_tokens([*WEATHER], "gpt-4o", [shape]) for shape in shapes} == {101}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search"},
        {"type": "function", "function": {"name": "ping"}},
        {"name": "deep", "parameters": {"properties": {"a": {"type": "array", "items": {"anyOf": [SCHEMA, True]}}}}},
        {"name": "odd", "parameters": {"properties": {"a": True, "b": {"enum": [None, 1]}}, "$defs": {"C": SCHEMA}}},
        "a name alone",
        {"type": "function", "function": "a name alone"},
        {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "properties": ["a"]}}},
        {"name": "odd", "input_schema": {"properties": {"a": {"enum": 5}}}},
        {"name": "odd", "input_schema": {"enum": True}},
        {("no", "json"): {1, 2}},
    ],
)
def test_tools_of_any_shape_add_something(tool: Any) -> None:
    assert (prompt_tokens([*WEATHER], "gpt-4o", [tool]) or 0) > 33 + 12


@pytest.mark.parametrize("tools", [{"function_declarations": [{"name": "f"}]}, 7, ({"name": "f"},)])
def test_tools_that_are_no_list_add_something_too(tools: Any) -> None:
    assert (prompt_tokens([*WEATHER], "gpt-4o", tools) or 0) > 33 + 12


# What else is in a call


def test_the_text_of_a_completion_has_nothing_around_it() -> None:
    usage = estimate_usage("one two three", None, ["four five"], "gpt-3.5-turbo-instruct")
    assert (usage.input, usage.output) == (3, 2)


def test_calls_of_tools_are_part_of_an_answer_even_where_their_arguments_are_not_json() -> None:
    call = {"name": "remind", "args": {"at": datetime(2026, 1, 1, tzinfo=UTC)}, "id": "1"}
    usage = estimate_usage([*WEATHER], None, [AIMessage("", tool_calls=[call])], "gpt-4o")
    assert (usage.output or 0) > 10


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|fim_prefix|> <|endofprompt|>", "\ud800 lone", "\x00", "🦊" * 10])
@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", None])
def test_no_text_is_too_odd_to_be_counted(text: str, model: str | None) -> None:
    usage = estimate_usage([HumanMessage(text)], None, [text], model)
    assert usage.estimated
    assert (usage.output or 0) >= 1


def test_where_the_tokenizer_gives_up_an_approximation_serves() -> None:
    usage = estimate_usage("Hi", None, [" " * 1_000_000], "gpt-4o")
    assert usage.output == 250_000


def test_nothing_at_all_is_no_output() -> None:
    usage = estimate_usage(None, None, [], None)
    assert (usage.input, usage.output) == (3, 0)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-2024-08-06", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("claude-sonnet-4-6", "o200k_base"),
        (None, "o200k_base"),
    ],
)
def test_a_model_has_its_vocabulary_and_an_unknown_one_that_of_current_models(model: str | None, name: str) -> None:
    assert encoding_name(model) == name


# Without a vocabulary


@pytest.mark.usefixtures("no_vocabulary")
def test_without_a_network_an_approximation_serves_and_is_marked_as_an_estimate() -> None:
    usage = estimate_usage(
        [*JARGON], [{"type": "function", "function": WEATHER_TOOL}], ["one two three four"], "gpt-4o"
    )
    assert usage.estimated
    assert 124 <= (usage.input or 0) <= 250
    assert 3 <= (usage.output or 0) <= 6


@pytest.mark.usefixtures("no_vocabulary")
def test_without_a_network_a_stream_without_usage_is_billed_all_the_same(tmp_path: Path) -> None:
    with OpenAIServer() as server, Shop(tmp_path) as shop:
        server.reply(Reply("one two three"))
        list(server.chat(stream_usage=False).stream("Hi", shop.config()))
        assert shop.rows()["out"].estimated
        assert shop.billed()["out"] >= 1


@pytest.mark.timeout(30)
def test_a_download_that_hangs_delays_only_the_first_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, loads = threading.Event(), []

    def hang(name: str) -> Any:
        loads.append(name)
        gate.wait()
        raise OSError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", hang)
    monkeypatch.setattr(estimate, "LOAD_SECONDS", 1)
    encodings = Encodings()
    try:
        assert [encodings.get("o200k_base") for _ in range(100)] == [None] * 100
        assert loads == ["o200k_base"]
    finally:
        gate.set()


def test_a_load_that_failed_is_tried_again_after_a_while_and_nobody_waits_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, again = tiktoken.get_encoding("o200k_base"), threading.Event()
    answers: list[Callable[[], Any]] = [lambda: 1 / 0, lambda: again.wait() and real]
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: answers.pop(0)())
    encodings = Encodings()
    assert [encodings.get("o200k_base") for _ in range(3)] == [None] * 3
    monkeypatch.setattr(estimate, "RETRY_SECONDS", -1000)
    monkeypatch.setattr(estimate, "LOAD_SECONDS", 1000)
    assert encodings.get("o200k_base") is None  # it hangs, and this returns
    monkeypatch.setattr(estimate, "RETRY_SECONDS", 600)
    assert encodings.get("o200k_base") is None
    again.set()
    wait_until(lambda: encodings.get("o200k_base") is real)


def test_where_no_thread_can_start_any_more_an_approximation_serves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    encodings = Encodings()
    assert [encodings.get("o200k_base") for _ in range(3)] == [None] * 3


def test_many_threads_load_a_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, loads = tiktoken.get_encoding, []

    def get(name: str) -> Any:
        loads.append(name)
        return real(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    encodings, start, found = Encodings(), threading.Barrier(16), []

    def load() -> None:
        start.wait()
        found.append(encodings.get("o200k_base"))

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["o200k_base"]
    assert None not in found


def test_a_vocabulary_is_never_loaded_nor_used_on_an_event_loops_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, threads = tiktoken.get_encoding, set()

    class Spy:
        """tiktoken's vocabulary, and the threads that it was used in."""

        def __init__(self, encoding: Any) -> None:
            self.encoding = encoding

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return self.encoding.encode(*args, **kwargs)

    def get(name: str) -> Any:
        threads.add(threading.get_ident())
        return Spy(real(name))

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setattr(estimate, "_ENCODINGS", Encodings())

    async def read(server: OpenAIServer, shop: Shop) -> None:
        async for _ in server.chat(stream_usage=False).astream("Hi", shop.config()):
            pass

    with OpenAIServer() as server, Shop(tmp_path) as shop:
        asyncio.run(read(server, shop))
        assert shop.rows()["out"].estimated
    assert threads
    assert threading.get_ident() not in threads


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + 20_000 * "A"}}


def test_an_image_in_a_prompt_counts_as_one_of_low_detail() -> None:
    text = {"type": "text", "text": "What is this?"}
    without = prompt_tokens([HumanMessage([text])], "gpt-4o") or 0
    assert prompt_tokens([HumanMessage([text, IMAGE, IMAGE])], "gpt-4o") == without + 2 * estimate.PER_IMAGE


WORDS = "word " * 1000


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_result", "tool_use_id": "1", "content": WORDS},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": WORDS}]},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": WORDS}},
        {"type": "search_result", "source": "https://example.com", "content": [{"type": "text", "text": WORDS}]},
        {"type": "text-plain", "text": WORDS, "mime_type": "text/plain"},
        {"type": "input_text", "text": WORDS},
        {"type": "function_call_output", "call_id": "1", "output": WORDS},
    ],
    ids=lambda block: block["type"],
)
def test_text_in_a_block_of_any_kind_is_a_part_of_the_prompt(block: dict[str, Any]) -> None:
    plain = prompt_tokens([HumanMessage(WORDS)], "gpt-4o")
    assert prompt_tokens([HumanMessage([block])], "gpt-4o") == plain


def test_an_image_that_a_tool_gave_counts_as_any_other() -> None:
    given = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "Here."}, IMAGE]}
    plain = prompt_tokens([HumanMessage("Here.")], "gpt-4o") or 0
    assert prompt_tokens([HumanMessage([given])], "gpt-4o") == plain + estimate.PER_IMAGE


def test_a_call_of_a_tool_counts_once_and_the_thoughts_before_it_not_at_all() -> None:
    """Providers leave the thoughts of earlier turns out of the prompt."""
    call = {"name": "look_up", "args": {"city": "Paris"}, "id": "1"}
    blocks = [{"type": "thinking", "thinking": WORDS}, {"type": "tool_use", "id": "1", "name": "look_up", "input": {}}]
    plain = prompt_tokens([AIMessage("", tool_calls=[call])], "gpt-4o")
    assert prompt_tokens([AIMessage(blocks, tool_calls=[call])], "gpt-4o") == plain


@pytest.mark.parametrize(
    "answer",
    [
        AIMessage("", additional_kwargs={"refusal": "I cannot help with that."}),
        AIMessage([{"type": "refusal", "refusal": "I cannot help with that."}]),
        AIMessage("", invalid_tool_calls=[{"name": "look_up", "args": '{"city": "Par', "id": "1", "error": None}]),
    ],
    ids=["refusal", "refusal as a block", "a call that broke off"],
)
def test_an_answer_that_is_no_text_counts(answer: AIMessage) -> None:
    assert (estimate_usage("Hi", None, [answer], "gpt-4o").output or 0) >= 5
