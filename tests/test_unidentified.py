"""Runs that name nobody who pays: counted and shown, refused, or paid by a default customer."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListLLM, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from metering import Shop
from pydantic import Field
from sqlalchemy import insert

from langchain_stripe_meter import (
    Messages,
    Tokens,
    first_of,
    from_context,
    from_lead,
    from_metadata,
    static,
    stripe_meter,
)
from langchain_stripe_meter.cli.demo import ScriptedModel, says
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.errors import ConfigurationError, LedgerError, UnidentifiedError
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
    assert caplog.text.count("who pays could not be looked up: LedgerError") == 3  # let through twice, held
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


@pytest.mark.parametrize("policy", ["refuse", "canary@example.com", "", "CUS_1", 7, None])
def test_an_unknown_policy_is_refused(tmp_path: Path, policy: Any) -> None:
    refused = pytest.raises(ConfigurationError, match=r"on_unidentified|customer=")
    with refused as caught, Shop(tmp_path, on_unidentified=policy):
        pass
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["cus-ann", "ann@example.com", 7])
def test_neither_a_default_customer_nor_a_lead_pays_for_who_is_named_wrongly(tmp_path: Path, wrong: Any) -> None:
    with Shop(tmp_path, *METERS, customer=LEAD_OR_ID, on_unidentified="cus_2") as shop:
        shop.handler.leads.capture("s1", email="ann@example.com")
        config: Any = {"session_id": "s1", "stripe_customer_id": wrong}
        model().invoke("Hi", {"callbacks": [shop.handler], "metadata": config})
        assert shop.billed() == {}
        assert [(one.reason, one.readings) for one in shop.handler.skips()] == [
            ("the customer's id is malformed; it looks like 'cus_123'", 1),
            ("the customer's id is malformed; it looks like 'cus_123'", 1),
        ]
        assert shop.handler.leads.capture("s1", email="ann@example.com", bill_from="first_message") == 0


# -- who pays could not be looked up


def test_who_cannot_be_looked_up_is_held_until_a_person_says_who_pays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    with Shop(tmp_path, *METERS, customer=LEAD_OR_ID, on_error=told.append) as shop:
        config: Any = {"callbacks": [shop.handler], "metadata": {"session_id": "s1"}}
        shop.handler.status()  # which makes the ledger
        rename(tmp_path / "ledger.db", "leads", "away")
        model().invoke("Hi", config)
        shop.handler.record_usage({"input_tokens": 1}, id="job-1", customer="cus_1")  # which needs no looking up
        asyncio.run(model().ainvoke("Hi", config))
        assert (shop.handler.flush().held, shop.handler.status().unrecorded) == (4, 0)
        (error,) = told  # once, however often it fails
        (line,) = [one.getMessage() for one in caplog.records if "looked up" in one.getMessage()]
        assert isinstance(error, LedgerError)
        for said in (str(error), line):
            assert "who pays could not be looked up: LedgerError" in said
            assert "assign" in said
        rename(tmp_path / "ledger.db", "away", "leads")
        model().invoke("Hi", config)
        rename(tmp_path / "ledger.db", "leads", "away")
        model().invoke("Hi", config)
        assert len(told) == 2  # it went on in between
        for held in shop.handler.held():
            assert held.reason == "who pays could not be looked up: LedgerError"
            assert shop.handler.assign(held, "cus_1") == 3
        assert shop.billed() == {"tokens": 46, "messages": 3}


def rename(path: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")


def test_what_has_neither_its_payer_nor_a_ledger_can_be_recorded_again(tmp_path: Path) -> None:
    told: list[Any] = []
    with Shop(tmp_path, *METERS, customer=from_lead(), on_error=told.append) as shop:
        away = tmp_path / "away.db"
        away.mkdir()  # where its file should be
        handler = shop.another_handler(ledger=f"sqlite:///{away}", deliver=False)
        model().invoke("Hi", {"callbacks": [handler], "metadata": {"session_id": "s1"}})
        away.rmdir()
        assert handler.status().unrecorded_amounts == {"tokens": 15, "messages": 1}
        lost = pickle.loads(pickle.dumps(told[-1]))
        assert handler.record_again(lost) == 2
        assert handler.status().unrecorded == 0
        assert [(one.value, one.reason) for one in handler.held()] == [
            (15, "who pays could not be looked up: LedgerError"),
            (1, "who pays could not be looked up: LedgerError"),
        ]


class Unloaded:
    """As an object whose database session has been closed."""

    @property
    def stripe_customer_id(self) -> str:
        raise KeyError("canary@example.com")


def test_a_context_that_cannot_be_read_holds_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Exception] = []
    with Shop(tmp_path, *METERS, customer=from_context("stripe_customer_id"), on_error=told.append) as shop:
        builder = StateGraph(MessagesState, context_schema=Unloaded)  # type: ignore[type-var]
        builder.add_node("ask", lambda state: {"messages": model().invoke("Hi")})
        builder.add_edge(START, "ask")
        builder.compile().invoke({"messages": []}, {"callbacks": [shop.handler]}, context=Unloaded())
        assert {(one.value, one.reason) for one in shop.handler.held()} == {
            (15, "who pays could not be looked up: KeyError"),
            (1, "who pays could not be looked up: KeyError"),
        }
        assert len(told) == 1
        assert "canary" not in f"{caplog.text} {told}"


def test_usage_without_a_run_is_refused_where_its_payer_cannot_be_looked_up(shop: Shop, tmp_path: Path) -> None:
    """The job is told, so that it can tell it again."""
    job: dict[str, Any] = {"usage": {"input_tokens": 8}, "id": "job-1", "metadata": {"session_id": "s1"}}
    shop.handler.status()  # which makes the ledger
    rename(tmp_path / "ledger.db", "leads", "away")
    with pytest.raises(LedgerError):
        shop.handler.record_usage(**job)
    rename(tmp_path / "ledger.db", "away", "leads")
    shop.handler.leads.capture("s1", email="ann@example.com")
    shop.handler.record_usage(**job)
    assert shop.billed("cus_ann") == {"tokens": 8}
    assert shop.handler.held() == []


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
        malformed = "the customer's email is malformed; it looks like 'ann@example.com'"
        before, today = (datetime.fromtimestamp(at, UTC).date().isoformat() for at in (day - 86_400, day))
        assert shown == [
            Skipped(before, "tokens", "the lead has no email", 3, Decimal("123456789012345.1"), 1),
            Skipped(today, "messages", malformed, 1, Decimal(1), 0),
            Skipped(today, "messages", "the lead has no email", 3, Decimal(3), 0),
            Skipped(today, "tokens", malformed, 1, Decimal(15), 0),
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
