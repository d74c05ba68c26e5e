"""What may go wrong around the handler: chains never break, nothing is lost in silence, nobody is mixed up."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import stripe
from conftest import wait_until
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tools import StructuredTool
from metering import ONE_ANSWER, Shop, paid_by
from providers import OpenAIServer, Reply

from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.counting import entry_of, lost_of
from langchain_stripe_meter.errors import ConfigurationError, LedgerError, MeteringError, Unrecorded, UnrecordedError
from langchain_stripe_meter.ledger import lanes
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.ledger.views import FlushReport, tail
from langchain_stripe_meter.sandbox import hang

CANARIES = ("cus_canary", "canary@example.com", "canary prompt", "canary answer", "+4930901820")
"""What must never be in a log line: a customer's id, an e-mail, a prompt, an answer, a phone number."""


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


def _ours_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """The threads that deliver and have been started since; a provider's or a garbage collection's come and go."""
    names = ("stripe-meter-courier", "stripe-meter-sender")
    return [one for one in set(threading.enumerate()) - before if one.name.startswith(names)]


# Faults of the ledger


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up at once on a database that another process holds."""
    monkeypatch.setattr(lanes, "BUSY_SECONDS", 0.01)


@contextmanager
def where_a_folder_is(path: Path) -> Iterator[Path]:
    path.mkdir()
    yield path


@contextmanager
def corrupt(path: Path) -> Iterator[Path]:
    path.touch(mode=0o600)
    path.write_bytes(b"this is no database at all" * 100)
    yield path
    assert path.read_bytes() == b"this is no database at all" * 100


@contextmanager
def of_somebody_else(path: Path) -> Iterator[Path]:
    path.touch(mode=0o600)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (id INTEGER)")
    yield path


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[Path]:
    recorder(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield path
        other.execute("ROLLBACK")


@contextmanager
def without_its_table(path: Path) -> Iterator[Path]:
    with recorder(path) as handler:
        handler.record_usage({"input_tokens": 1}, id="first", customer="cus_1")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE readings")
    yield path


FAULTS = [where_a_folder_is, corrupt, of_somebody_else, locked_by_another_process, without_its_table]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_ledger_that_cannot_store_never_breaks_a_chain_and_is_never_silent(
    fault: Callable[[Path], Any],
    asynchronous: bool,
    path: Path,
    server: OpenAIServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.reply(Reply("canary answer"))
    config: Any = {"metadata": {"stripe_customer_id": "cus_canary", "lead": {"email": "canary@example.com"}}}
    told: list[MeteringError] = []
    with fault(path) as where:
        handler = recorder(where, on_error=told.append)
        config["callbacks"] = [handler]
        with caplog.at_level(logging.DEBUG):
            if asynchronous:
                answer = asyncio.run(server.chat().ainvoke("canary prompt", config))
            else:
                answer = server.chat().invoke("canary prompt", config)
        assert answer.text == "canary answer"
        assert (handler._recorder.unrecorded, handler._recorder.lost) == (1, {"tokens": 15})
        handler._ledger.close()
    (error,) = told
    assert isinstance(error, UnrecordedError)
    assert "Not billed: 15 on tokens." in str(error)
    (reading,) = error.readings
    assert (reading.event_name, reading.value, reading.customer) == ("tokens", 15, "cus_canary")
    assert pickle.loads(pickle.dumps(error)).readings == error.readings
    (line,) = [record for record in caplog.records if record.name.startswith("langchain_stripe_meter")]
    assert line.levelno == logging.ERROR
    assert "\n" not in line.getMessage()
    ours = [record for record in caplog.records if not record.name.startswith(("openai", "httpcore", "httpx"))]
    assert not [record for record in ours if any(word in caplog.handler.format(record) for word in CANARIES)]


@pytest.mark.parametrize("fault", [corrupt, without_its_table])
def test_a_block_around_a_chain_ends_as_the_chain_did_though_its_ledger_is_broken(
    fault: Callable[[Path], Any], path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    with fault(path) as where:
        with recorder(where, deliver=True, stripe="sk_test_1") as handler:
            answer = server.chat().invoke("Hi", paid_by("cus_1", handler))
        assert answer.text == "Hello!"
        with pytest.raises(ValueError, match="of the block"):
            fail_inside(recorder(where))
    assert "closing failed" in caplog.text
    wait_until(lambda: not _ours_since(before))


@pytest.mark.parametrize("fault", [where_a_folder_is, corrupt, of_somebody_else])
def test_what_went_unrecorded_is_told_though_the_ledger_cannot_be_opened(
    fault: Callable[[Path], Any], path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    with fault(path) as where:
        handler = recorder(where)
        with pytest.raises(LedgerError) as nothing_lost:
            handler.status()
        assert "This handler" not in str(nothing_lost.value)
        server.chat().invoke("Hi", paid_by("cus_1", handler))
        server.chat().invoke("Hi", paid_by("cus_1", handler))
        for ask in (handler.status, handler.flush):
            with pytest.raises(type(nothing_lost.value)) as told:
                ask()
            assert str(told.value) == f"{nothing_lost.value} This handler left 2 readings unrecorded: 30 on tokens."
        caplog.clear()
        assert handler.close() is None
    (record,) = caplog.records
    assert record.getMessage() == f"stripe-meter: closing failed: {told.value}"


def fail_inside(handler: StripeMeterCallbackHandler) -> None:
    with handler:
        raise ValueError("of the block")


def test_a_ledger_that_recovers_records_again(
    path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "BUSY_SECONDS", 0.01)
    told: list[Any] = []
    with locked_by_another_process(path) as where:
        handler = recorder(where, on_error=told.append)
        server.chat().invoke("Hi", paid_by("cus_1", handler))
    server.chat().invoke("Hi", paid_by("cus_1", handler))
    status = handler.status()
    assert (status.unrecorded, status.unrecorded_amounts, status.pending) == (1, {"tokens": 15}, 1)
    for new in (1, 0):  # a person stores what is missing; a second time changes nothing
        assert handler.record_again(pickle.loads(pickle.dumps(told[0]))) == new
    assert [(row.value, row.customer) for row in tail(handler._ledger)] == [(15, "cus_1"), (15, "cus_1")]
    handler.close()


def test_what_is_recorded_again_is_unrecorded_no_more_and_nothing_else(
    path: Path, server: OpenAIServer, impatient: None
) -> None:
    told: list[Any] = []
    of_another: list[Any] = []
    with locked_by_another_process(path) as where:
        handler = recorder(where, on_error=told.append)
        other = recorder(where, on_error=of_another.append)
        for each in (handler, handler, other):
            server.chat().invoke("Hi", paid_by("cus_1", each))
    for error in (told[0], told[0], of_another[0]):
        handler.record_again(pickle.loads(pickle.dumps(error)))
        assert unrecorded(handler) == (1, {"tokens": 15})
    assert unrecorded(other) == (1, {"tokens": 15})
    handler.close()
    other.close()


def unrecorded(handler: StripeMeterCallbackHandler) -> tuple[int, Any]:
    status = handler.status()
    return status.unrecorded, status.unrecorded_amounts


def test_what_is_still_unstorable_stays_unrecorded(path: Path, server: OpenAIServer, impatient: None) -> None:
    told: list[Any] = []
    with locked_by_another_process(path) as where:
        handler = recorder(where, on_error=told.append)
        server.chat().invoke("Hi", paid_by("cus_1", handler))
        with pytest.raises(LedgerError, match="locked"):
            handler.record_again(told[0])
        assert unrecorded(handler) == (1, {"tokens": 15})
    assert handler.record_again(told[0]) == 1
    assert unrecorded(handler) == (0, {})
    handler.close()


@pytest.mark.parametrize("kept", [True, False], ids=["with on_error", "without"])
def test_what_to_do_about_unrecorded_usage_is_told(
    kept: bool, path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    with corrupt(path) as where:
        server.chat().invoke("Hi", paid_by("cus_1", recorder(where, on_error=told.append if kept else None)))
    next_step = "Keep this error and call meter.record_again(error) once the ledger is mended."
    (line,) = [record.getMessage() for record in caplog.records if record.name == "langchain_stripe_meter"]
    assert all(str(error).endswith(next_step) for error in told)
    assert len(told) == kept
    assert line.endswith(next_step if kept else "With on_error=, meter.record_again(error) could store it later.")


def test_lost_amounts_are_exact_whatever_the_application_rounds_to(path: Path) -> None:
    told: list[Any] = []
    many = 123_456
    result = LLMResult(generations=[[ChatGeneration(message=AIMessage("", usage_metadata=used(many)))]])
    with corrupt(path) as where, localcontext(prec=3):
        handler = recorder(where, customer="cus_1", on_error=told.append)
        for number in (1, 2):
            handler.on_chat_model_start({}, [[]], run_id=UUID(int=number))
            handler.on_llm_end(result, run_id=UUID(int=number))
        assert handler._recorder.lost == {"tokens": 2 * many}
    assert f"Not billed: {many} on tokens." in str(told[0])


def used(tokens: int) -> Any:
    return {"input_tokens": tokens - 1, "output_tokens": 1, "total_tokens": tokens}


def test_what_was_lost_can_be_put_into_a_set() -> None:
    one = Unrecorded("run-1", "tokens", Decimal(15), 1_800_000_000, dimensions={"model": "m"})
    assert len({one, pickle.loads(pickle.dumps(one))}) == 1


@pytest.mark.parametrize("ending", ["while the loop runs", "after the loop has ended"])
def test_what_could_not_be_stored_after_its_task_was_cancelled_is_told_once(
    ending: str, path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    heard = threading.Event()

    def on_error(error: MeteringError) -> None:
        handler._ledger.wait_for_writes()  # nothing that writers need may be held meanwhile
        told.append(error)
        heard.set()

    handler = recorder(path, on_error=on_error)
    lane = handler._ledger.database.lane("record")

    async def cancel() -> None:
        task = asyncio.create_task(server.chat().ainvoke("Hi", paid_by("cus_1", handler)))
        await asyncio.to_thread(wait_until, handler._ledger._group._leader.locked)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}  # LangChain shields its callbacks in a task of their own
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)
        assert task.cancelled()
        if ending == "while the loop runs":
            lane.lock.release()
            assert await asyncio.to_thread(heard.wait, 60)

    rename(path, "readings", "away")
    lane.lock.acquire()
    asyncio.run(cancel())
    if ending == "after the loop has ended":
        lane.lock.release()
    assert heard.wait(60)
    (error,) = told
    assert "no such table" in str(error)
    assert (handler._recorder.unrecorded, handler._recorder.lost) == (1, {"tokens": 15})
    assert caplog.text.count("a run could not be recorded") == 1
    rename(path, "away", "readings")
    assert handler.record_again(error) == 1
    handler.close()


def rename(path: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")


def test_what_was_stored_without_our_learning_of_it_is_not_stored_again(path: Path, server: OpenAIServer) -> None:
    with recorder(path) as handler:
        server.chat().invoke("Hi", paid_by("cus_1", handler))
        (row,) = tail(handler._ledger)
        lost = Unrecorded(row.identifier, "tokens", Decimal(15), 1_800_000_000, customer="cus_1")
        handler.record_again(UnrecordedError("an I/O error after the commit", [lost]))
        assert list(tail(handler._ledger)) == [row]


@pytest.mark.parametrize(
    "who",
    [
        {"state": ReadingState.RESOLVED, "customer": "cus_1"},
        {"state": ReadingState.RECORDED, "reference": Reference("email", "ann@example.com")},
        {"state": ReadingState.HELD, "value": None, "customer": "cus_1", "reason": "no price is known"},
    ],
    ids=["customer", "reference", "unknown amount"],
)
def test_what_is_recorded_again_is_what_was_lost(who: dict[str, Any]) -> None:
    same: dict[str, Any] = {"dimensions": {"model": "m"}, "estimated": True, "account": "acct_1Connected"}
    entry = Entry(**{"key": "run-1", "event_name": "tokens", "value": Decimal(15), "at": 1_800_000_000, **same, **who})
    (lost,) = lost_of([entry])
    assert entry_of(lost) == entry


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_on_error_that_raises_never_breaks_a_chain(
    asynchronous: bool, path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    def on_error(error: MeteringError) -> None:
        raise ValueError("canary prompt")

    path.write_bytes(b"no database" * 100)
    config: Any = paid_by("cus_1", recorder(path, on_error=on_error))
    answer = asyncio.run(server.chat().ainvoke("Hi", config)) if asynchronous else server.chat().invoke("Hi", config)
    assert answer.text == "Hello!"
    assert "on_error itself failed: ValueError" in caplog.text
    assert "canary" not in caplog.text


def test_on_error_never_runs_on_an_event_loops_thread(
    path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It may write a file, or send a mail."""
    told: list[threading.Thread] = []
    path.write_bytes(b"no database" * 100)
    handler = recorder(path, on_error=lambda _: told.append(threading.current_thread()))
    asyncio.run(server.chat().ainvoke("Hi", paid_by("cus_1", handler)))
    wait_until(lambda: told)
    assert threading.main_thread() not in told


def test_metadata_that_is_no_customer_is_skipped_with_a_reason_that_does_not_repeat_it(
    path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    with recorder(path) as handler:
        for value in ("canary@example.com", 7, ["cus_1"], "cus_1; DROP TABLE", "CUS_1", ""):
            server.chat().invoke("Hi", {"callbacks": [handler], "metadata": {"stripe_customer_id": value}})
        assert {row.state for row in tail(handler._ledger)} == {"skipped"}
        assert "canary" not in str(tail(handler._ledger)) + caplog.text
        assert handler.flush() == FlushReport(delivered=0, pending=0, held=0, skipped=6, rejected=0, doubtful=0)


# What a provider does not report


@pytest.mark.parametrize(
    ("policy", "states"), [("estimate", {"tokens": "resolved"}), ("hold", {"tokens": "held"}), ("ignore", {})]
)
def test_missing_usage_is_estimated_held_or_ignored_and_the_message_counts(
    policy: Any, states: dict[str, str], path: Path, server: OpenAIServer
) -> None:
    server.reply(Reply("one two three", usage=None))
    with recorder(path, Tokens("tokens"), Messages("messages"), on_missing_usage=policy) as handler:
        server.chat().invoke("Hi", paid_by("cus_1", handler))
        rows = {row.event_name: row for row in tail(handler._ledger)}
    assert {name: row.state for name, row in rows.items()} == {**states, "messages": "resolved"}
    if policy == "estimate":
        assert rows["tokens"].value == 11
        assert rows["tokens"].estimated
    if policy == "hold":
        assert (rows["tokens"].value, rows["tokens"].reason) == (None, "the provider reported no usage")


def test_a_held_call_is_billed_once_a_person_says_how_much(shop: Shop, server: OpenAIServer) -> None:
    handler = shop.another_handler(on_missing_usage="hold")
    server.reply(Reply(usage=None))
    server.chat().invoke("Hi", shop.config(callbacks=[handler]))
    for held in handler.held():
        handler.assign(held, value=7)
    assert shop.billed() == {"in": 7, "out": 7, "messages": 1}


# Refused when it is made


class NoMeter:
    """Anything else."""


@pytest.mark.parametrize(
    ("meters", "options", "named"),
    [
        ((), {}, "at least one meter"),
        ((NoMeter(),), {}, "NoMeter"),
        (([Tokens("tokens")],), {}, "one after another, not as a list"),
        ((Tokens("tokens"), Messages("tokens")), {}, "'tokens'"),
        ((Tokens("tokens"),), {"stripe": None}, "STRIPE_API_KEY"),
        ((Tokens("tokens"),), {"stripe": "pk_test_1"}, "publishable|secret"),
        ((Tokens("tokens"),), {"stripe": " sk_test_1\n"}, "between spaces or line breaks"),
        ((Tokens("tokens"),), {"ledger": "nonsense"}, "nonsense"),
        ((Tokens("tokens"),), {"ledger": "mysql://me:hunter2@host/db"}, "mysql"),
        ((Tokens("tokens"),), {"ledger": "sqlite://"}, "file"),
        ((Tokens("tokens"),), {"ledger": "sqlite:///:memory:"}, "file"),
        ((Tokens("tokens"),), {"customer": "somebody"}, "customer id"),
        ((Tokens("tokens"),), {"customer": 7}, "customer="),
        ((Tokens("tokens"),), {"on_missing_usage": "guess"}, "'guess'"),
        ((Tokens("tokens"),), {"concurrency": 0}, "concurrency=0"),
        ((Tokens("tokens"),), {"roll_up": 0}, "roll_up=0"),
        ((Tokens("tokens"),), {"roll_up": "minute"}, "roll_up='minute'"),
        ((Tokens("tokens"),), {"roll_up": True}, "roll_up=True"),
        ((Tokens("tokens"),), {"concurrency": "4"}, "concurrency='4'"),
        ((Tokens("tokens"),), {"concurrency": 1.5}, "concurrency=1.5"),
        ((Tokens("tokens"),), {"deliver": "no"}, "deliver='no'"),
        ((Tokens("tokens"),), {"bill_cache_hits": "no"}, "bill_cache_hits='no'"),
        ((Tokens("tokens"),), {"create_missing": 1}, "create_missing=1"),
        ((Tokens("tokens"),), {"prune_after_days": 5, "deliver": False}, "not 5"),
        ((Tokens("tokens"),), {"stripe": 5}, "stripe= takes .* not int"),
        ((Tokens("tokens"),), {"stripe": stripe}, "stripe= takes .* not module"),
        ((Tokens("tokens"),), {"ledger": 5}, "ledger= takes .* not int"),
        ((Tokens("tokens"),), {"ledger": Path("l.db")}, "ledger= takes .* not PosixPath"),
        ((Tokens("tokens"),), {"ledger": "sqlite:///l.db?timeout=soon"}, r"\?timeout=soon"),
        ((Tokens("tokens"),), {"ledger": "sqlite:///l.db?timeout=-1"}, r"\?timeout=-1"),
        ((Tokens("tokens"),), {"ledger": "sqlite:///l.db?mode=ro"}, r"\?mode is not"),
        ((Tokens("tokens"),), {"synchronous": "OFF"}, "'OFF'"),
    ],
)
def test_what_cannot_work_is_refused_at_once_and_named(
    meters: tuple[Any, ...], options: dict[str, Any], named: str, path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        StripeMeterCallbackHandler(*meters, **{"stripe": "sk_test_1", "ledger": f"sqlite:///{path}", **options})
    assert "hunter2" not in str(caught.value)
    assert not path.exists()


def test_a_handler_that_only_records_needs_no_key_and_cannot_verify(path: Path) -> None:
    with recorder(path) as handler, pytest.raises(ConfigurationError, match="deliver=False"):
        handler.verify()


def test_no_repr_shows_a_key_a_password_or_a_customer(path: Path) -> None:
    handler = recorder(path, stripe="sk_test_canary", customer="cus_canary", deliver=True)
    assert "canary" not in repr(handler) + repr(handler._courier) + repr(handler._ledger)
    assert "tokens" in repr(handler)
    handler.close()


# Flush and close


def test_flush_gives_up_when_the_time_is_up_and_says_what_is_pending(shop: Shop, server: OpenAIServer) -> None:
    with shop.sandbox.outage():
        server.chat().invoke("Hi", shop.config())
        assert shop.handler.flush(timeout=0) == FlushReport(0, 3, 0, 0, 0, 0)
        assert asyncio.run(shop.handler.aflush(timeout=0)).pending == 3  # while the courier moves them about


def test_close_leaves_no_thread_and_what_was_not_sent_is_sent_by_the_next_handler(
    tmp_path: Path, server: OpenAIServer
) -> None:
    before = set(threading.enumerate())
    with Shop(tmp_path) as shop:
        with shop.sandbox.outage():
            server.chat().invoke("Hi", shop.config())
            assert shop.handler.close(timeout=0).pending == 3
            assert shop.handler.close(timeout=0).pending == 3
        shop.another_handler().retry()
        shop.sandbox.clear_faults()
        assert shop.another_handler().flush(60).pending == 0
        assert {name: shop.sandbox.billed(name, "cus_1") for name in ONE_ANSWER} == ONE_ANSWER
    wait_until(lambda: not _ours_since(before))


def test_the_context_manager_delivers_on_its_way_out(shop: Shop, server: OpenAIServer) -> None:
    with shop.another_handler() as handler:
        server.chat().invoke("Hi", shop.config(callbacks=[handler]))
    assert {name: shop.sandbox.billed(name, "cus_1") for name in ONE_ANSWER} == ONE_ANSWER


def test_a_handler_that_is_entered_again_delivers_again(shop: Shop, server: OpenAIServer) -> None:
    """As on AWS Lambda, where each call of the function enters the handler of the module."""
    for number in (1, 2):
        with shop.handler:
            server.chat().invoke("Hi", shop.config())
            wait_until(lambda expected=number: shop.sandbox.billed("messages", "cus_1") == expected)


@pytest.mark.parametrize("deliver", ["flush", "close"])
def test_what_is_recorded_after_a_close_starts_nothing_and_is_delivered_by_the_next_flush_or_close(
    shop: Shop, server: OpenAIServer, deliver: str
) -> None:
    shop.handler.close()
    before = set(threading.enumerate())
    server.chat().invoke("Hi", shop.config())
    assert not _ours_since(before)
    assert shop.sandbox.billed("messages", "cus_1") == 0
    assert getattr(shop.handler, deliver)(60).pending == 0
    assert {name: shop.sandbox.billed(name, "cus_1") for name in ONE_ANSWER} == ONE_ANSWER
    shop.handler.close()
    wait_until(lambda: not _ours_since(before))


def test_a_flush_does_not_wait_for_a_handler_that_is_closed_meanwhile(shop: Shop, server: OpenAIServer) -> None:
    arrived, answer = threading.Event(), threading.Event()
    shop.sandbox.fail(hang(answer), times=None, where=lambda _: arrived.set() or True)  # type: ignore[func-returns-value]
    shop.handler.close()
    server.chat().invoke("Hi", shop.config())
    reports: list[FlushReport] = []
    flushing = threading.Thread(target=lambda: reports.append(shop.handler.flush(3600)))
    flushing.start()
    assert arrived.wait(60)
    shop.handler.close(0)
    flushing.join(60)
    answer.set()
    assert [report.pending for report in reports] == [3]


@pytest.mark.parametrize("name", ["decide", "event", "function", "recorder", "outputs", "error", "handler"])
def test_whatever_an_application_names_what_it_tells_a_tool_its_end_is_recorded(
    name: str, shop: Shop, server: OpenAIServer
) -> None:
    """LangChain hands on to the events of a tool what its caller gave beside the input."""
    tool = StructuredTool.from_function(
        lambda question: server.chat().invoke(question).text, name="ask", description=""
    )
    config = shop.config()
    told: dict[str, Any] = {name: 1}
    tool.run({"question": "Hi"}, callbacks=config["callbacks"], metadata=config["metadata"], **told)
    assert shop.handler.status().open_runs == 0
    assert shop.billed()["messages"] == 1
