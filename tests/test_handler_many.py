"""Many runs, threads, loops and tasks on one handler: memory stays flat, nobody is mixed up, nothing is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import stripe
import tiktoken
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from metering import Shop, paid_by
from providers import OpenAIServer, Reply

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, estimate, from_lead, from_metadata
from langchain_stripe_meter.core.runs import ABANDONED_AFTER
from langchain_stripe_meter.estimate import Encodings
from langchain_stripe_meter.ledger.views import tail


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def recorder(path: Path, *meters: Any, **options: Any) -> StripeMeterCallbackHandler:
    """A handler that only records."""
    defaults: dict[str, Any] = {"customer": from_metadata("stripe_customer_id"), "deliver": False}
    return StripeMeterCallbackHandler(
        *(meters or (Tokens("tokens"),)), ledger=f"sqlite:///{path}", **{**defaults, **options}
    )


def test_a_hundred_thousand_runs_leave_no_trace_in_memory(path: Path) -> None:
    clock = [1_790_000_000.0]
    result = LLMResult(generations=[[ChatGeneration(message=AIMessage("", usage_metadata=None))]])
    with recorder(path, Tokens("tokens"), on_missing_usage="ignore", clock=lambda: clock[0]) as handler:
        for number in range(50_000):
            root, call = UUID(int=2 * number), UUID(int=2 * number + 1)
            handler.on_chain_start({}, {}, run_id=root)
            handler.on_chat_model_start({}, [[]], run_id=call, parent_run_id=root)
            if number % 2:  # every other call is cancelled, and never says so
                handler.on_llm_end(result, run_id=call)
            handler.on_chain_end({}, run_id=root)
            clock[0] += 1
        status = handler.status()
    assert status.open_runs <= 2000
    assert status.abandoned >= 24_000
    assert len(handler._batches) == 0


def speaking(answer: str = "Hello") -> GenericFakeChatModel:
    """A model in memory, since sixty-four threads would be too many for one HTTP stand-in."""
    usage = {"input_tokens": 12, "output_tokens": 3, "total_tokens": 15}
    return GenericFakeChatModel(messages=iter(lambda: AIMessage(answer, usage_metadata=usage), None))  # type: ignore[arg-type]


def test_sixty_four_threads_with_a_loop_each_never_mix_up_their_customers(path: Path) -> None:
    people, start = 64, threading.Barrier(64)

    def work(number: int) -> None:
        model, config = speaking(), paid_by(f"cus_{number}", handler)
        start.wait()

        async def several() -> None:
            await asyncio.gather(*(model.ainvoke("Hi", config) for _ in range(number % 5)))

        asyncio.run(several())
        model.invoke("Hi", config)

    with recorder(path, synchronous="NORMAL") as handler, ThreadPoolExecutor(people) as pool:
        list(pool.map(work, range(people)))
        rows = tail(handler._ledger, 1000)
    counts = {f"cus_{number}": sum(row.customer == f"cus_{number}" for row in rows) for number in range(people)}
    assert counts == {f"cus_{number}": number % 5 + 1 for number in range(people)}
    assert {row.value for row in rows} == {15}


def test_tasks_of_one_loop_never_mix_up_their_leads(path: Path) -> None:
    with recorder(path, customer=from_lead(by="email")) as handler:
        for number in range(20):
            handler.leads.capture(f"s{number}", email=f"person{number}@example.com")

        async def ask(number: int) -> None:
            config: Any = {"callbacks": [handler], "metadata": {"session_id": f"s{number % 25}"}}
            await speaking().ainvoke("Hi", config)

        async def main() -> None:
            await asyncio.gather(*(ask(number) for number in range(100)))

        asyncio.run(main())
        assert handler.status().skipped == 20
        with handler._ledger.read() as connection:
            named = connection.exec_driver_sql("SELECT reference, count(*) FROM readings GROUP BY 1").fetchall()
    assert dict(map(tuple, named)) == {None: 20, **{f"email:person{number}@example.com": 4 for number in range(20)}}


def test_a_client_of_the_callers_own_is_used_as_it_is(shop: Shop) -> None:
    own = stripe.StripeClient(shop.sandbox.api_key, base_addresses={"api": shop.sandbox.url})
    with shop.another_handler(stripe=own) as handler:
        assert handler._courier is not None
        assert handler._courier.gateway.client is own


@pytest.mark.parametrize("again", [False, True], ids=["cancelled once", "cancelled again"])
def test_a_task_cancelled_while_its_end_is_recorded_loses_nothing(
    again: bool, path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Web servers (anyio) deliver a cancellation again at every await, also at those of the end of a run."""
    estimating, gate, real = threading.Event(), threading.Event(), tiktoken.get_encoding

    def get(name: str) -> Any:
        estimating.set()
        gate.wait(60)
        return real(name)

    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setattr(estimate, "_ENCODINGS", Encodings())
    server.reply(Reply("one two three", usage=None))

    async def main() -> None:
        task = asyncio.create_task(server.chat().ainvoke("Hi", paid_by("cus_1", handler)))
        await asyncio.to_thread(estimating.wait, 60)
        for _ in range(1 + again):
            task.cancel()
            await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with recorder(path) as handler:
        asyncio.run(main())
        handler.flush()
        (row,) = tail(handler._ledger)
    assert row.estimated


def test_an_open_run_is_counted_until_it_is_given_up(path: Path) -> None:
    clock = [1_790_000_000.0]
    with recorder(path, clock=lambda: clock[0]) as handler:
        handler.on_chat_model_start({}, [[]], run_id=UUID(int=1))
        assert handler.status().open_runs == 1
        clock[0] += ABANDONED_AFTER
        assert (handler.status().open_runs, handler.status().abandoned) == (0, 1)
