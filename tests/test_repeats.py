"""Runs that are told twice: what is recorded again changes nothing, and what only looks like it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage

from langchain_stripe_meter import Messages, StripeMeterCallbackHandler, Tokens, from_lead, from_metadata, static
from langchain_stripe_meter.errors import MeteringError
from langchain_stripe_meter.ledger.views import tail

Making = Callable[..., StripeMeterCallbackHandler]


@pytest.fixture(params=["sqlite", "postgresql"])
def making(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Making]:
    url = f"sqlite:///{tmp_path}/l.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made: list[StripeMeterCallbackHandler] = []

    def make(*meters: Any, **options: Any) -> StripeMeterCallbackHandler:
        usual = {"customer": "cus_1", "ledger": url, "deliver": False}
        made.append(StripeMeterCallbackHandler(*(meters or [Tokens("tokens")]), **{**usual, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(run_id: UUID, tokens: int, *handlers: StripeMeterCallbackHandler, asynchronously: bool = False) -> None:
    usage: Any = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
    model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)]))
    config: Any = {"callbacks": list(handlers), "run_id": run_id, "metadata": {"lead": {"email": "ann@example.com"}}}
    if asynchronously:
        asyncio.run(model.ainvoke("Hello", config))
    else:
        model.invoke("Hello", config)


@pytest.mark.parametrize("asynchronously", [False, True])
@pytest.mark.parametrize("customer", ["cus_1", from_lead()])
def test_runs_that_an_application_gives_one_id_are_told(
    making: Making, customer: Any, asynchronously: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A conversation's id, say: by the ledger's key the second run is the first, told again."""
    told: list[MeteringError] = []
    handler, conversation = making(customer=customer, on_error=told.append), uuid4()
    answer(uuid4(), 1, handler, asynchronously=asynchronously)
    answer(conversation, 15, handler, asynchronously=asynchronously)
    assert told == []
    answer(conversation, 20, handler, asynchronously=asynchronously)
    (error,) = told
    said = f"20 on tokens is not billed: the run {conversation.hex} was recorded before, with 15."
    assert str(error).startswith(said)
    assert "its own run_id" in str(error)
    assert said in caplog.text
    assert [row.value for row in tail(handler._ledger)] == [1, 15]


def test_one_run_that_two_handlers_of_one_ledger_hear_of_is_billed_once_and_nothing_is_told(making: Making) -> None:
    told: list[MeteringError] = []
    meters = (Tokens("tokens"), Messages("messages"))
    handlers = [making(*meters, on_error=told.append), making(*meters, on_error=told.append)]
    answer(uuid4(), 15, *handlers)
    assert (sorted(row.value or 0 for row in tail(handlers[0]._ledger)), told) == ([1, 15], [])


@pytest.mark.parametrize(("seconds", "told"), [(10, False), (3600, True)])
def test_as_much_as_before_is_only_told_where_it_can_hardly_be_one_run(
    making: Making, seconds: int, told: bool
) -> None:
    """Two handlers may have to wait for the ledger, one after the other. Nobody is told to correct what is billed."""
    errors: list[MeteringError] = []
    now, run = [1_800_000_000.0], uuid4()
    handler = making(on_error=errors.append, clock=lambda: now[0])
    answer(run, 15, handler)
    now[0] += seconds
    answer(run, 15, handler)
    assert ["taken for a repetition of the run" in str(error) for error in errors] == [True] * told


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (from_metadata("stripe_customer_id"), "cus_2", "recorded before, for nobody"),
        ("cus_1", "cus_2", "recorded before, for another customer"),
        ("cus_1", from_metadata("stripe_customer_id"), None),  # the second bills nobody, and says so
        (static(email="ann@example.com"), static(email="bob@example.com"), "recorded before, for another customer"),
        (static(email="ann@example.com"), "cus_1", None),  # may be the same
        ("cus_1", "cus_1", None),
    ],
)
def test_of_two_handlers_of_one_ledger_the_first_decides_who_pays_and_the_second_tells(
    making: Making, first: Any, second: Any, said: str | None
) -> None:
    told: list[MeteringError] = []
    answer(uuid4(), 15, making(customer=first, on_error=told.append), making(customer=second, on_error=told.append))
    assert ["the first one decides: attach one of them" in str(error) for error in told] == [True] * bool(said)
    assert said is None or said in str(told[0])


def test_an_estimate_of_as_much_a_day_later_is_told(making: Making) -> None:
    """An answer whose provider reports nothing, under the id of a conversation."""
    told: list[MeteringError] = []
    now, run = [1_800_000_000.0], uuid4()
    handler = making(Tokens("out", count="output"), on_error=told.append, clock=lambda: now[0])
    for said in ("Yes", "No"):
        GenericFakeChatModel(messages=iter([AIMessage(said)])).invoke("Hi", {"callbacks": [handler], "run_id": run})
        now[0] += 86_400
    assert ["taken for a repetition" in str(error) for error in told] == [True]


def test_a_second_handler_that_names_nobody_tells_nothing(making: Making) -> None:
    told: list[MeteringError] = []

    def fails(_: Any) -> Any:
        raise ValueError

    nobody = from_metadata("stripe_customer_id")
    answer(uuid4(), 15, making(customer=nobody), making(customer=nobody, tenant=fails, on_error=told.append))
    assert not [error for error in told if "is not billed" in str(error)]


def test_two_handlers_that_gave_up_one_stream_at_different_times_estimate_one_run(making: Making) -> None:
    told: list[MeteringError] = []
    now, run = [1_800_000_000.0], uuid4()
    handlers = [making(on_error=told.append, clock=lambda: now[0]) for _ in range(2)]
    for handler in handlers:
        handler.on_chat_model_start({}, [[HumanMessage("Hi")]], run_id=run)
        handler.on_llm_new_token("one two", run_id=run)
    for handler in handlers:
        handler.close()  # nobody will hear of its end
        now[0] += 1200
    assert (len(tail(handlers[0]._ledger)), told) == (1, [])


def test_a_job_that_is_told_again_is_no_news(making: Making) -> None:
    told: list[MeteringError] = []
    handler = making(on_error=told.append)
    for at in (handler._ledger.now() - 5000, None):
        handler.record_usage({"input_tokens": 5}, id="job", at=at)
    assert (len(tail(handler._ledger)), told) == (1, [])
