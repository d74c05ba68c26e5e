"""What one meter of one call cannot count is held; the other meters, and the other calls, go on."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from uuid import uuid4

import pytest
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from langchain_stripe_meter import Cost, Credits, Messages, StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.core.meters import Meter
from langchain_stripe_meter.core.runs import ABANDONED_AFTER
from langchain_stripe_meter.core.states import ReadingState
from langchain_stripe_meter.core.usage import Usage
from langchain_stripe_meter.counting import HELD_TOLD, held_news
from langchain_stripe_meter.errors import UsageError
from langchain_stripe_meter.ledger.store import Entry
from langchain_stripe_meter.ledger.views import Row, tail

SECRET = "what somebody wrote"
USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


class Unwritable:
    """A prompt or a tool of a shape that nobody expected."""

    def __str__(self) -> str:
        raise KeyError(SECRET)


class Meters:
    """A handler with every kind of meter, one of which prices with a library that fails."""

    now = 1_790_000_000.0

    def __init__(self, path: Path) -> None:
        def fail(usage: Usage, model: str, provider: str | None) -> Decimal:
            raise ValueError(SECRET)

        meters: list[Meter] = [Tokens("tokens"), Cost("cost", pricer=fail), Messages("messages")]
        self.handler = StripeMeterCallbackHandler(
            *meters, Credits("credits", {}, default=3, per="call"), customer="cus_1", deliver=False,
            ledger=f"sqlite:///{path}/l.db", clock=lambda: self.now, on_error=self._note,
        )  # fmt: skip
        self.errors: list[Exception] = []

    def _note(self, error: Exception) -> None:
        self.errors.append(error)

    def run(self, prompt: Any = "Hi", tools: Any = None, usage: Any = None) -> None:
        run_id = self.start(prompt, tools)
        message = AIMessage("Hello", usage_metadata=usage, response_metadata={"model_name": "m"})
        self.handler.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]), run_id=run_id)

    def start(self, prompt: Any = "Hi", tools: Any = None) -> Any:
        run_id = uuid4()
        self.handler.on_chat_model_start(
            {}, [[prompt]], run_id=run_id, invocation_params={"model": "m", "tools": tools}
        )
        return run_id

    def rows(self) -> dict[str, Row]:
        rows = tail(self.handler._ledger, 100)
        assert len({row.event_name for row in rows}) == len(rows)
        return {row.event_name: row for row in rows}


@pytest.fixture
def meters(tmp_path: Path) -> Iterator[Meters]:
    meters = Meters(tmp_path)
    with meters.handler:
        yield meters


def test_a_meter_that_fails_is_held_and_the_others_count(meters: Meters, caplog: pytest.LogCaptureFixture) -> None:
    meters.run(usage=USAGE)
    rows = meters.rows()
    assert {name: row.value for name, row in rows.items()} == {"tokens": 15, "cost": None, "messages": 1, "credits": 3}
    reason = "the amount could not be worked out for the model 'm': ValueError"
    assert (rows["cost"].state, rows["cost"].reason) == ("held", reason)
    assert meters.handler.status().unrecorded == 0
    assert SECRET not in caplog.text


def test_what_is_held_for_a_person_is_told_once_for_each_meter_and_reason(
    meters: Meters, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        meters.run(usage=USAGE)
    (error,) = meters.errors
    assert isinstance(error, UsageError)
    for said in ("on 'cost' is held", "for the model 'm'", "assign(", "held()"):
        assert said in str(error)
    assert caplog.text.count("on 'cost' is held") == 1
    meters.run(usage={**USAGE, "input_token_details": {"audio": 11}})
    assert ["on 'tokens' is held" in str(one) for one in meters.errors] == [False, True, False]


def test_reasons_that_differ_in_their_numbers_are_one_and_those_of_two_models_are_two(meters: Meters) -> None:
    for count in range(20):
        meters.run(usage={**USAGE, "input_token_details": {"audio": 11 + count}})
    assert sorted(str(one).split("'")[1] for one in meters.errors) == ["cost", "tokens"]
    held = [
        Entry(key, "credits", None, 0, ReadingState.HELD, reason=f"no credits are set for the model {model!r}")
        for key, model in (("a", "gpt-4"), ("b", "gpt-5"), ("c", "gpt-5"), ("d", "gpt-4o-2024-08-06"), ("e", "4"))
    ]
    assert [str(one).split("'")[3] for one in held_news(held, set())] == ["gpt-4", "gpt-5", "gpt-4o-2024-08-06", "4"]


def test_of_endless_reasons_only_so_many_are_told_and_that_is_said() -> None:
    held = [
        Entry(f"r{n}", "m", None, 0, ReadingState.HELD, reason=f"of the model 'm{n}x'") for n in range(HELD_TOLD + 9)
    ]
    said = [str(one) for one in held_news(held, set())]
    assert len(said) == HELD_TOLD
    assert ["for whatever reason" in one for one in said[-2:]] == [False, True]


def test_usage_that_cannot_be_estimated_is_held_where_it_is_needed(
    meters: Meters, caplog: pytest.LogCaptureFixture
) -> None:
    meters.run(prompt=Unwritable())
    rows = meters.rows()
    assert {name: row.value for name, row in rows.items()} == {
        "tokens": None, "cost": None, "messages": 1, "credits": 3,
    }  # fmt: skip
    assert rows["tokens"].reason == "the usage could not be estimated: KeyError"
    assert meters.handler.status().unrecorded == 0
    assert SECRET not in caplog.text


def test_an_abandoned_call_that_cannot_be_estimated_takes_no_other_with_it(meters: Meters) -> None:
    meters.handler.on_llm_new_token("some text", run_id=meters.start(tools=[Unwritable()]))
    meters.now += ABANDONED_AFTER
    other = meters.start()
    meters.handler._runs.sweep(int(meters.now))
    message = AIMessage("Hello", usage_metadata=USAGE, response_metadata={"model_name": "m"})
    meters.handler.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]), run_id=other)
    values = sorted(str(row.value) for row in tail(meters.handler._ledger, 100) if row.event_name == "tokens")
    assert values == ["15", "None"]


def test_an_ending_whose_payer_cannot_be_told_takes_no_other_with_it(meters: Meters) -> None:
    meters.handler.on_llm_new_token("some text", run_id=meters.start())
    meters.now += ABANDONED_AFTER
    good = meters.start()
    meters.handler._runs.sweep(int(meters.now))
    identify = meters.handler.customer.identify

    class Payer:
        """Who pays, unless the run is the one that is broken."""

        failed = 0

        def identify(self, facts: Any) -> Any:
            if not self.failed:
                self.failed = 1
                raise ValueError(SECRET)
            return identify(facts)

    meters.handler._recorder.customer = Payer()  # type: ignore[assignment]
    message = AIMessage("Hello", usage_metadata=USAGE, response_metadata={"model_name": "m"})
    meters.handler.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]), run_id=good)
    rows = [(row.state, row.value) for row in tail(meters.handler._ledger, 20) if row.event_name == "tokens"]
    assert sorted(rows) == [("held", ANY), ("resolved", 15)]
    assert meters.handler.status().unrecorded == 0
    told = [str(error) for error in meters.errors]
    assert ["who pays" in one for one in told] == [True, False]  # once, and then what the price is held for
    assert SECRET not in "".join(told)


def test_a_library_of_prices_that_cannot_price_cached_audio_costs_no_other_meter(tmp_path: Path) -> None:
    pytest.importorskip("genai_prices")
    usage = {**USAGE, "input_tokens": 100, "input_token_details": {"cache_read": 80, "audio": 50}}
    with StripeMeterCallbackHandler(
        Cost("cost"), Tokens("tokens"), customer="cus_1", deliver=False, ledger=f"sqlite:///{tmp_path}/l.db"
    ) as handler:
        handler.record_usage(usage, id="job", model="gemini-2.0-flash", provider="google_genai")
        rows = {row.event_name: row for row in tail(handler._ledger, 10)}
    assert rows["tokens"].value == 105
    assert rows["cost"].value is not None or rows["cost"].state == "held"
