"""A cancelled call, of which LangChain tells no end: what its provider reported and what had come of it is billed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from auditing import Books
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableLambda
from sqlalchemy import select, update

from langchain_stripe_meter import Credits, StripeMeterCallbackHandler, Tokens, from_lead
from langchain_stripe_meter.core.tenants import Tenant
from langchain_stripe_meter.errors import StripeError
from langchain_stripe_meter.ledger.schema import readings
from langchain_stripe_meter.ledger.views import Row, tail
from langchain_stripe_meter.sandbox import drop_answer

BEGIN = AIMessageChunk("", usage_metadata={"input_tokens": 4321, "output_tokens": 1, "total_tokens": 4322})
NOTHING = AIMessageChunk("", usage_metadata={"input_tokens": 0, "output_tokens": 0, "total_tokens": 0})
WORDS = "Let me think about this for a while. "

PIECES = {
    "text": [AIMessageChunk(WORDS)] * 10,
    "text in blocks": [AIMessageChunk([{"type": "text", "text": WORDS, "index": 0}])] * 10,
    "thinking": [AIMessageChunk([{"type": "thinking", "thinking": WORDS, "index": 0}])] * 10,
    "reasoning": [AIMessageChunk([{"type": "reasoning", "reasoning": WORDS, "index": 0}])] * 10,
    "a summary of reasoning": [
        AIMessageChunk([{"type": "reasoning", "summary": [{"type": "summary_text", "text": WORDS}], "index": 0}])
    ]
    * 10,
    "reasoning beside the content": [AIMessageChunk("", additional_kwargs={"reasoning_content": WORDS})] * 10,
    "a call of a tool": [
        AIMessageChunk("", tool_call_chunks=[{"name": "write", "args": '{"text": "', "id": "c", "index": 0}]),
        *[AIMessageChunk("", tool_call_chunks=[{"name": None, "args": WORDS, "id": None, "index": 0}])] * 10,
    ],
}


class Model(BaseChatModel):
    """Streams its pieces, also within ``ainvoke``, and then never ends."""

    pieces: list[AIMessageChunk]
    streaming: bool = True
    sent: Any = None

    @property
    def _llm_type(self) -> str:
        return "fake"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        raise NotImplementedError

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for piece in self.pieces:
            yield ChatGenerationChunk(message=piece)
        self.sent.set()
        await asyncio.Event().wait()


def cancelled(path: Path, pieces: list[AIMessageChunk], *, stream: bool) -> dict[str, Row]:
    """What is billed of a call that is cancelled once ``pieces`` have come."""
    meters = (Tokens("in", count="input"), Tokens("out", count="output"))
    with StripeMeterCallbackHandler(
        *meters, customer="cus_1", deliver=False, ledger=f"sqlite:///{path}/l.db"
    ) as handler:

        async def main() -> None:
            model = Model(streaming=True, pieces=pieces, sent=asyncio.Event())
            chain: Any = RunnableLambda(str) | model

            async def read() -> None:
                if stream:
                    async for _ in chain.astream("Hi", {"callbacks": [handler]}):
                        pass
                else:
                    await chain.ainvoke("Hi", {"callbacks": [handler]})

            task = asyncio.create_task(read())
            await asyncio.wait_for(model.sent.wait(), 5)
            task.cancel()
            await asyncio.wait([task])

        asyncio.run(main())
        rows = tail(handler._ledger, 10)
        return {row.event_name: row for row in rows}


@pytest.mark.parametrize("stream", [False, True], ids=["ainvoke", "astream"])
@pytest.mark.parametrize("pieces", list(PIECES.values()), ids=list(PIECES))
def test_what_was_reported_is_billed_with_an_estimate_of_what_came_after_it(
    tmp_path: Path, pieces: list[AIMessageChunk], stream: bool
) -> None:
    rows = cancelled(tmp_path, [BEGIN, *pieces], stream=stream)
    assert rows["in"].value == 4321
    assert 60 <= int(rows["out"].value or 0) <= 130
    assert rows["out"].estimated


def test_a_call_that_had_only_begun_is_billed_what_its_provider_had_reported(tmp_path: Path) -> None:
    rows = cancelled(tmp_path, [BEGIN], stream=False)
    assert (rows["in"].value, rows["out"].value) == (4321, 1)


@pytest.mark.parametrize("stream", [False, True], ids=["ainvoke", "astream"])
def test_a_first_report_of_nothing_at_all_hides_no_later_one(tmp_path: Path, stream: bool) -> None:
    rows = cancelled(tmp_path, [NOTHING, BEGIN, *PIECES["text"]], stream=stream)
    assert rows["in"].value == 4321


def test_a_report_of_nothing_at_all_is_nothing_to_bill(tmp_path: Path) -> None:
    assert cancelled(tmp_path, [NOTHING], stream=False) == {}


class InThread(Model):
    """In a thread, which nobody can cancel: it says its first piece, waits, and ends with its last one, or fails."""

    go: Any = None
    fails: bool = False

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        yield ChatGenerationChunk(message=self.pieces[0])
        self.sent.set()
        assert self.go.wait(20)
        yield ChatGenerationChunk(message=self.pieces[1])
        if self.fails:
            raise ConnectionError


def ended_later(path: Path, last: AIMessageChunk, **options: Any) -> list[tuple[str, str, int | None, bool]]:
    """What is recorded of a call whose message is cancelled, and which ends with ``last`` all the same."""
    fails = options.pop("fails", False)
    meters = options.pop("meters", (Tokens("in", count="input"), Tokens("out", count="output")))
    with StripeMeterCallbackHandler(
        *meters, customer="cus_1", deliver=False, ledger=f"sqlite:///{path}/l.db", **options
    ) as handler:
        sent, go, done = threading.Event(), threading.Event(), threading.Event()
        model = InThread(streaming=True, pieces=[AIMessageChunk(WORDS), last], sent=sent, go=go, fails=fails)

        def node(text: str) -> None:
            try:
                model.invoke(text)
            except ConnectionError:
                pass
            finally:
                done.set()

        async def main() -> None:
            task = asyncio.create_task(RunnableLambda(node).ainvoke("Hi", {"callbacks": [handler]}))
            assert await asyncio.to_thread(sent.wait, 20)
            task.cancel()
            await asyncio.wait([task])
            assert handler.status().abandoned == 1
            go.set()
            assert await asyncio.to_thread(done.wait, 20)

        asyncio.run(main())
        assert (handler.status().abandoned, handler.status().open_runs) == (0, 0)
        return [(row.event_name, row.state, row.value, row.estimated) for row in tail(handler._ledger, 10)]


REPORT = AIMessageChunk("", usage_metadata={"input_tokens": 4321, "output_tokens": 500, "total_tokens": 4821})


def test_a_call_that_outlives_its_message_adds_what_it_came_to_beyond_its_estimate(tmp_path: Path) -> None:
    rows = ended_later(tmp_path, REPORT)
    assert [(name, estimated) for name, _, _, estimated in rows] == [
        ("in", True), ("out", True), ("in", False), ("out", False)
    ]  # fmt: skip
    sums = {name: sum(value or 0 for one, _, value, _ in rows if one == name) for name in ("in", "out")}
    assert sums == {"in": 4321, "out": 500}


def test_it_takes_back_what_the_estimate_had_too_much(tmp_path: Path) -> None:
    less = AIMessageChunk("", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})
    rows = ended_later(tmp_path, less)
    assert sum(value or 0 for _, _, value, _ in rows) == 3
    assert min(value or 0 for _, _, value, _ in rows) < 0


def outlived(handler: StripeMeterCallbackHandler, meanwhile: Callable[[], object], usage: Any) -> list[Row]:
    """A message is cancelled; after ``meanwhile``, the call that it left tells its ``usage``."""
    message, call, metadata = uuid4(), uuid4(), {"session_id": "s", "ls_provider": "openai", "ls_model_name": "gpt-4o"}
    handler.on_chain_start({}, {}, run_id=message, metadata=metadata)
    handler.on_chat_model_start({}, [[HumanMessage(WORDS)]], run_id=call, parent_run_id=message, metadata=metadata)
    chunk = ChatGenerationChunk(message=AIMessageChunk(WORDS))
    handler.on_llm_new_token(WORDS, run_id=call, parent_run_id=message, chunk=chunk)
    handler.on_chain_error(asyncio.CancelledError(), run_id=message)
    meanwhile()
    last = AIMessage("x", usage_metadata=usage)
    handler.on_llm_end(LLMResult(generations=[[ChatGeneration(message=last)]]), run_id=call, parent_run_id=message)
    return tail(handler._ledger, 10)


@pytest.fixture
def by_lead(tmp_path: Path) -> Iterator[Callable[[Tokens], StripeMeterCallbackHandler]]:
    made: list[StripeMeterCallbackHandler] = []

    def make(meter: Tokens) -> StripeMeterCallbackHandler:
        ledger = f"sqlite:///{tmp_path}/l.db"
        made.append(StripeMeterCallbackHandler(meter, customer=from_lead("email"), deliver=False, ledger=ledger))
        return made[-1]

    yield make
    for handler in made:
        handler.close()


@pytest.mark.parametrize("bill_from", [None, "now", "first_message"])
def test_the_rest_goes_wherever_its_estimate_went(by_lead: Any, bill_from: Any) -> None:
    """Nobody is credited, or billed a part of, what somebody else was billed or nobody was."""
    handler = by_lead(Tokens("t"))

    def capture() -> None:
        if bill_from:
            handler.leads.capture("s", email="ann@example.com", bill_from=bill_from)

    rows = outlived(handler, capture, {"input_tokens": 300, "output_tokens": 20, "total_tokens": 320})
    assert sum(row.value or 0 for row in rows) == 320
    assert {row.state for row in rows} == {"recorded" if bill_from == "first_message" else "skipped"}
    if bill_from is None:
        assert handler.leads.capture("s", email="ann@example.com", bill_from="first_message") == 2


def test_the_rest_goes_where_its_estimate_went_while_it_was_stored(by_lead: Any, monkeypatch: Any) -> None:
    """The lead is captured after the estimate was found skipped, and before the rest is in the ledger."""
    handler = by_lead(Tokens("t"))
    record = handler.leads.record

    def capture_first(entries: Any) -> Any:
        if any(entry.follows for entry in entries):
            assert handler.leads.capture("s", email="ann@example.com", bill_from="first_message") == 1
        return record(entries)

    monkeypatch.setattr(handler.leads, "record", capture_first)
    rows = outlived(handler, lambda: None, {"input_tokens": 300, "output_tokens": 20, "total_tokens": 320})
    assert sum(row.value or 0 for row in rows) == 320
    assert [row.state for row in rows] == ["recorded"] * 2


def test_so_does_a_kind_of_tokens_of_which_the_estimate_knew_nothing(by_lead: Any) -> None:
    handler = by_lead(Tokens("t", split=True))
    usage = {"input_tokens": 300, "output_tokens": 20, "total_tokens": 320, "input_token_details": {"cache_read": 200}}
    rows = outlived(handler, lambda: handler.leads.capture("s", email="ann@example.com"), usage)
    assert sum(row.value or 0 for row in rows) == 320
    assert {row.state for row in rows} == {"skipped"}


def test_on_each_meter_the_rest_goes_where_its_estimate_on_that_meter_went(tmp_path: Path) -> None:
    """A person may have given one meter's usage to somebody else."""
    meters, ledger = (Tokens("a"), Tokens("b", split=True)), f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(*meters, customer="cus_1", deliver=False, ledger=ledger) as handler:

        def assign() -> None:
            with handler._ledger.deliver_lane().transaction() as connection:
                connection.execute(update(readings).where(readings.c.event_name == "a").values(state="held"))
            assert handler.assign(handler.held()[0], "cus_2") == 1

        details = {"input_token_details": {"cache_read": 200}}
        rows = outlived(handler, assign, {"input_tokens": 300, "output_tokens": 20, "total_tokens": 320, **details})
    assert {(row.event_name, row.customer) for row in rows} == {("a", "cus_2"), ("b", "cus_1")}
    assert [sum(row.value or 0 for row in rows if row.event_name == name) for name in "ab"] == [320, 320]


def test_the_rest_is_on_the_account_of_its_estimate_though_tenant_fails_by_then(tmp_path: Path) -> None:
    accounts = iter(["acct_anna"])
    ledger = f"sqlite:///{tmp_path}/l.db"
    with StripeMeterCallbackHandler(
        Tokens("a"), customer="cus_1", deliver=False, ledger=ledger, tenant=lambda _: Tenant(next(accounts))
    ) as handler:
        outlived(handler, lambda: None, {"input_tokens": 300, "output_tokens": 20, "total_tokens": 320})
        with handler._ledger.read() as connection:
            rows = connection.execute(select(readings.c.state, readings.c.customer, readings.c.account)).all()
    assert rows == 2 * [("resolved", "cus_1", "acct_anna")]


@pytest.mark.parametrize("taken_back", ["cancelled", "asked to be cancelled", "written off"])
def test_the_rest_of_what_a_person_took_back_waits_for_a_person(tmp_path: Path, taken_back: str) -> None:
    """Else the customer, who was not billed the estimate, would be credited what it had too much."""
    with Books(tmp_path) as books, StripeMeterCallbackHandler(
        Tokens("ai_tokens"), customer="cus_1", ledger=books.ledger.database.url.render_as_string(),
        stripe=books.gateway.client, clock=books.ledger.now,
    ) as handler:  # fmt: skip

        def take_back() -> None:
            if taken_back != "written off":
                assert handler.flush(30).delivered == 1
                if taken_back != "cancelled":  # it is, but the answer is lost
                    books.sandbox.fail(drop_answer(), path="/v1/billing/meter_event_adjustments")
                with suppress(StripeError):
                    handler.cancel(tail(handler._ledger, 1)[0].identifier)
                return
            books.sandbox.deactivate_meter("ai_tokens")
            assert handler.flush(30).held == 1
            handler.write_off(handler.held(), reason="goodwill")
            books.sandbox.reactivate_meter("ai_tokens")

        rows = outlived(handler, take_back, {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})
        handler.retry()
        assert handler.flush(30).held == 1
        taken = "delivered" if taken_back == "asked to be cancelled" else "written_off"
        assert sorted(((row.value or 0) < 0, row.state) for row in rows) == [(False, taken), (True, "held")]
        assert "cancelled or written off" in str(handler.held()[0].reason)
        assert books.billed() == 0
        if taken == "delivered":
            handler.cancel(next(row.identifier for row in rows if row.state == taken))
        handler.write_off(handler.held(), reason="as its estimate")


def test_an_estimate_that_was_right_is_followed_by_nothing(tmp_path: Path) -> None:
    once = ended_later(tmp_path, AIMessageChunk(""), fails=True)
    assert [name for name, *_ in once] == ["in", "out"]


def test_what_is_counted_by_the_call_is_counted_once(tmp_path: Path) -> None:
    rows = ended_later(tmp_path, REPORT, meters=[Credits("credits", {}, default=3, per="call")])
    assert [(name, value) for name, _, value, _ in rows] == [("credits", 3)]


def test_what_is_held_for_want_of_a_report_stays_with_the_person_who_settles_it(tmp_path: Path) -> None:
    rows = ended_later(tmp_path, REPORT, on_missing_usage="hold")
    assert [(name, state, value) for name, state, value, _ in rows] == [("in", "held", None), ("out", "held", None)]


def test_where_missing_usage_is_ignored_the_late_report_is_billed_in_full(tmp_path: Path) -> None:
    rows = ended_later(tmp_path, REPORT, on_missing_usage="ignore")
    assert [(name, value) for name, _, value, _ in rows] == [("in", 4321), ("out", 500)]


def test_a_report_that_contradicts_itself_is_held(tmp_path: Path) -> None:
    wrong: Any = {"input_tokens": 5, "output_tokens": 1, "total_tokens": 6, "input_token_details": {"cache_read": 6}}
    rows = cancelled(tmp_path, [AIMessageChunk("", usage_metadata=wrong)], stream=False)
    assert {row.state for row in rows.values()} == {"held"}


def test_pieces_without_content_are_nothing_to_bill(tmp_path: Path) -> None:
    assert cancelled(tmp_path, [AIMessageChunk(""), AIMessageChunk([{"type": "text"}])], stream=False) == {}


def test_a_final_report_that_came_with_an_error_stands_whatever_an_estimate_says(tmp_path: Path) -> None:
    """Structured output that did not parse: ChatOpenAI raises, with the provider's whole answer in the error."""
    body = {"usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}}
    message = AIMessage(WORDS * 20, response_metadata={"body": body})
    with StripeMeterCallbackHandler(
        Tokens("out", count="output"), customer="cus_1", deliver=False, ledger=f"sqlite:///{tmp_path}/l.db"
    ) as handler:
        run_id = uuid4()
        handler.on_chat_model_start({}, [[]], run_id=run_id, invocation_params={"model": "gpt-4o"})
        response = LLMResult(generations=[[ChatGeneration(message=message)]])
        handler.on_llm_error(ValueError("does not parse"), run_id=run_id, response=response)
        (row,) = tail(handler._ledger, 10)
    assert (row.value, row.estimated) == (5, False)
