"""The stand-ins for LLM providers are understood by the real clients, as the providers themselves would be."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add as add_up
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from conftest import wait_until
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from providers import (
    AnthropicServer,
    OpenAIServer,
    ProviderServer,
    Reply,
    anthropic_usage,
    openai_usage,
    responses_usage,
)
from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.outputs import LLMResult


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture(autouse=True, scope="module")
def _no_socket_is_left_open() -> Iterator[None]:
    yield
    gc.collect()  # what was not closed warns now, not in somebody else's module


class Speaker(NamedTuple):
    """A stand-in, and the method that makes the client of one of its formats."""

    server: type[ProviderServer]
    client: str

    def to(self, server: ProviderServer, **kwargs: Any) -> Any:
        return getattr(server, self.client)(**kwargs)


CHAT = Speaker(OpenAIServer, "chat")
RESPONSES = Speaker(OpenAIServer, "responses_chat")
COMPLETION = Speaker(OpenAIServer, "completion")
ANTHROPIC = Speaker(AnthropicServer, "chat")

chat_models = pytest.mark.parametrize(
    "speaker", [CHAT, RESPONSES, ANTHROPIC], ids=["openai chat", "openai responses", "anthropic"]
)
all_models = pytest.mark.parametrize(
    "speaker",
    [CHAT, RESPONSES, COMPLETION, ANTHROPIC],
    ids=["openai chat", "openai responses", "openai completion", "anthropic"],
)


def _invoke(model: Any) -> Any:
    return model.invoke("Hi")


def _ainvoke(model: Any) -> Any:
    return asyncio.run(model.ainvoke("Hi"))


def _stream(model: Any) -> Any:
    return reduce(add_up, model.stream("Hi"))


def _astream(model: Any) -> Any:
    async def collect() -> Any:
        return [chunk async for chunk in model.astream("Hi")]

    return reduce(add_up, asyncio.run(collect()))


PLAIN = [_invoke, _ainvoke]
STREAMS = [_stream, _astream]
every_way = pytest.mark.parametrize("run", PLAIN + STREAMS, ids=["invoke", "ainvoke", "stream", "astream"])
every_stream = pytest.mark.parametrize("run", STREAMS, ids=["stream", "astream"])


def _metadata(input_tokens: int, output_tokens: int, inputs: dict[str, int], outputs: dict[str, int] | None) -> Any:
    total = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens}
    details = {"input_token_details": inputs}
    return {**total, **details, **({} if outputs is None else {"output_token_details": outputs})}


# What the clients make of each report

OPENAI_DETAILS = openai_usage(100, 40, cached=64, cache_written=20, audio_in=8, reasoning=16, audio_out=4)
RESPONSES_DETAILS = responses_usage(100, 40, cached=64, cache_written=20, reasoning=16)
CACHED = anthropic_usage(100, 40, cache_read=64, cache_creation=32, thinking=16)
LIVES = anthropic_usage(100, 40, cache_read=64, ephemeral_5m=20, ephemeral_1h=12)


def _tier(name: str) -> dict[str, tuple[Speaker, Reply, Any]]:
    cached = {f"{name}_cache_read": 64, name: 36}
    reasoning = {f"{name}_reasoning": 16, name: 24}
    chat = openai_usage(100, 40, cached=64, reasoning=16)
    responses = responses_usage(100, 40, cached=64, reasoning=16)
    return {
        f"openai chat, {name} tier": (
            CHAT,
            Reply(usage=chat, service_tier=name),
            _metadata(100, 40, {"audio": 0, **cached}, {"audio": 0, **reasoning}),
        ),
        f"openai responses, {name} tier": (
            RESPONSES,
            Reply(usage=responses, service_tier=name),
            _metadata(100, 40, cached, reasoning),
        ),
    }


REPORTS: dict[str, tuple[Speaker, Reply, Any]] = {
    "openai chat": (CHAT, Reply(), _metadata(12, 3, {"audio": 0, "cache_read": 0}, {"audio": 0, "reasoning": 0})),
    "openai chat, details": (
        CHAT,
        Reply(usage=OPENAI_DETAILS),
        _metadata(100, 40, {"audio": 8, "cache_read": 64, "cache_creation": 20}, {"audio": 4, "reasoning": 16}),
    ),
    "openai chat, sums only": (
        CHAT,
        Reply(usage={"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}),
        _metadata(12, 3, {}, {}),
    ),
    "openai chat, unreported": (CHAT, Reply(usage=None), None),
    "openai responses": (RESPONSES, Reply(), _metadata(12, 3, {"cache_read": 0}, {"reasoning": 0})),
    "openai responses, details": (
        RESPONSES,
        Reply(usage=RESPONSES_DETAILS),
        _metadata(100, 40, {"cache_read": 64, "cache_creation": 20}, {"reasoning": 16}),
    ),
    "openai responses, cut short": (
        RESPONSES,
        Reply(finish="max_output_tokens"),
        _metadata(12, 3, {"cache_read": 0}, {"reasoning": 0}),
    ),
    "openai responses, unreported": (RESPONSES, Reply(usage=None), None),
    **_tier("flex"),
    **_tier("priority"),
    "anthropic": (ANTHROPIC, Reply(), _metadata(12, 3, {"cache_read": 0, "cache_creation": 0}, None)),
    "anthropic, details": (
        ANTHROPIC,
        Reply(usage=CACHED),
        _metadata(196, 40, {"cache_read": 64, "cache_creation": 32}, {"reasoning": 16}),
    ),
    "anthropic, without input": (ANTHROPIC, Reply(usage={"output_tokens": 3}), _metadata(0, 3, {}, None)),
    # LangChain makes zeros of a missing report, so that nobody can tell it from an empty one.
    "anthropic, unreported": (ANTHROPIC, Reply(usage=None), _metadata(0, 0, {}, None)),
}


@every_way
@pytest.mark.parametrize("report", REPORTS)
def test_the_usage_that_a_provider_reports_reaches_the_message(report: str, run: Callable[[Any], Any]) -> None:
    speaker, reply, expected = REPORTS[report]
    with speaker.server() as server:
        server.reply(reply)
        message = run(speaker.to(server))
    assert message.text == "Hello!"
    assert message.usage_metadata == expected


@pytest.mark.parametrize("run", PLAIN)
def test_anthropic_says_how_long_cache_entries_live_in_plain_answers(run: Callable[[Any], Any]) -> None:
    lives = {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 12}
    with AnthropicServer() as server:
        server.reply(Reply(usage=LIVES))
        message = run(server.chat())
    assert message.usage_metadata == _metadata(196, 40, {"cache_read": 64, "cache_creation": 0, **lives}, None)


@every_stream
def test_an_anthropic_stream_ends_with_the_sum_of_cache_writes(run: Callable[[Any], Any]) -> None:
    with AnthropicServer() as server:
        server.reply(Reply(usage=LIVES))
        message = run(server.chat())
    assert message.usage_metadata == _metadata(196, 40, {"cache_read": 64, "cache_creation": 32}, None)


@every_stream
def test_a_last_report_without_input_loses_the_input_told_at_the_start(run: Callable[[Any], Any]) -> None:
    with AnthropicServer() as server:
        server.reply(Reply(usage=anthropic_usage(1210, 3), final_usage={"output_tokens": 3}))
        message = run(server.chat())
    assert message.usage_metadata == _metadata(0, 3, {}, None)


@every_stream
def test_openai_streams_no_usage_unless_asked(run: Callable[[Any], Any]) -> None:
    with OpenAIServer() as server:
        message = run(server.chat(stream_usage=None))
    assert message.usage_metadata is None
    assert "stream_options" not in server.requests[0]


def test_every_one_of_n_choices_repeats_the_full_usage() -> None:
    with OpenAIServer() as server:
        generations = server.chat(n=2).generate([[HumanMessage("Hi")]]).generations[0]
    assert [choice.message.usage_metadata["total_tokens"] for choice in generations] == [15, 15]  # type: ignore[union-attr]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_legacy_completions_report_usage_beside_the_generations(asynchronous: bool) -> None:
    with OpenAIServer() as server:
        model = server.completion()
        result = asyncio.run(model.agenerate(["a", "b"])) if asynchronous else model.generate(["a", "b"])
    assert [generations[0].text for generations in result.generations] == ["Hello!", "Hello!"]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"] == {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    assert [body["prompt"] for body in server.requests] == [["a", "b"]]


@every_way
def test_legacy_completions_are_read_as_text(run: Callable[[Any], Any]) -> None:
    with OpenAIServer() as server:
        server.reply(Reply("one two  three "))
        assert run(server.completion()) == "one two  three "


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["unasked", "asked"])
def test_legacy_streams_report_usage_only_to_those_who_ask(options: dict[str, Any]) -> None:
    with OpenAIServer() as server:
        # Not through `stream`: LangChain drops the report, so that only the client below it can show that it came.
        *_, last = server.completion().client.create(model="any", prompt="Hi", stream=True, **options)
    assert (last.usage and last.usage.total_tokens) == (15 if options else None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_embeddings_are_vectors_one_for_each_text(asynchronous: bool) -> None:
    with OpenAIServer() as server:
        model = server.embeddings()
        vectors = asyncio.run(model.aembed_documents(["a", "b"])) if asynchronous else model.embed_documents(["a", "b"])
    assert vectors == [[0.25, 0.5, -1.0]] * 2


# What else an answer may be


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@every_way
@chat_models
def test_tool_calls_arrive_with_their_arguments(speaker: Speaker, run: Callable[[Any], Any]) -> None:
    with speaker.server() as server:
        server.reply(Reply("", tool_calls=[("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})]))
        message = run(speaker.to(server).bind_tools([add]))
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [
        ("add", {"a": 1, "b": 2}),
        ("add", {"a": 3, "b": 4}),
    ]
    assert message.usage_metadata["total_tokens"] == 15
    assert server.requests[0]["tools"]


@every_way
def test_openai_refuses_in_a_field_of_its_own(run: Callable[[Any], Any]) -> None:
    with OpenAIServer() as server:
        server.reply(Reply(refusal="I cannot do that."))
        message = run(server.responses_chat())
    assert [block["refusal"] for block in message.content] == ["I cannot do that."]


@every_way
def test_anthropic_refuses_with_a_stop_reason(run: Callable[[Any], Any]) -> None:
    with AnthropicServer() as server:
        server.reply(Reply(refusal="I cannot do that."))
        message = run(server.chat())
    assert message.response_metadata["stop_reason"] == "refusal"


class Person(BaseModel):
    name: str


class Errors(BaseCallbackHandler):
    """Keeps what LangChain tells of failed runs."""

    def __init__(self) -> None:
        self.responses: list[LLMResult] = []

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.responses.append(kwargs["response"])


@pytest.mark.parametrize("text", ['{"name": "Ada"', '{"age": 36}'], ids=["cut short", "of another shape"])
def test_malformed_structured_output_was_paid_for(text: str) -> None:
    errors = Errors()
    with OpenAIServer() as server:
        server.reply(Reply(text))
        with pytest.raises(ValidationError):
            server.chat().with_structured_output(Person).invoke("Who?", {"callbacks": [errors]})
    message = errors.responses[0].generations[0][0].message  # type: ignore[union-attr]
    assert message.response_metadata["body"]["usage"]["total_tokens"] == 15


@chat_models
def test_well_formed_structured_output_is_parsed(speaker: Speaker) -> None:
    as_tool = Reply("", tool_calls=[("Person", {"name": "Ada"})])
    with speaker.server() as server:
        server.reply(as_tool if speaker is ANTHROPIC else Reply('{"name": "Ada"}'))
        assert speaker.to(server).with_structured_output(Person).invoke("Who?") == Person(name="Ada")


@all_models
def test_a_body_can_be_sent_as_it_stands(speaker: Speaker) -> None:
    with speaker.server() as server:
        server.reply(Reply(status=502, body="<html>Bad Gateway</html>"))
        with pytest.raises(Exception, match=r"Bad Gateway|502") as caught:
            speaker.to(server).invoke("Hi")
    assert caught.value.status_code == 502  # type: ignore[attr-defined]


def test_the_model_is_the_one_asked_for_unless_scripted() -> None:
    with OpenAIServer() as server:
        server.reply(Reply(), Reply(model="gpt-4o-2024-08-06"))
        names = [server.chat().invoke("Hi").response_metadata["model_name"] for _ in range(2)]
    assert names == ["gpt-4o", "gpt-4o-2024-08-06"]


# What may go wrong

BROKEN_OFF = "peer closed connection|Connection error"
"""As httpx says it, or as a client does that hides httpx."""


@every_way
@all_models
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "could not be understood|must be greater than"),
        (401, "Incorrect API key|invalid x-api-key"),
        (429, "ate limit"),
        (500, "server had an error|server error"),
        (529, "erver|verload"),
    ],
)
def test_a_scripted_status_raises_with_the_providers_words(
    speaker: Speaker, run: Callable[[Any], Any], status: int, words: str
) -> None:
    with speaker.server() as server:
        server.reply(Reply(status=status))
        with pytest.raises(Exception, match=words) as caught:
            run(speaker.to(server))
    assert caught.value.status_code == status  # type: ignore[attr-defined]


@all_models
def test_replies_go_out_in_order_so_that_a_retry_succeeds(speaker: Speaker) -> None:
    with speaker.server() as server:
        server.reply(Reply(status=429), Reply(status=500), Reply("At last"))
        answer = speaker.to(server, max_retries=2).invoke("Hi")
        again = speaker.to(server).invoke("Hi")
    assert [getattr(each, "text", each) for each in (answer, again)] == ["At last", "At last"]
    assert len(server.requests) == 4


def _text(chunk: Any) -> str:
    return chunk if isinstance(chunk, str) else str(chunk.text)


def _read(model: Any, heard: list[str]) -> None:
    for chunk in model.stream("Hi"):
        if text := _text(chunk):
            heard.append(text)  # noqa: PERF401  (what was heard before an error counts)


def _aread(model: Any, heard: list[str]) -> None:
    async def read() -> None:
        async for chunk in model.astream("Hi"):
            if text := _text(chunk):
                heard.append(text)  # noqa: PERF401

    asyncio.run(read())


every_reader = pytest.mark.parametrize("read", [_read, _aread], ids=["stream", "astream"])


@every_reader
@all_models
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_dropped_stream_delivers_the_pieces_before_the_break(
    speaker: Speaker, read: Callable[[Any, list[str]], None], after: int
) -> None:
    heard: list[str] = []
    with speaker.server() as server:
        server.reply(Reply("one two three", break_after=after))
        with pytest.raises(Exception, match=BROKEN_OFF):
            read(speaker.to(server), heard)
    assert heard == ["one", " two", " three"][:after]


@every_reader
@all_models
def test_a_provider_may_report_an_error_in_mid_stream(speaker: Speaker, read: Callable[[Any, list[str]], None]) -> None:
    heard: list[str] = []
    with speaker.server() as server:
        server.reply(Reply("one two three", break_after=2, status=500))
        with pytest.raises(Exception, match=r"[Ss]erver"):
            read(speaker.to(server), heard)
    assert heard == ["one", " two"]


@all_models
def test_a_dropped_plain_answer_never_arrives(speaker: Speaker) -> None:
    with speaker.server() as server:
        server.reply(Reply(break_after=0))
        with pytest.raises(Exception, match="Connection error"):
            speaker.to(server).invoke("Hi")
    assert len(server.requests) == 1


@all_models
def test_a_gate_holds_a_stream_after_its_first_piece(speaker: Speaker) -> None:
    gate = threading.Event()
    with speaker.server() as server:
        server.reply(Reply("one two", gate=gate))
        chunks = (text for chunk in speaker.to(server).stream("Hi") if (text := _text(chunk)))
        assert next(chunks) == "one"
        assert not gate.is_set()
        gate.set()
        assert list(chunks) == [" two"]


@all_models
def test_a_call_can_be_cancelled_while_the_provider_works_on_it(speaker: Speaker) -> None:
    async def cancel(server: ProviderServer) -> None:
        call = asyncio.create_task(speaker.to(server).ainvoke("Hi"))
        await asyncio.to_thread(server.wait_for_requests)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    with speaker.server() as server:
        server.reply(Reply(gate=threading.Event()))
        asyncio.run(cancel(server))


@all_models
def test_a_client_may_leave_a_stream(speaker: Speaker) -> None:
    with speaker.server() as server:
        server.reply(Reply("word " * 1000, gate=threading.Event()))
        chunks = speaker.to(server).stream("Hi")
        next(chunks)
        chunks.close()


@all_models
def test_many_calls_are_answered_at_once(speaker: Speaker) -> None:
    gate = threading.Event()
    with speaker.server() as server:
        server.reply(Reply(gate=gate))
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(speaker.to(server).invoke, "Hi") for _ in range(8)]
            server.wait_for_requests(8)
            assert not any(answer.done() for answer in answers)
            gate.set()


# A mistake in a script is not silent


def test_a_break_beyond_the_last_piece_is_a_mistake() -> None:
    def ask() -> None:
        with OpenAIServer() as server:
            server.reply(Reply("one two", break_after=3))
            with pytest.raises(Exception, match=BROKEN_OFF):
                list(server.chat().stream("Hi"))

    with pytest.raises(ExceptionGroup, match="stand-in failed") as caught:
        ask()
    assert "has 2" in str(caught.value.exceptions[0])


def test_a_path_that_nobody_speaks_is_a_mistake() -> None:
    def ask() -> None:
        with AnthropicServer() as server, pytest.raises(Exception, match="Connection error"):
            server.chat(base_url=f"{server.url}/elsewhere").invoke("Hi")

    with pytest.raises(ExceptionGroup, match="stand-in failed"):
        ask()


def test_waiting_for_requests_that_never_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("providers_http.PATIENCE", 0.01)
    with OpenAIServer() as server, pytest.raises(TimeoutError, match="0 of 1"):
        server.wait_for_requests()
