"""The workflow component: one event in, a success flag and Stripe's answer out."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest
import stripe
from freezegun import freeze_time
from langchain_core.runnables import RunnableLambda
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.graph import END, START, StateGraph
from tcp_proxy import FaultProxy, answer_of_another_event

from langchain_stripe_meter import StripeMeterEvent
from langchain_stripe_meter.errors import ConfigurationError
from langchain_stripe_meter.sandbox import StripeSandbox, drop_answer

INPUT = {"event_name": "ai_tokens_used", "customer_id": "cus_123", "value": 500, "identifier": "job-42"}


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[StripeSandbox]:
    with StripeSandbox() as sandbox:
        for name, value in sandbox.environment().items():
            monkeypatch.setenv(name, value)
        sandbox.create_meter("ai_tokens_used")
        sandbox.create_customer(id="cus_123")
        yield sandbox


def error_of(out: dict[str, Any]) -> dict[str, Any]:
    assert out["success"] is False
    error: dict[str, Any] = out["response"]["error"]
    return error


def test_a_good_event_gives_success_and_stripes_own_object(sandbox: StripeSandbox) -> None:
    out = StripeMeterEvent().invoke(INPUT)
    assert out["success"] is True
    assert out["response"]["object"] == "billing.meter_event"
    assert out["response"]["payload"] == {"stripe_customer_id": "cus_123", "value": "500"}
    assert sandbox.billed("ai_tokens_used", "cus_123") == 500


def test_a_retried_step_with_the_same_identifier_succeeds_and_bills_once(sandbox: StripeSandbox) -> None:
    event = StripeMeterEvent()
    first, second = event.invoke(INPUT), event.invoke(INPUT)
    assert first["success"] is second["success"] is True
    assert second["response"]["duplicate"] is True
    assert sandbox.billed("ai_tokens_used", "cus_123") == 500


def test_a_used_identifier_says_nothing_of_an_event_that_stripe_did_not_take(sandbox: StripeSandbox) -> None:
    sandbox.create_customer(id="cus_other")
    StripeMeterEvent().invoke({**INPUT, "identifier": "job-1"})
    out = StripeMeterEvent().invoke({**INPUT, "identifier": "job-1", "customer_id": "cus_other", "value": 9})
    assert (out["success"], out["response"]["duplicate"], "payload" in out["response"]) == (True, True, False)
    assert "keeps what it got first" in out["response"]["message"]
    assert sandbox.billed("ai_tokens_used") == {"cus_123": 500}


def test_an_answer_that_is_not_the_event_is_no_success(sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(int(sandbox.url.rsplit(":", 1)[1])) as proxy:
        proxy.plan = [answer_of_another_event]
        monkeypatch.setenv("STRIPE_METER_API_BASE", proxy.url)
        error = error_of(StripeMeterEvent().invoke(INPUT))
    assert (error["type"], error["retryable"]) == ("unknown_outcome", True)


def test_what_is_no_stripe_client_is_refused_when_it_is_made() -> None:
    for wrong in (5, stripe):
        with pytest.raises(ConfigurationError, match="stripe= takes"):
            StripeMeterEvent(stripe=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("identifier", ["job:42", "a step of a flow", "2026-11-27T10:00/ann+1"])
def test_an_identifier_may_be_any_plain_text(sandbox: StripeSandbox, identifier: str) -> None:
    out = StripeMeterEvent().invoke({**INPUT, "identifier": identifier})
    assert (out["success"], out["response"]["identifier"]) == (True, identifier)


def test_a_step_may_give_a_timestamp_as_text(sandbox: StripeSandbox) -> None:
    at = sandbox.now() - 60
    for given in (str(at), float(at)):
        out = StripeMeterEvent().invoke({**INPUT, "timestamp": given, "identifier": f"at {given}"})
        assert (out["success"], out["response"]["timestamp"]) == (True, at)


def test_a_graphs_state_may_be_a_dataclass(sandbox: StripeSandbox) -> None:
    @dataclass
    class State:
        unset: int = field(init=False)
        event_name: str = "ai_tokens_used"
        customer_id: str = "cus_123"
        value: int = 5

    assert StripeMeterEvent().invoke(State())["success"] is True
    assert sandbox.billed("ai_tokens_used", "cus_123") == 5


def test_a_step_whose_answer_was_lost_can_be_repeated_safely(sandbox: StripeSandbox) -> None:
    sandbox.fail(drop_answer(), path="/v1/billing/meter_events")
    error = error_of(StripeMeterEvent().invoke(INPUT))
    assert error["type"] == "unknown_outcome"
    assert error["retryable"] is True
    again = StripeMeterEvent().invoke({**INPUT, "identifier": error["identifier"]})
    assert again["success"] is True
    assert sandbox.billed("ai_tokens_used", "cus_123") == 500


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("event_name", "x" * 101, "101 characters"),
        ("event_name", None, "missing"),
        ("customer_id", "ann@example.com", "cus_"),
        ("customer_id", "cus_1\r\nX-Evil: 1", "cus_"),
        ("value", float("nan"), "not finite"),
        ("value", float("inf"), "not finite"),
        ("value", True, "not a number"),
        ("value", "many", "not a number"),
        ("value", 1234567890123456, "16 significant digits"),
        ("identifier", "x" * 101, "identifier"),
        ("identifier", " 1", "identifier"),
        ("identifier", "\u00fc", "identifier"),
        ("timestamp", "soon", "whole Unix seconds"),
        ("timestamp", "9" * 5000, "whole Unix seconds"),
        ("timestamp", 1_700_000_000, "35 days"),
        ("timestamp", 4_000_000_000, "5 minutes"),
        ("timestamp", 1.5, "whole Unix seconds"),
    ],
)
def test_bad_input_is_named_in_the_response_and_nothing_is_sent(
    sandbox: StripeSandbox, field: str, value: object, says: str
) -> None:
    error = error_of(StripeMeterEvent().invoke({**INPUT, field: value}))
    assert error["type"] == "invalid_input"
    assert error["field"] == field
    assert says in error["message"]
    assert sandbox.events == []


def test_the_window_of_timestamps_is_35_days_back_and_5_minutes_ahead(sandbox: StripeSandbox) -> None:
    with freeze_time("2026-06-01T12:00:00Z", tick=True):
        now = sandbox.now()
        for offset, allowed in [(-35 * 86_400 + 60, True), (-35 * 86_400 - 60, False), (240, True), (360, False)]:
            out = StripeMeterEvent().invoke({**INPUT, "identifier": f"at{offset}", "timestamp": now + offset})
            assert out["success"] is allowed, offset


def test_no_key_a_malformed_key_and_a_wrong_key_are_told_apart(
    sandbox: StripeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = error_of(StripeMeterEvent(stripe="sk_test_wrongwrongwrong").invoke(INPUT))
    assert wrong["type"] == "unauthorised"
    assert "wrongwrong" not in wrong["message"]
    assert wrong["message"].endswith("Use a key that is in use and has 'Billing meter events: Write'.")
    publishable = error_of(StripeMeterEvent(stripe="pk_test_123").invoke(INPUT))
    assert "publishable" in publishable["message"]
    monkeypatch.delenv("STRIPE_API_KEY")
    missing = error_of(StripeMeterEvent().invoke(INPUT))
    assert missing["type"] == "configuration"
    assert missing["message"] == "There is no Stripe API key: set $STRIPE_API_KEY, or pass it as stripe."


def test_an_unknown_meter_is_stripes_no(sandbox: StripeSandbox) -> None:
    error = error_of(StripeMeterEvent().invoke({**INPUT, "event_name": "nope"}))
    assert error["type"] == "rejected"
    assert "nope" in error["message"]
    assert error["message"].endswith("Look at the meter and the customer in Stripe, or correct this input.")
    assert error["request_id"].startswith("req_")


def test_a_meter_with_its_own_payload_keys_gets_them(sandbox: StripeSandbox) -> None:
    sandbox.create_meter("custom", customer_key="who", value_key="amount")
    out = StripeMeterEvent().invoke({**INPUT, "event_name": "custom"})
    assert out["response"]["payload"] == {"who": "cus_123", "amount": "500"}


def test_it_is_a_runnable_sync_async_batch_in_a_sequence_and_as_a_tool(sandbox: StripeSandbox) -> None:
    event = StripeMeterEvent()
    inputs = [{**INPUT, "identifier": f"batch-{number}"} for number in range(3)]
    assert all(out["success"] for out in event.batch(inputs))
    assert asyncio.run(event.ainvoke({**INPUT, "identifier": "async"}))["success"]
    sequence = (
        RunnableLambda(lambda n: {**INPUT, "value": n, "identifier": "seq"}) | event | (lambda out: out["success"])
    )
    assert sequence.invoke(7) is True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LangChain calls as_tool() beta
        tool = event.as_tool()
    assert set(tool.args) == {"event_name", "customer_id", "value", "identifier", "timestamp"}
    parameters = convert_to_openai_tool(tool, strict=True)["function"]["parameters"]["properties"]
    assert [{"type": "null"} in one.get("anyOf", ()) for one in parameters.values()] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert set(tool.tool_call_schema.model_json_schema()["required"]) == {"event_name", "customer_id", "value"}
    assert tool.invoke({**INPUT, "identifier": "tool"})["success"]
    for wrong in ({"value": "abc"}, {"value": True}, {"value": None}, {"identifier": 7}, {"timestamp": "soon"}):
        assert error_of(tool.invoke({**INPUT, **wrong}))["field"] == next(iter(wrong))
    assert sandbox.billed("ai_tokens_used", "cus_123") == 3 * 500 + 500 + 7 + 500


class State(TypedDict, total=False):
    event_name: str
    customer_id: str
    value: int
    answer: str
    success: bool
    response: dict[str, Any]


def test_as_a_langgraph_node_it_reads_the_state_and_lets_the_next_step_branch(sandbox: StripeSandbox) -> None:
    graph = StateGraph(State)
    graph.add_node("meter", StripeMeterEvent())
    graph.add_edge(START, "meter")
    graph.add_node("apologise", lambda state: {"answer": state["response"]["error"]["message"]})
    graph.add_conditional_edges("meter", lambda state: END if state["success"] else "apologise")
    app = graph.compile()
    good = app.invoke({"event_name": "ai_tokens_used", "customer_id": "cus_123", "value": 5, "answer": "hi"})
    bad = app.invoke({"event_name": "nope", "customer_id": "cus_123", "value": 5})
    assert good["success"]
    assert good["answer"] == "hi"
    assert "nope" in bad["answer"]
