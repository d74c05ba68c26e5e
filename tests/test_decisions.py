"""Decision models: paid for as any other, though LangChain reports them as steps of a chain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.runnables import RunnableLambda
from metering import Shop
from providers import OpenAIServer

from langchain_stripe_meter import Credits, Messages, Tokens

decisions = pytest.importorskip("langchain_core.decisions", reason="this LangChain has no decision models")
USAGE = {"input_tokens": 900, "output_tokens": 10, "total_tokens": 910}
REQUEST = {"state": "Which model is good enough?", "questions": {"model": None}}


class Decider(decisions.BaseDecisionModel):  # type: ignore[misc, name-defined]
    """A decision model of some provider."""

    model: str = "decider-1"
    usage: Any = USAGE

    @property
    def _provider(self) -> str:
        return "acme"

    def _classify(self, state: Any, questions: dict[str, Any]) -> Any:
        if self.usage == "fails":
            raise ValueError("the provider is away")
        choice = decisions.types.ChoiceAnswer.model_construct(type="choice", choice="big")
        answers = dict.fromkeys(questions, choice)
        return decisions.ClassifierResponse(model=self.model, answers=answers, usage=self.usage)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, Tokens("tokens"), Messages("messages"), Credits("credits", {"gpt-4o": 10})) as shop:
        yield shop


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_decision_is_billed_as_its_provider_reported_it(asynchronous: bool, shop: Shop) -> None:
    if asynchronous:
        asyncio.run(Decider().ainvoke(REQUEST, shop.config()))
    else:
        Decider().invoke(REQUEST, shop.config())
    assert shop.billed() == {"tokens": 910}
    assert not shop.rows()["tokens"].estimated
    assert shop.handler.status().open_runs == 0


def test_a_chain_that_ends_with_a_decision_is_billed_once(shop: Shop) -> None:
    (RunnableLambda(lambda _: REQUEST) | Decider()).invoke("Hi", shop.config())
    assert shop.billed() == {"tokens": 910}


def test_what_a_chain_gives_is_not_looked_into(shop: Shop) -> None:
    """It may be anything, such as a row that asks a database for each attribute."""

    class Row:
        def __getattr__(self, name: str) -> None:
            if name in {"answers", "usage", "model"}:
                raise RuntimeError("this row has no session any more")
            raise AttributeError(name)

    with OpenAIServer() as server:
        (server.chat() | RunnableLambda(lambda _: Row())).invoke("Hi", shop.config())
    assert shop.billed() == {"tokens": 15, "messages": 1, "credits": 10}


def test_a_decision_that_reports_no_usage_is_estimated(shop: Shop) -> None:
    Decider(usage=None).invoke(REQUEST, shop.config())
    assert shop.rows()["tokens"].estimated
    assert shop.billed()["tokens"] > 10


def test_a_decision_that_failed_is_not_billed(shop: Shop) -> None:
    with pytest.raises(ValueError, match="away"):
        Decider(usage="fails").invoke(REQUEST, shop.config())
    assert shop.billed() == {}
    assert shop.handler.status().open_runs == 0


@pytest.mark.filterwarnings("ignore:The middleware")  # that it is in beta
def test_an_agent_pays_for_what_chose_its_model_and_its_message_costs_what_the_model_does(shop: Shop) -> None:
    router = pytest.importorskip("langchain.agents.middleware.model_router")
    with OpenAIServer() as server:
        big = router.ModelChoice(model=server.chat("gpt-4o"), criteria="hard")
        small = router.ModelChoice(model=server.chat("gpt-4o-mini"), criteria="easy")
        chosen = router.ModelRouterMiddleware(
            choices={"big": big, "small": small}, instructions="Route.", classifier=Decider()
        )
        agent: Any = create_agent(server.chat(), [], middleware=[chosen])
        agent.invoke({"messages": [("user", "Hi")]}, shop.config())
    assert shop.billed() == {"tokens": 910 + 15, "messages": 1, "credits": 10}
