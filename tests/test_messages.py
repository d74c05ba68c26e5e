"""Messages and credits: one for each answered message of a user, whatever it took to answer it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.globals import get_llm_cache, set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt
from metering import Shop
from providers import AnthropicServer, OpenAIServer, Reply

from langchain_stripe_meter import Credits, Messages, Tokens

METERS = Tokens("tokens"), Messages("messages"), Credits("credits", {"gpt-4o": 10, "gpt-4o-mini": 1}, default=3)
ASK_TOOL = Reply("", tool_calls=[("look_up", {"word": "stripe"})])
QUESTION: Any = {"messages": [{"role": "user", "content": "What is a stripe?"}]}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with Shop(tmp_path, *METERS) as shop:
        yield shop


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def bill(calls: int, messages: int = 1, credits: int = 10) -> dict[str, int]:
    """So many model calls of 15 tokens each, for so many messages."""
    come_to = {"tokens": 15 * calls, "messages": messages, "credits": credits}
    return {name: value for name, value in come_to.items() if value}


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word}: a narrow band"


def run(runnable: Any, question: Any, config: Any, *, asynchronous: bool) -> Any:
    return asyncio.run(runnable.ainvoke(question, config)) if asynchronous else runnable.invoke(question, config)


both_flows = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@both_flows
def test_a_plain_chain_answers_one_message(shop: Shop, server: OpenAIServer, asynchronous: bool) -> None:
    chain = RunnableLambda(str) | server.chat() | RunnableLambda(lambda message: message.text)
    run(chain, "Hi", shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(1)


@both_flows
def test_an_agent_that_calls_a_model_three_times_answers_one_message(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    server.reply(ASK_TOOL, ASK_TOOL, Reply("A narrow band."))
    agent = create_agent(server.chat(), [look_up])
    run(agent, QUESTION, shop.config(), asynchronous=asynchronous)
    assert len(server.requests) == 3
    assert shop.billed() == bill(3)


def test_a_streamed_agent_answers_one_message(shop: Shop, server: OpenAIServer) -> None:
    server.reply(ASK_TOOL, Reply("A narrow band."))
    agent = create_agent(server.chat(), [look_up])

    async def read() -> None:
        async for _ in agent.astream(QUESTION, shop.config(), stream_mode=["messages", "updates"]):
            pass

    asyncio.run(read())
    assert shop.billed() == bill(2)


@both_flows
def test_a_sub_agent_used_as_a_tool_belongs_to_the_message_of_the_outer_one(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    inner: Any = create_agent(server.chat("gpt-4o-mini"), [look_up])

    @tool
    def ask_expert(question: str) -> str:
        """Ask an expert."""
        answer: str = inner.invoke({"messages": [("user", question)]})["messages"][-1].text
        return answer

    @tool("ask_expert")
    async def aask_expert(question: str) -> str:
        """Ask an expert."""
        answer: str = (await inner.ainvoke({"messages": [("user", question)]}))["messages"][-1].text
        return answer

    ask = Reply("", tool_calls=[("ask_expert", {"question": "What is a stripe?"})])
    server.reply(ask, ASK_TOOL, Reply("A band"), Reply("A narrow band."))
    outer = create_agent(server.chat(), [aask_expert if asynchronous else ask_expert])
    run(outer, QUESTION, shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(4)


@both_flows
def test_top_level_fallbacks_answer_one_message_at_the_price_of_the_model_that_answered(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    server.reply(Reply(status=500), Reply())
    model = server.chat("gpt-4o").with_fallbacks([server.chat("gpt-4o-mini")])
    run(model, "Hi", shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(1, credits=1)


@both_flows
def test_retries_answer_one_message(shop: Shop, server: OpenAIServer, asynchronous: bool) -> None:
    server.reply(Reply(status=500), Reply(status=429), Reply())
    model = server.chat().with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    run(model, "Hi", shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(1)


@both_flows
def test_parallel_branches_answer_one_message(shop: Shop, server: OpenAIServer, asynchronous: bool) -> None:
    branches = RunnableParallel(a=server.chat(), b=server.chat(), c=server.chat())
    run(branches, "Hi", shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(3)


@both_flows
def test_a_batch_of_two_questions_is_two_messages(shop: Shop, server: OpenAIServer, asynchronous: bool) -> None:
    chain = RunnableLambda(str) | server.chat()
    if asynchronous:
        asyncio.run(chain.abatch(["a", "b"], shop.config()))
    else:
        chain.batch(["a", "b"], shop.config())
    assert shop.billed() == bill(2, messages=2, credits=20)


@both_flows
def test_a_run_that_fails_after_its_model_answered_is_no_message_but_its_tokens_are_billed(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    def fail(_: Any) -> None:
        raise ValueError("the step after the model")

    with pytest.raises(ValueError, match="the step after"):
        run(server.chat() | RunnableLambda(fail), "Hi", shop.config(), asynchronous=asynchronous)
    assert shop.billed() == bill(1, messages=0, credits=0)


def chain_of(server: OpenAIServer) -> Any:
    return RunnableLambda(str) | server.chat()


@pytest.mark.parametrize("make", [OpenAIServer.chat, chain_of], ids=["model", "chain"])
@both_flows
def test_an_answer_that_its_reader_left_was_answered(
    make: Any, shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    server.reply(Reply("one two three four five six"))
    runnable = make(server)

    async def leave() -> None:
        chunks = runnable.astream("Count!", shop.config())
        for _ in range(3):
            await anext(chunks)
        await chunks.aclose()

    if asynchronous:
        asyncio.run(leave())
    else:
        chunks = runnable.stream("Count!", shop.config())
        for _ in range(3):
            next(chunks)
        chunks.close()
    billed = shop.billed()
    assert (billed["messages"], billed["credits"]) == (1, 10)
    assert billed["tokens"] >= 1


async def cancelled_once(stream: AsyncIterator[Any], has_come: Callable[[Any], object]) -> None:
    """Read a stream in a task that is cancelled when this has come."""
    arrived = asyncio.Event()

    async def read() -> None:
        async for one in stream:
            if has_come(one):
                arrived.set()

    task = asyncio.create_task(read())
    await arrived.wait()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("make", [OpenAIServer.chat, chain_of], ids=["model", "chain"])
def test_a_cancelled_stream_is_no_message_but_what_came_is_billed(make: Any, shop: Shop, server: OpenAIServer) -> None:
    server.reply(Reply("one two three", gate=threading.Event()))

    asyncio.run(cancelled_once(make(server).astream("Count!", shop.config()), lambda chunk: chunk.text))
    assert set(shop.billed()) == {"tokens"}
    assert unanswered(shop) == {"messages": 1, "credits": 10}


def test_a_chain_cancelled_after_its_model_answered_is_no_message(shop: Shop, server: OpenAIServer) -> None:
    async def main() -> None:
        arrived = asyncio.Event()

        async def never(_: Any) -> None:
            arrived.set()
            await asyncio.Event().wait()

        task = asyncio.create_task((server.chat() | RunnableLambda(never)).ainvoke("Hi", shop.config()))
        await arrived.wait()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert shop.billed() == bill(1, messages=0, credits=0)
    assert unanswered(shop) == {"messages": 1, "credits": 10}


def unanswered(shop: Shop) -> dict[str, Any]:
    """What was skipped because its message was cancelled: nobody rides free unseen."""
    skips = shop.handler.skips()
    assert {skip.reason for skip in skips} <= {"the message was cancelled before it was answered"}
    return {skip.event_name: skip.value for skip in skips}


def test_an_agent_cancelled_in_its_second_call_is_one_message_that_was_not_answered(
    shop: Shop, server: OpenAIServer
) -> None:
    server.reply(ASK_TOOL, Reply("one two three", gate=threading.Event()))

    agent = create_agent(server.chat(), [look_up])
    pieces = agent.astream(QUESTION, shop.config(), stream_mode="messages")
    asyncio.run(cancelled_once(pieces, lambda piece: "one" in piece[0].text))
    assert set(shop.billed()) == {"tokens"}
    assert unanswered(shop) == {"messages": 1, "credits": 10}


def test_a_step_whose_failure_is_handled_does_not_spoil_the_message(shop: Shop, server: OpenAIServer) -> None:
    def fragile(_: Any) -> None:
        raise ValueError("handled")

    chain = server.chat() | RunnableLambda(fragile).with_fallbacks([RunnableLambda(lambda message: message.text)])
    assert chain.invoke("Hi", shop.config()) == "Hello!"
    assert shop.billed() == bill(1)


def test_a_chain_without_any_model_is_no_message(shop: Shop) -> None:
    assert RunnableLambda(str).invoke(1, shop.config()) == "1"
    assert shop.billed() == {}
    assert shop.handler.status().open_runs == 0


# A person in the loop


class State(TypedDict, total=False):
    draft: str
    approved: bool
    answer: str


def approval(server: OpenAIServer) -> Any:
    """A graph that drafts, asks a person, and answers."""

    def draft(state: State) -> State:
        return {"draft": server.chat().invoke("Draft").text}

    def approve(state: State) -> State:
        return {"approved": interrupt("May I?")}

    def answer(state: State) -> State:
        return {"answer": server.chat("gpt-4o-mini").invoke("Answer").text}

    graph = StateGraph(State)
    graph.add_node("draft", draft)
    graph.add_node("approve", approve)
    graph.add_node("answer", answer)
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "approve")
    graph.add_edge("approve", "answer")
    graph.add_edge("answer", END)
    return graph.compile(InMemorySaver())


@both_flows
def test_a_message_that_waits_for_a_person_counts_once_it_is_answered(
    shop: Shop, server: OpenAIServer, asynchronous: bool
) -> None:
    graph, config = approval(server), shop.config(configurable={"thread_id": "t"})
    run(graph, {"draft": ""}, config, asynchronous=asynchronous)
    assert shop.billed() == bill(1, messages=0, credits=0)
    run(graph, Command(resume=True), config, asynchronous=asynchronous)
    assert shop.billed() == bill(2, credits=1)


def test_an_interrupt_inside_that_the_application_handled_leaves_an_answered_message(
    shop: Shop, server: OpenAIServer
) -> None:
    def outer(question: str) -> str:
        inner = approval(server).invoke({"draft": question}, {"configurable": {"thread_id": "inner"}})
        assert "__interrupt__" in inner
        return str(server.chat().invoke("Tell them that we need an approval").text)

    RunnableLambda(outer).invoke("May I?", shop.config())
    assert shop.billed()["messages"] == 1


# Which model answered


@pytest.mark.parametrize(
    ("answering", "credits"),
    [("gpt-4o", 10), ("gpt-4o-2024-08-06", 10), ("gpt-4o-mini-2024-07-18", 1), ("gpt-99", 3)],
)
def test_credits_follow_the_model_that_answered_and_not_the_one_asked_for(
    answering: str, credits: int, shop: Shop, server: OpenAIServer
) -> None:
    server.reply(Reply(model=answering))
    server.chat("gpt-4o").invoke("Hi", shop.config())
    assert shop.billed() == bill(1, credits=credits)


def test_credits_of_a_message_are_those_of_the_last_model_and_per_call_those_of_all(tmp_path: Path) -> None:
    prices = {"gpt-4o": 10, "claude-sonnet-4-6": 4}
    meters = Credits("message", prices), Credits("call", prices, per="call")
    with OpenAIServer() as openai, AnthropicServer() as anthropic, Shop(tmp_path, *meters) as shop:
        chain = openai.chat() | RunnableLambda(lambda message: message.text) | anthropic.chat()
        chain.invoke("Hi", shop.config())
        assert shop.billed() == {"message": 4, "call": 14}


def test_a_model_without_credits_is_held_with_its_name(tmp_path: Path, server: OpenAIServer) -> None:
    with Shop(tmp_path, Credits("credits", {"gpt-4o": 10})) as shop:
        server.chat("gpt-99").invoke("Hi", shop.config())
        assert shop.billed() == {}
        assert "gpt-99" in shop.handler.held()[0].reason


# Explicit callbacks inside a run start a new root, which loses the metadata


@both_flows
@pytest.mark.parametrize("also_outside", [True, False], ids=["inside and outside", "only inside"])
def test_explicit_callbacks_inside_a_run_keep_the_customer_of_the_run_around_them(
    shop: Shop, server: OpenAIServer, asynchronous: bool, also_outside: bool
) -> None:
    model = server.chat()
    explicit: RunnableConfig = {"callbacks": [shop.handler]}
    step = RunnableLambda(
        lambda question: model.invoke(question, explicit),
        afunc=lambda question: model.ainvoke(question, explicit),
    )
    config = shop.config("cus_2")
    if not also_outside:
        del config["callbacks"]
    run(step, "Hi", config, asynchronous=asynchronous)
    assert shop.billed("cus_2") == bill(1)
    assert shop.billed("cus_1") == {}


def test_two_models_called_explicitly_inside_one_run_answer_one_message(shop: Shop, server: OpenAIServer) -> None:
    model = server.chat()
    explicit: RunnableConfig = {"callbacks": [shop.handler]}
    step = RunnableLambda(lambda question: [model.invoke(question, explicit) for _ in range(2)])
    step.invoke("Hi", shop.config())
    assert shop.billed() == bill(2)


@pytest.mark.parametrize("named", [True, False], ids=["named by its topmost run", "named inside only"])
def test_a_message_is_paid_by_whom_its_topmost_run_names_whoever_pays_for_its_last_call(
    shop: Shop, server: OpenAIServer, named: bool
) -> None:
    own_costs = server.chat().with_config(metadata={"stripe_customer_id": "cus_2"})
    chain = server.chat() | RunnableLambda(lambda message: own_costs.invoke(message.text))
    chain.invoke("Hi", shop.config("cus_1") if named else {"callbacks": [shop.handler]})
    assert shop.billed("cus_1") == (bill(1) if named else {})
    assert shop.billed("cus_2") == bill(1, *((0, 0) if named else ()))


def test_the_customer_of_explicit_metadata_inside_a_run_pays_for_the_call(shop: Shop, server: OpenAIServer) -> None:
    model = server.chat()
    inner = shop.config("cus_2")
    RunnableLambda(lambda question: model.invoke(question, inner)).invoke("Hi", shop.config("cus_1"))
    assert shop.billed("cus_2")["tokens"] == 15
    assert "tokens" not in shop.billed("cus_1")


def test_what_a_message_left_to_run_in_the_background_begins_after_its_end_is_no_message_of_its_own(
    shop: Shop, server: OpenAIServer
) -> None:
    model, answered, background = server.chat(), asyncio.Event(), []

    async def remember() -> None:
        await answered.wait()
        await model.ainvoke("What is worth remembering?")

    async def answer(state: State) -> State:
        background.append(asyncio.create_task(remember()))
        await model.ainvoke("Hi")
        return state

    async def main() -> None:
        graph = StateGraph(State).add_node(answer).add_edge(START, "answer").compile()
        await graph.ainvoke({"draft": "Hi"}, shop.config())
        answered.set()
        await background[0]

    asyncio.run(main())
    assert shop.billed() == bill(2)


# LangChain's own cache: its end reports the full usage again, though nobody was asked


@pytest.fixture
def llm_cache() -> Iterator[None]:
    before = get_llm_cache()
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(before)


@pytest.mark.usefixtures("llm_cache")
@both_flows
@pytest.mark.parametrize("reply", [Reply(), Reply(usage=None)], ids=["reported", "unreported"])
@pytest.mark.parametrize("provider", [OpenAIServer, AnthropicServer])
def test_an_answer_from_langchains_cache_is_a_message_but_no_call(
    provider: Any, reply: Reply, shop: Shop, asynchronous: bool
) -> None:
    with provider() as server:
        server.reply(reply)
        model = server.chat()
        model.invoke("Hi", shop.config())
        asked = shop.billed()
        run(model, "Hi", shop.config(), asynchronous=asynchronous)
    assert len(server.requests) == 1
    assert shop.billed() == {**asked, "messages": 2, "credits": 2 * asked["credits"]}


@pytest.mark.usefixtures("llm_cache")
def test_cache_hits_are_billed_as_calls_where_the_owner_says_so(tmp_path: Path, server: OpenAIServer) -> None:
    with Shop(tmp_path, *METERS, bill_cache_hits=True) as shop:
        model = server.chat()
        for _ in range(2):
            model.invoke("Hi", shop.config())
        assert shop.billed() == bill(2, messages=2, credits=20)


class OwnModel(BaseChatModel):
    """Says what it used, and maybe what that cost, a name of its own for the answer, and something beside it. Async, it
    answers at once."""

    cost: Any = None
    name_of_answer: str | None = None
    beside: Any = None
    asked: int = 0

    @property
    def _llm_type(self) -> str:
        return "own"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        self.asked += 1
        usage: Any = {"input_tokens": 12, "output_tokens": 3, "total_tokens": 15}
        if self.cost is not None:
            usage["total_cost"] = self.cost
        answer = AIMessage("Hello", usage_metadata=usage, id=self.name_of_answer)
        return ChatResult(generations=[ChatGeneration(message=answer)], llm_output=self.beside)

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate()


def twice_at_once(model: Any, shop: Shop, *, asynchronous: bool = False) -> None:
    """Ask the same twice so that the answer is found in the cache before the end of the call that paid for it is told,
    and with it the mark of a hit."""
    questions: Any = [[HumanMessage("Hi")], [HumanMessage("Hi")]]
    config = shop.config()
    if asynchronous:
        asyncio.run(model.agenerate(questions, **config))
    else:
        model.generate(questions, **config)


@pytest.mark.usefixtures("llm_cache")
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"n": 2}], ids=str)
def test_a_call_is_billed_though_its_answer_was_found_in_the_cache_before_its_end_was_told(
    shop: Shop, server: OpenAIServer, options: dict[str, Any]
) -> None:
    twice_at_once(server.chat(**options), shop)
    assert len(server.requests) == 1
    assert shop.billed() == bill(1, messages=2, credits=20)


@pytest.mark.usefixtures("llm_cache")
@both_flows
@pytest.mark.parametrize("options", [{}, {"name_of_answer": "answer-1", "beside": {}}], ids=["unnamed", "named"])
def test_so_is_that_of_a_model_whose_answers_have_no_name_or_something_beside_them(
    shop: Shop, asynchronous: bool, options: dict[str, Any]
) -> None:
    model = OwnModel(**options)
    twice_at_once(model, shop, asynchronous=asynchronous)
    assert model.asked == 1
    assert shop.billed()["tokens"] == 15


@pytest.mark.parametrize("cost", [0.3, 0.0, 0])
def test_a_model_that_reports_what_it_cost_is_billed(shop: Shop, cost: float) -> None:
    model = OwnModel(cost=cost)
    model.invoke("Hi", shop.config())
    assert shop.billed()["tokens"] == 15


@pytest.mark.parametrize(("cost", "tokens"), [(0.3, 15), (0.0, 15), (3, 15), (0, None)])
def test_of_a_model_that_names_its_answers_only_langchains_own_mark_tells_a_hit(
    shop: Shop, cost: float, tokens: int | None
) -> None:
    model = OwnModel(cost=cost, name_of_answer="answer-1")
    model.invoke("Hi", shop.config())
    assert shop.billed().get("tokens") == tokens
