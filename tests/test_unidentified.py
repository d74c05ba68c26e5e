"""Runs that name nobody who pays: counted and shown, refused, or paid by a default customer."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from metering import Shop
from pydantic import Field
from sqlalchemy import insert

from langchain_stripe_meter import Messages, Tokens, first_of, from_lead, from_metadata, static, stripe_meter
from langchain_stripe_meter.cli.demo import ScriptedModel, says
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError, UnidentifiedError
from langchain_stripe_meter.ledger.schema import pruned
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.ledger.views import PRUNED, Skipped

# LangChain leaves the coroutines of its other handlers unawaited when one handler refuses.
pytestmark = pytest.mark.filterwarnings(r"ignore:(?s).*ahandle_event")

METERS = Tokens("tokens"), Messages("messages")
LEAD_OR_ID = first_of(from_metadata("stripe_customer_id"), from_lead())


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, *METERS, customer=LEAD_OR_ID, on_unidentified="raise") as shop:
        shop.sandbox.create_customer(id="cus_ann", email="ann@example.com")
        yield shop


class Counting(ScriptedModel):
    """Counts how often it was really called."""

    calls: list[int] = Field(default_factory=list)

    def _next(self) -> AIMessage:
        self.calls.append(1)
        return super()._next()


def model() -> Counting:
    return Counting(script=[says("Hello there", 10, 5)], calls=[])


# -- refused


async def stream(runnable: Any, question: Any, config: Any) -> None:
    async for _ in runnable.astream(question, config):
        pass


async def events(runnable: Any, question: Any, config: Any) -> None:
    async for _ in runnable.astream_events(question, config, version="v2"):
        pass


WAYS: dict[str, Any] = {
    "invoke": lambda run, question, config: run.invoke(question, config),
    "stream": lambda run, question, config: list(run.stream(question, config)),
    "batch": lambda run, question, config: run.batch([question], config),
    "ainvoke": lambda run, question, config: asyncio.run(run.ainvoke(question, config)),
    "astream": lambda run, question, config: asyncio.run(stream(run, question, config)),
    "astream_events": lambda run, question, config: asyncio.run(events(run, question, config)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", [LEAD_OR_ID, from_metadata("stripe_customer_id")])
@pytest.mark.parametrize("as_agent", [False, True])
def test_a_run_without_a_payer_is_refused_before_the_model_is_called(
    shop: Shop, way: str, source: Any, as_agent: bool
) -> None:
    handler = shop.another_handler(customer=source)
    fake = model()
    run, question = (create_agent(fake, []), {"messages": [HumanMessage("Hi")]}) if as_agent else (fake, "Hi")
    with pytest.raises(UnidentifiedError, match=r"stripe_customer_id.*before the model was called"):
        WAYS[way](run, question, {"callbacks": [handler], "metadata": {"session_id": "s1"}})
    gc.collect()
    assert fake.calls == []
    assert (handler.status().open_runs, handler.status().skipped) == (0, 0)
    WAYS[way](run, question, {"callbacks": [handler], "metadata": {"stripe_customer_id": "cus_1"}})
    assert len(fake.calls) == 1
    assert shop.billed() == {"tokens": 15, "messages": 1}


def test_a_run_is_let_through_once_its_lead_is_captured(shop: Shop) -> None:
    fake, config = model(), {"callbacks": [shop.handler], "metadata": {"session_id": "s1"}}
    with pytest.raises(UnidentifiedError):
        fake.invoke("Hi", config)
    shop.handler.leads.capture("s1", email="ann@example.com")
    fake.invoke("Hi", config)
    asyncio.run(fake.ainvoke("Hi", config))
    assert shop.billed("cus_ann") == {"tokens": 30, "messages": 2}


def test_a_synchronous_run_inside_a_running_loop_is_refused_too(shop: Shop) -> None:
    """As in a notebook, where LangChain would lose what a coroutine raises."""
    fake = model()

    async def cell() -> None:
        fake.invoke("Hi", {"callbacks": [shop.handler]})

    with pytest.raises(UnidentifiedError):
        asyncio.run(cell())
    assert fake.calls == []


def test_text_completion_models_and_blocks_are_refused_too(shop: Shop) -> None:
    with stripe_meter(shop.handler), pytest.raises(UnidentifiedError):
        FakeListLLM(responses=["Hi"]).invoke("Hello")
    with stripe_meter(shop.handler), pytest.raises(UnidentifiedError):
        asyncio.run(FakeListLLM(responses=["Hi"]).ainvoke("Hello"))


def test_the_loop_goes_on_while_the_ledger_is_asked_for_the_lead(shop: Shop) -> None:
    """The reading of leads is locked until the loop has done something else."""
    config: Any = {"callbacks": [shop.handler], "metadata": {"session_id": "s1"}}
    shop.handler.leads.capture("s1", email="ann@example.com")
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with shop.handler._ledger.read():
            taken.set()
            assert free.wait(60)

    async def main() -> None:
        holder = threading.Thread(target=hold)
        holder.start()
        assert taken.wait(60)
        run = asyncio.create_task(model().ainvoke("Hi", config))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not run.done()
        free.set()
        await run
        holder.join()

    asyncio.run(main())
    assert shop.billed("cus_ann") == {"tokens": 15, "messages": 1}


def test_nothing_else_is_ever_raised_into_the_chain(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with shop.handler._ledger.database.lane("record").transaction() as connection:
        connection.exec_driver_sql("DROP TABLE leads")
    config: Any = {"callbacks": [shop.handler], "metadata": {"session_id": "s1"}}
    assert model().invoke("Hi", config).content
    assert asyncio.run(model().ainvoke("Hi", config)).content
    assert caplog.text.count("who pays could not be looked up: LedgerError") == 2
    assert not shop.handler.raise_error
    try:
        int("a bug")
    except ValueError:
        assert not shop.handler.raise_error


# -- a default customer, and the default policy


def test_a_default_customer_pays_for_who_names_nobody(tmp_path: Path) -> None:
    for number, default in enumerate(["cus_2", static(id="cus_2"), from_metadata("house")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Shop(folder, *METERS, customer=LEAD_OR_ID, on_unidentified=default) as shop:
            config: Any = {"callbacks": [shop.handler], "metadata": {"session_id": "s1", "house": "cus_2"}}
            model().invoke("Hi", config)
            model().invoke("Hi", shop.config("cus_1"))
            assert (shop.billed("cus_1"), shop.billed("cus_2")) == ({"tokens": 15, "messages": 1},) * 2
            assert shop.handler.skips() == []


@pytest.mark.parametrize("policy", ["refuse", "", "CUS_1", 7, None])
def test_an_unknown_policy_is_refused(tmp_path: Path, policy: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"on_unidentified|customer="), Shop(tmp_path, on_unidentified=policy):
        pass


# -- what was skipped is seen


def test_skips_are_shown_per_day_meter_and_reason_and_name_nobody(tmp_path: Path) -> None:
    with Shop(tmp_path, *METERS, customer=from_lead()) as shop:
        day = shop.handler._ledger.now() // 86_400 * 86_400
        for number in range(3):
            model().invoke("Hi", {"callbacks": [shop.handler], "metadata": {"session_id": f"s{number}"}})
        model().invoke("Hi", {"callbacks": [shop.handler], "metadata": {"lead": {"email": "canary-no-address"}}})
        facts: dict[str, Any] = {"state": ReadingState.SKIPPED, "reason": "the lead has no email"}
        odd = [Decimal("0.1"), Decimal("123456789012345"), None]
        shop.handler._ledger.record(
            [Entry(f"k{at}", "tokens", value, day - 86_400, **facts) for at, value in enumerate(odd)]
        )
        shown = shop.handler.skips()
        before, today = (datetime.fromtimestamp(at, UTC).date().isoformat() for at in (day - 86_400, day))
        assert shown == [
            Skipped(before, "tokens", "the lead has no email", 3, Decimal("123456789012345.1"), 1),
            Skipped(today, "messages", "the customer's email is malformed", 1, Decimal(1), 0),
            Skipped(today, "messages", "the lead has no email", 3, Decimal(3), 0),
            Skipped(today, "tokens", "the customer's email is malformed", 1, Decimal(15), 0),
            Skipped(today, "tokens", "the lead has no email", 3, Decimal(45), 0),
        ]
        assert shop.handler.skips(since=datetime.fromtimestamp(day, UTC)) == shown[1:]
        assert "<td>123456789012345.1</td>" in shown._repr_html_()
        assert "canary" not in repr(shown)


def test_what_was_pruned_still_counts_as_skipped(tmp_path: Path) -> None:
    with Shop(tmp_path, *METERS) as shop:
        row = {"event_name": "tokens", "customer": "", "day": 86_400, "state": "skipped"}
        with shop.handler._ledger.deliver_lane().transaction() as connection:
            connection.execute(insert(pruned).values(**row, amount="12.5", readings=3))
        assert shop.handler.skips() == [Skipped("1970-01-02", "tokens", PRUNED, 3, Decimal("12.5"), 0)]


def test_a_run_with_an_unknown_amount_is_counted_as_such(tmp_path: Path) -> None:
    with Shop(tmp_path, Tokens("tokens"), on_missing_usage="hold") as shop:
        GenericFakeChatModel(messages=iter(["Hi"])).invoke("Hello", {"callbacks": [shop.handler]})
        (shown,) = shop.handler.skips()
        assert (shown.readings, shown.value, shown.unknown) == (1, 0, 1)
