"""One table, each cell a real run: path and ending by provider, what we bill next to what LangChain's handler records.

The table in the README is this one. After a change that is meant, write it anew: python tests/test_matrix.py
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.runnables import RunnableLambda
from metering import Shop, paid_by
from providers import AnthropicServer, OpenAIServer, Reply
from pydantic import BaseModel

from langchain_stripe_meter import Messages, Tokens

README = Path(__file__).parent.parent / "README.md"
PROVIDERS: dict[str, tuple[Any, str]] = {
    "OpenAI chat": (OpenAIServer, "chat"),
    "OpenAI Responses": (OpenAIServer, "responses_chat"),
    "Anthropic": (AnthropicServer, "chat"),
}
WORDS = Reply("one two three four five six")


class Person(BaseModel):
    name: str


class Case:
    """A provider's stand-in, a way to make its client, and a config with both handlers attached."""

    def __init__(self, server: Any, client: str, config: Any) -> None:
        self.server = server
        self.client = client
        self.config = config

    def model(self, **options: Any) -> Any:
        return getattr(self.server, self.client)(**options)


def invoke(case: Case) -> None:
    case.model().invoke("Hi", case.config)


def stream(case: Case) -> None:
    list(case.model().stream("Hi", case.config))


def astream(case: Case) -> None:
    async def read() -> None:
        async for _ in case.model().astream("Hi", case.config):
            pass

    asyncio.run(read())


def astream_events(version: Any) -> Callable[[Case], None]:
    async def read(case: Case) -> None:
        events: Any = case.model().astream_events("Hi", case.config, version=version)
        async for _ in (await events) if version == "v3" else events:
            pass
        # v3 tells the end in a task of its own, a moment after the last event, and LangChain's handler in a thread
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    def run(case: Case) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # v1 is deprecated, v3 is beta
            asyncio.run(read(case))

    return run


def batch(case: Case) -> None:
    case.model().batch(["a", "b"], case.config)


def two_choices(case: Case) -> None:
    if case.client != "chat" or isinstance(case.server, AnthropicServer):
        pytest.skip("only OpenAI's chat completions give several choices")
    case.model(n=2).invoke("Hi", case.config)


def cached_answer(case: Case) -> None:
    """The same question twice: the second answer comes from LangChain's cache."""
    set_llm_cache(InMemoryCache())
    try:
        model = case.model()
        model.invoke("Hi", case.config)
        model.invoke("Hi", case.config)
    finally:
        set_llm_cache(None)


def failing_batch(case: Case) -> None:
    case.server.reply(Reply(), Reply(status=400))
    case.model().batch(["a", "b"], {**case.config, "max_concurrency": 1}, return_exceptions=True)


def retried(case: Case) -> None:
    case.server.reply(Reply(status=500), Reply())
    case.model().with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke("Hi", case.config)


def fallback(case: Case) -> None:
    case.server.reply(Reply(status=500), Reply())
    case.model().with_fallbacks([case.model()]).invoke("Hi", case.config)


def unparsed(case: Case) -> None:
    """Structured output that does not parse, after it was paid for."""
    if case.client != "chat" or isinstance(case.server, AnthropicServer):
        pytest.skip("this client parses after the call has ended")
    case.server.reply(Reply('{"name": "Ada"'))
    with suppress(Exception):
        case.model().with_structured_output(Person).invoke("Who?", case.config)


def unreported(case: Case) -> None:
    case.server.reply(Reply("one two three", usage=None))
    case.model().invoke("Hi", case.config)


def left(case: Case) -> None:
    case.server.reply(WORDS)
    chunks = case.model().stream("Hi", case.config)
    while "three" not in str(next(chunks).text):
        pass
    chunks.close()


def cut(case: Case) -> None:
    case.server.reply(Reply(WORDS.text, break_after=3))
    with suppress(Exception):
        list(case.model().stream("Hi", case.config))


def cancelled(case: Case) -> None:
    """``ainvoke`` of a streaming model, cancelled when a piece has arrived: LangChain tells no end at all."""
    gate, arrived = threading.Event(), asyncio.Event()
    case.server.reply(Reply(WORDS.text, gate=gate))
    watch = Watch(arrived)
    config = {**case.config, "callbacks": [*case.config["callbacks"], watch]}
    chain = RunnableLambda(lambda question: question) | case.model(streaming=True)

    async def cancel() -> None:
        task = asyncio.create_task(chain.ainvoke("Hi", config))
        await asyncio.wait_for(arrived.wait(), 60)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    try:
        asyncio.run(cancel())
    finally:
        gate.set()


class Watch(UsageMetadataCallbackHandler):
    """Tells when a piece of text has arrived."""

    run_inline = True

    def __init__(self, arrived: asyncio.Event) -> None:
        super().__init__()
        self.arrived = arrived

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        if token:
            self.arrived.set()


RUNS: dict[str, Callable[[Case], None]] = {
    "invoke": invoke,
    "stream": stream,
    "astream": astream,
    "astream_events v1": astream_events("v1"),
    "astream_events v2": astream_events("v2"),
    "astream_events v3": astream_events("v3"),
    "batch of two": batch,
    "batch of two, the second fails": failing_batch,
    "two choices of one call (n=2)": two_choices,
    "the same question again, from LangChain's cache": cached_answer,
    "retry after an error": retried,
    "fallback after an error": fallback,
    "structured output that does not parse": unparsed,
    "the provider reports no usage": unreported,
    "stream left by its reader": left,
    "stream cut by the provider": cut,
    "ainvoke cancelled while it streams": cancelled,
}


@contextmanager
def measured(provider: str, run: Callable[[Case], None], folder: Path) -> Iterator[tuple[dict[str, Any], str, str]]:
    """What one run came to: our bill, and both cells of the table (``≈`` marks an estimate)."""
    server_type, client = PROVIDERS[provider]
    theirs = UsageMetadataCallbackHandler()
    meters = Tokens("tokens"), Messages("messages")
    with server_type() as server, Shop(folder, *meters) as shop:
        config = paid_by("cus_1", shop.handler)
        config["callbacks"].append(theirs)
        run(Case(server, client, config))
        billed = shop.billed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimated = any(row.estimated for row in _rows(shop))
        recorded = sum(usage["total_tokens"] for usage in theirs.usage_metadata.values())
        yield billed, f"{'≈ ' if estimated else ''}{billed.get('tokens', 0)}", str(recorded or "–")


def _rows(shop: Shop) -> Any:
    from langchain_stripe_meter.ledger.views import tail

    return tail(shop.handler._ledger, 100)


EXACT = {"batch of two": 30}
MESSAGES = {
    "batch of two": 2,
    "the same question again, from LangChain's cache": 2,
    "structured output that does not parse": None,
    "stream cut by the provider": None,
    "ainvoke cancelled while it streams": None,
}
ESTIMATED = {
    "the provider reports no usage",
    "stream left by its reader",
    "stream cut by the provider",
    "ainvoke cancelled while it streams",
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", RUNS)
def test_each_cell_bills_what_was_consumed_once_and_says_where_it_estimates(
    name: str, provider: str, tmp_path: Path
) -> None:
    with measured(provider, RUNS[name], tmp_path) as (billed, ours, _theirs):
        assert billed.get("messages") == MESSAGES.get(name, 1)
        if name in ESTIMATED:
            # "Hi" costs 8 tokens as a chat prompt; of the answer, three words had come, or one
            assert ours.startswith("≈ ")
            assert 9 <= billed["tokens"] <= 12
        else:
            assert ours == str(EXACT.get(name, 15))


def table() -> str:
    """The README's table: ours and LangChain's, for each path and provider."""
    head = " | ".join(f"{provider}: ours | LangChain's" for provider in PROVIDERS)
    lines = [f"| run | {head} |", "|---" * (1 + 2 * len(PROVIDERS)) + "|"]
    for name, run in RUNS.items():
        cells = []
        for provider in PROVIDERS:
            try:
                with tempfile.TemporaryDirectory() as folder, measured(provider, run, Path(folder)) as (_, *both):
                    cells += both
            except pytest.skip.Exception:
                cells += ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_readmes_table_is_what_these_runs_measure() -> None:
    text, measured_now = README.read_text(), table()
    assert [line for line in measured_now.splitlines() if line not in text] == []
    assert measured_now in text


if __name__ == "__main__":
    text = README.read_text()
    start, end = text.index("| run | "), text.index("\n\n", text.index("| run | "))
    README.write_text(text[:start] + table() + text[end:])
