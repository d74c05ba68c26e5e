"""Limits: no model is called for a customer who has used up a budget, in chains and in agents alike."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from books import Clock
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from metering import Shop, paid_by
from providers import OpenAIServer, Reply, openai_usage

from langchain_stripe_meter import (
    Messages,
    StripeMeterCallbackHandler,
    Tokens,
    from_context,
    from_lead,
    from_metadata,
    static,
)
from langchain_stripe_meter.agents.limits import (
    Budget,
    Spender,
    SpendLimit,
    SpendLimitCallback,
    SpendLimitError,
    SpendLimitMiddleware,
)
from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.errors import ConfigurationError, LedgerError, MeteringError

USAGE = openai_usage(10, 5)  # 15 tokens a call


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        server.reply(*[Reply("Hello!", usage=USAGE)] * 40)
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handler(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., StripeMeterCallbackHandler]]:
    """Makes handlers on one ledger, that only record."""
    made: list[StripeMeterCallbackHandler] = []

    def make(*meters: Any, **options: Any) -> StripeMeterCallbackHandler:
        usual = {"customer": from_metadata("stripe_customer_id"), "ledger": f"sqlite:///{tmp_path}/ledger.db"}
        options = {**usual, "deliver": False, "clock": clock, **options}
        made.append(StripeMeterCallbackHandler(*(meters or (Tokens("tokens"), Messages("messages"))), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def meter(handler: Callable[..., StripeMeterCallbackHandler]) -> StripeMeterCallbackHandler:
    return handler()


def use(meter: StripeMeterCallbackHandler, tokens: int, customer: str = "cus_1", **options: Any) -> None:
    meter.record_usage({"input_tokens": tokens}, id=uuid4().hex, customer=customer, **options)


def gated(budget: Budget, meter: StripeMeterCallbackHandler, customer: str = "cus_1") -> Any:
    return {**paid_by(customer), "callbacks": [meter, SpendLimitCallback(budget)]}


def agent_of(server: OpenAIServer, *tools: Any, middleware: SpendLimitMiddleware, name: str = "bot") -> Any:
    return create_agent(server.chat(), list(tools), middleware=[middleware], name=name)


def ask(agent: Any, meter: StripeMeterCallbackHandler, customer: str = "cus_1") -> list[Any]:
    messages: list[Any] = agent.invoke({"messages": [HumanMessage("Hi")]}, paid_by(customer, meter))["messages"]
    return messages


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} is a word"


LOOK_UP = Reply(tool_calls=[("look_up", {"word": "hi"})], usage=USAGE)


# -- the budget, as the application reads it


def test_what_remains_falls_with_what_is_used_and_never_below_nothing(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 100))
    assert budget.remaining("cus_1") == 100
    use(meter, 60)
    assert budget.remaining("cus_1") == 40
    assert budget.remaining("cus_2") == 100
    budget.check("cus_1")
    use(meter, 60)
    assert budget.remaining("cus_1") == 0
    with pytest.raises(
        SpendLimitError, match=r"limit of 100 tokens is used up \(120 were used\).* 2026-06-01 00:00:00"
    ):
        budget.check("cus_1")
    budget.check("cus_2")


def test_a_limit_that_is_reached_exactly_is_used_up(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 100))
    use(meter, 99)
    budget.check("cus_1")
    use(meter, 1)
    with pytest.raises(SpendLimitError):
        budget.check("cus_1")


def test_an_allowance_tells_the_application_everything(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", Decimal("50.5"), per="day"), SpendLimit("tokens", 70, per="ever"))
    use(meter, 20)
    day, ever = budget.allowances("cus_1")
    assert (day.event_name, day.per, day.limit, day.used) == ("tokens", "day", Decimal("50.5"), 20)
    assert (day.remaining, day.is_used_up) == (Decimal("30.5"), False)
    assert day.resets_at == datetime(2026, 5, 21, tzinfo=UTC)
    assert (ever.remaining, ever.resets_at) == (50, None)
    assert budget.remaining("cus_1") == Decimal("30.5")


def test_limits_on_several_meters_all_hold_and_are_asked_for_by_name(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 10), SpendLimit("messages", 5))
    assert (budget.remaining("cus_1", "tokens"), budget.remaining("cus_1", "messages")) == (10, 5)
    with pytest.raises(ConfigurationError, match="say which: messages, tokens"):
        budget.remaining("cus_1")
    with pytest.raises(ConfigurationError, match="no limit on 'credits'"):
        budget.remaining("cus_1", "credits")
    use(meter, 10)
    with pytest.raises(SpendLimitError) as caught:
        budget.check("cus_1")
    assert caught.value.event_name == "tokens"


def test_a_new_period_gives_the_budget_back(meter: StripeMeterCallbackHandler, clock: Clock) -> None:
    budget = Budget(meter, SpendLimit("tokens", 10, per="day"))
    clock.set("2026-05-20 23:59:59")
    use(meter, 10)
    with pytest.raises(SpendLimitError):
        budget.check("cus_1")
    clock.set("2026-05-21 00:00:00")
    budget.check("cus_1")
    assert budget.remaining("cus_1") == 10


def test_a_limit_can_be_the_plans(meter: StripeMeterCallbackHandler) -> None:
    asked: list[Spender] = []

    def plan(spender: Spender) -> int | None:
        asked.append(spender)
        return {"cus_1": 10, "cus_2": 1000}.get(spender.reference.value)

    budget = Budget(meter, SpendLimit("tokens", plan))
    for customer in ("cus_1", "cus_2", "cus_3"):
        use(meter, 500, customer)
    assert [budget.remaining(customer) for customer in ("cus_1", "cus_2", "cus_3")] == [0, 500, None]
    budget.check("cus_2")
    budget.check("cus_3")
    with pytest.raises(SpendLimitError):
        budget.check("cus_1")
    assert asked[0].reference == Reference("id", "cus_1")
    budget.remaining(Facts({"stripe_customer_id": "cus_2", "plan": "pro"}))
    assert asked[-1].facts.metadata["plan"] == "pro"


@pytest.mark.parametrize("amount", [-1, True, 1.5, "100", Decimal("NaN")])
def test_an_amount_that_is_none_is_refused_also_from_a_plan(meter: StripeMeterCallbackHandler, amount: Any) -> None:
    with pytest.raises(ConfigurationError, match="A limit is an int or a Decimal"):
        SpendLimit("tokens", amount)
    budget = Budget(meter, SpendLimit("tokens", lambda _: amount), on_failure="stop")
    for ask in (budget.check, budget.remaining, budget.allowances):
        with pytest.raises(ConfigurationError, match=r"limit on 'tokens'.*A limit is an int or a Decimal"):
            ask("cus_1")


def no_plan(spender: Spender) -> int:
    """A callable with a bug, whose error repeats what it should not."""
    return int({}[f"ann@example.com of {spender.reference.by}"])


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["allow", "stop"])
def test_a_limit_that_cannot_be_worked_out_is_told_and_the_call_goes_on_unless_told_otherwise(
    handler: Callable[..., StripeMeterCallbackHandler],
    server: OpenAIServer,
    caplog: pytest.LogCaptureFixture,
    policy: Any,
    asynchronous: bool,
) -> None:
    told: list[Exception] = []
    meter = handler(on_error=told.append)
    budget = Budget(meter, SpendLimit("tokens", no_plan), SpendLimit("tokens", 20, "ever"), on_failure=policy)
    config, said = gated(budget, meter), "limit on 'tokens' cannot be worked out: its amount failed with KeyError at "

    def call() -> None:
        if asynchronous:
            asyncio.run(server.chat().ainvoke("Hi", config))
        else:
            server.chat().invoke("Hi", config)

    if policy == "stop":
        with pytest.raises(ConfigurationError, match=said) as caught:
            call()
        gc.collect()
        assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)  # it may quote a person
        assert (server.requests, told) == ([], [])
        return
    call()
    assert said in caplog.text
    assert [type(error) for error in told] == [ConfigurationError]
    assert said in str(told[0])
    assert "ann@" not in caplog.text + str(told[0])
    call()
    with pytest.raises(SpendLimitError):  # the other limit holds all the same
        call()
    gc.collect()
    assert len(server.requests) == 2


def test_a_limit_on_what_nobody_counts_is_refused(meter: StripeMeterCallbackHandler) -> None:
    with pytest.raises(ConfigurationError, match="no meter 'tokns' to limit; it has tokens, messages"):
        Budget(meter, SpendLimit("tokns", 1))
    with pytest.raises(ConfigurationError, match="at least one limit"):
        Budget(meter)
    with pytest.raises(ConfigurationError, match="unidentified='ignore'"):
        Budget(meter, SpendLimit("tokens", 1), unidentified="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="exit_behavior='stop'"):
        SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 1)), exit_behavior="stop")  # type: ignore[arg-type]


def test_the_error_is_one_of_ours_says_who_must_act_and_survives_a_process_boundary() -> None:
    error = SpendLimitError("used up", "tokens", Decimal(1), Decimal(2), datetime(2026, 6, 1, tzinfo=UTC))
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, MeteringError)
    assert (str(copy), copy.event_name, copy.limit, copy.used, copy.resets_at) == (
        "used up", "tokens", 1, 2, error.resets_at,
    )  # fmt: skip


# -- who is limited


def test_a_lead_is_limited_before_and_after_its_customer_is_found(tmp_path: Path, server: OpenAIServer) -> None:
    with Shop(tmp_path, Tokens("tokens"), customer=from_lead("email")) as shop:
        meter = shop.handler
        meter.leads.capture("s1", email="ann@example.com")
        budget = Budget(meter, SpendLimit("tokens", 40, per="ever"))
        config = {"metadata": {"session_id": "s1"}, "callbacks": [meter, SpendLimitCallback(budget)]}
        server.chat().invoke("Hi", config)  # type: ignore[arg-type]
        assert budget.remaining(Reference("email", "ann@example.com")) == 25
        ann = shop.sandbox.create_customer(email="ann@example.com")
        meter.flush(60)
        meter.retry()
        assert meter.flush(60).pending == 0
        assert shop.sandbox.billed("tokens", ann) == 15
        assert budget.remaining(Reference("email", "ann@example.com")) == 25
        assert Budget(meter, *budget.limits).remaining(Reference("email", "ann@example.com")) == 25
        server.chat().invoke("Hi", config)  # type: ignore[arg-type]
        server.chat().invoke("Hi", config)  # type: ignore[arg-type]
        with pytest.raises(SpendLimitError) as caught:
            server.chat().invoke("Hi", config)  # type: ignore[arg-type]
        assert "ann" not in str(caught.value)
        assert budget.remaining(Facts({"session_id": "s1"})) == 0


def test_nobody_is_let_through_unless_the_budget_says_otherwise(
    meter: StripeMeterCallbackHandler, server: OpenAIServer
) -> None:
    limit = SpendLimit("tokens", 0)
    server.chat().invoke("Hi", {"callbacks": [meter, SpendLimitCallback(Budget(meter, limit))]})
    assert Budget(meter, limit).remaining() is None
    strict = Budget(meter, limit, unidentified="stop")
    with pytest.raises(SpendLimitError, match="Nobody could be identified"):
        server.chat().invoke("Hi", {"callbacks": [meter, SpendLimitCallback(strict)]})
    assert len(server.requests) == 1


def test_a_static_customer_shares_one_budget(
    handler: Callable[..., StripeMeterCallbackHandler], server: OpenAIServer
) -> None:
    meter = handler(customer=static(email="ann@example.com"))
    budget = Budget(meter, SpendLimit("tokens", 20))
    callbacks: Any = {"callbacks": [meter, SpendLimitCallback(budget)]}
    server.chat().invoke("Hi", callbacks)
    server.chat().invoke("Hi", callbacks)
    with pytest.raises(SpendLimitError):
        server.chat().invoke("Hi", callbacks)


# -- chains


def test_a_chain_is_stopped_before_its_model_is_called(meter: StripeMeterCallbackHandler, server: OpenAIServer) -> None:
    budget = Budget(meter, SpendLimit("tokens", 30))
    chain = ChatPromptTemplate.from_template("{question}") | server.chat()
    for _ in range(2):
        chain.invoke({"question": "Hi"}, gated(budget, meter))
    with pytest.raises(SpendLimitError):
        chain.invoke({"question": "Hi"}, gated(budget, meter))
    chain.invoke({"question": "Hi"}, gated(budget, meter, "cus_2"))
    assert len(server.requests) == 3
    assert budget.remaining("cus_1") == 0
    assert meter.status().open_runs == 0
    assert meter.status().abandoned == 0


def test_every_way_to_call_a_model_is_stopped(meter: StripeMeterCallbackHandler, server: OpenAIServer) -> None:
    config = gated(Budget(meter, SpendLimit("tokens", 0)), meter)
    model, completion = server.chat(), server.completion()

    async def astream() -> None:
        async for _ in model.astream("Hi", config):
            pass

    async def synchronously_on_a_loop() -> None:
        model.invoke("Hi", config)

    ways: list[Callable[[], Any]] = [
        lambda: model.invoke("Hi", config),
        lambda: list(model.stream("Hi", config)),
        lambda: model.batch(["Hi", "Ho"], config),
        lambda: completion.invoke("Hi", config),
        lambda: asyncio.run(model.ainvoke("Hi", config)),
        lambda: asyncio.run(astream()),
        lambda: asyncio.run(model.abatch(["Hi", "Ho"], config)),
        lambda: asyncio.run(completion.ainvoke("Hi", config)),
        lambda: asyncio.run(synchronously_on_a_loop()),
        lambda: model.with_fallbacks([server.chat()]).invoke("Hi", config),
    ]
    for number, way in enumerate(ways):
        with pytest.raises(SpendLimitError):
            pytest.fail(f"way {number} was not stopped: {way()}")
    assert server.requests == []
    assert meter.flush().pending == 0
    status = meter.status()
    assert (status.open_runs, status.abandoned, status.unrecorded) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:coroutine 'ahandle_event' was never awaited")
def test_a_stream_of_events_is_stopped_though_langchain_forgets_its_own_handler(
    meter: StripeMeterCallbackHandler, server: OpenAIServer
) -> None:
    """LangChain puts its handler after ours, and drops the coroutine that would have told it of the start."""

    async def events() -> None:
        config = gated(Budget(meter, SpendLimit("tokens", 0)), meter)
        async for _ in server.chat().astream_events("Hi", config, version="v2"):
            pass

    with pytest.raises(SpendLimitError):
        asyncio.run(events())
    gc.collect()  # so that the warning comes while it is expected
    assert server.requests == []


def test_an_event_loop_goes_on_while_the_ledger_is_read(
    meter: StripeMeterCallbackHandler, server: OpenAIServer
) -> None:
    """The ledger is held until something else on the same loop has run: were the loop blocked, nothing ever would."""
    budget = Budget(meter, SpendLimit("tokens", 0))
    budget.refresh()
    lock = budget._counters._lock

    async def main() -> None:
        lock.acquire()
        call = asyncio.create_task(server.chat().ainvoke("Hi", gated(budget, meter)))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(lock.release)
        with pytest.raises(SpendLimitError):
            await call

    asyncio.run(main())


def test_a_call_that_is_cancelled_while_it_is_checked_is_closed_for_the_meter(
    meter: StripeMeterCallbackHandler, server: OpenAIServer
) -> None:
    budget = Budget(meter, SpendLimit("tokens", 100))
    budget.refresh()

    async def main() -> None:
        call = asyncio.create_task(server.chat().ainvoke("Hi", gated(budget, meter)))
        while not meter.status().open_runs:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        budget._counters._lock.release()

    budget._counters._lock.acquire()
    asyncio.run(main())
    assert meter.status().open_runs == 0
    assert server.requests == []


@pytest.mark.parametrize("policy", ["allow", "stop"])
def test_a_ledger_that_cannot_be_read_lets_calls_through_unless_told_otherwise(
    handler: Callable[..., StripeMeterCallbackHandler],
    server: OpenAIServer,
    caplog: pytest.LogCaptureFixture,
    policy: Any,
) -> None:
    told: list[Exception] = []
    meter = handler(on_error=told.append)
    budget = Budget(meter, SpendLimit("tokens", 0), on_failure=policy)
    with meter._ledger.deliver_lane().transaction() as connection:
        connection.exec_driver_sql("DROP TABLE acts")
    config = {**paid_by("cus_1"), "callbacks": [SpendLimitCallback(budget)]}
    if policy == "stop":
        with pytest.raises(LedgerError):
            server.chat().invoke("Hi", config)
    else:
        server.chat().invoke("Hi", config)
        assert "a limit could not be checked, the call goes on" in caplog.text
    assert len(server.requests) == len(told) == (policy == "allow")


# -- agents


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_answers_that_the_limit_is_reached_instead_of_calling_its_model(
    meter: StripeMeterCallbackHandler, server: OpenAIServer, asynchronous: bool
) -> None:
    agent = agent_of(server, middleware=SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 15))))

    def run(customer: str) -> list[Any]:
        question: Any = {"messages": [HumanMessage("Hi")]}
        if asynchronous:
            return list(asyncio.run(agent.ainvoke(question, paid_by(customer, meter)))["messages"])
        return list(agent.invoke(question, paid_by(customer, meter))["messages"])

    assert run("cus_1")[-1].content == "Hello!"
    last = run("cus_1")[-1]
    assert isinstance(last, AIMessage)
    assert str(last.content).startswith("The limit of 15 tokens is used up")
    assert run("cus_2")[-1].content == "Hello!"
    assert len(server.requests) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agent_can_raise_instead(
    meter: StripeMeterCallbackHandler, server: OpenAIServer, asynchronous: bool
) -> None:
    budget = Budget(meter, SpendLimit("tokens", 0))
    agent = agent_of(server, middleware=SpendLimitMiddleware(budget, exit_behavior="error"))
    question: Any = {"messages": [HumanMessage("Hi")]}

    def run() -> Any:
        if asynchronous:
            return asyncio.run(agent.ainvoke(question, paid_by("cus_1", meter)))
        return agent.invoke(question, paid_by("cus_1", meter))

    with pytest.raises(SpendLimitError) as caught:
        run()
    assert (caught.value.limit, caught.value.used) == (0, 0)
    assert server.requests == []


def test_a_limit_that_is_reached_in_mid_agent_stops_the_next_call(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    meter = handler()
    with OpenAIServer() as server:
        server.reply(LOOK_UP, LOOK_UP, Reply("Never said", usage=USAGE))
        budget = Budget(meter, SpendLimit("tokens", 30))
        words = SpendLimitMiddleware(budget, message=lambda error: f"Come back on {error.resets_at:%d %B}.")
        messages = ask(agent_of(server, look_up, middleware=words), meter)
        assert messages[-1].content == "Come back on 01 June."
        assert [message.type for message in messages] == ["human", "ai", "tool", "ai", "tool", "ai"]
        assert len(server.requests) == 2
        assert budget.remaining("cus_1") == 0
        assert ask(agent_of(server, middleware=SpendLimitMiddleware(budget, message="No.")), meter)[-1].content == "No."


def test_a_tool_can_read_what_remains_for_whoever_pays(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 100))

    @tool
    def look_up(word: str) -> str:
        """Look a word up."""
        return f"remaining: {budget.remaining()}"

    with OpenAIServer() as server:
        server.reply(LOOK_UP, Reply("Done", usage=USAGE))
        messages = ask(create_agent(server.chat(), [look_up]), meter)
        assert messages[-2].content == "remaining: 85"


def test_a_sub_agent_is_stopped_by_its_own_middleware_and_its_use_counts(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 30))
    with OpenAIServer() as server:
        inner = agent_of(server, middleware=SpendLimitMiddleware(budget, message="No more."), name="inner")

        @tool
        def look_up(word: str) -> str:
            """Look a word up."""
            return str(inner.invoke({"messages": [HumanMessage(word)]})["messages"][-1].content)

        server.reply(LOOK_UP, Reply("Inner", usage=USAGE), Reply("Never said", usage=USAGE))
        outer = agent_of(server, look_up, middleware=SpendLimitMiddleware(budget, message="Enough."), name="outer")
        messages = ask(outer, meter)
        assert [message.content for message in messages[-2:]] == ["Inner", "Enough."]
        assert ask(inner, meter)[-1].content == "No more."
        assert len(server.requests) == 2


def test_a_model_inside_a_tool_is_stopped_by_the_callback(meter: StripeMeterCallbackHandler) -> None:
    budget = Budget(meter, SpendLimit("tokens", 15))
    with OpenAIServer() as server:
        inner = server.chat()

        @tool
        def look_up(word: str) -> str:
            """Look a word up."""
            return str(inner.invoke(word).content)

        server.reply(LOOK_UP, Reply("Never said", usage=USAGE))
        with pytest.raises(SpendLimitError):
            create_agent(server.chat(), [look_up]).invoke({"messages": [HumanMessage("Hi")]}, gated(budget, meter))
        assert len(server.requests) == 1


@pytest.mark.parametrize("mode", ["values", "updates", "messages"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_streaming_agent_is_stopped_too(
    meter: StripeMeterCallbackHandler, server: OpenAIServer, mode: Any, asynchronous: bool
) -> None:
    agent = agent_of(server, middleware=SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 15)), message="No."))
    question: Any = {"messages": [HumanMessage("Hi")]}

    async def astream() -> list[Any]:
        return [part async for part in agent.astream(question, paid_by("cus_1", meter), stream_mode=mode)]

    def stream() -> str:
        if asynchronous:
            return str(asyncio.run(astream()))
        return str(list(agent.stream(question, paid_by("cus_1", meter), stream_mode=mode)))

    assert "No." not in stream()
    assert "No." in stream()
    assert len(server.requests) == 1


def test_a_limit_on_messages_lets_a_message_that_was_begun_be_answered(meter: StripeMeterCallbackHandler) -> None:
    with OpenAIServer() as server:
        server.reply(LOOK_UP, LOOK_UP, Reply("Hello!", usage=USAGE))
        budget = Budget(meter, SpendLimit("messages", 1))
        agent = agent_of(server, look_up, middleware=SpendLimitMiddleware(budget, message="No."))
        assert ask(agent, meter)[-1].content == "Hello!"
        assert ask(agent, meter)[-1].content == "No."


def test_calls_that_have_begun_may_go_beyond_the_limit_and_no_more_than_those(
    meter: StripeMeterCallbackHandler,
) -> None:
    """Four calls pass while nothing was used; when they have ended, none does."""
    budget = Budget(meter, SpendLimit("tokens", 15))
    gate = threading.Event()
    with OpenAIServer() as server, ThreadPoolExecutor(4) as pool:
        server.reply(*[Reply("Hello!", usage=USAGE, gate=gate)] * 4)
        model = server.chat()
        calls = [pool.submit(model.invoke, "Hi", gated(budget, meter)) for _ in range(4)]
        server.wait_for_requests(4)
        gate.set()
        for call in calls:
            call.result()
        with pytest.raises(SpendLimitError) as caught:
            model.invoke("Hi", gated(budget, meter))
        assert caught.value.used == 60
        assert len(server.requests) == 4


class Detached:
    """As an object of a database whose session is closed."""

    @property
    def customer(self) -> str:
        raise KeyError("ann@example.com")


def test_a_context_that_cannot_be_read_breaks_no_chain_unless_the_owner_says_so(
    handler: Callable[..., StripeMeterCallbackHandler],
) -> None:
    told: list[MeteringError] = []
    meter = handler(customer=from_context("customer"), on_error=told.append)
    Budget(meter, SpendLimit("tokens", 0)).check(Facts(context=Detached()))
    (error,) = told
    assert str(error).startswith("Whose limit it is could not be looked up: KeyError at ")
    assert (error.__cause__, error.__suppress_context__) == (None, True)
    with pytest.raises(LedgerError, match="could not be looked up: KeyError"):
        Budget(meter, SpendLimit("tokens", 0), on_failure="stop").check(Facts(context=Detached()))


def test_of_several_limits_that_are_used_up_the_error_tells_of_the_last_to_begin_anew(
    meter: StripeMeterCallbackHandler, clock: Clock
) -> None:
    meter.record_usage({"input_tokens": 15}, id="job", customer="cus_1")
    day, month, ever = (SpendLimit("tokens", 15, per=per) for per in ("day", "month", "ever"))
    for limits, last in (((month, day), month), ((day, ever, month), ever)):
        with pytest.raises(SpendLimitError) as raised:
            Budget(meter, *limits).check("cus_1")
        end = last.period.bounds(int(clock()))[1]
        assert raised.value.resets_at == (None if end is None else datetime.fromtimestamp(end, UTC))


def test_a_month_may_begin_on_the_day_of_the_subscription(meter: StripeMeterCallbackHandler, clock: Clock) -> None:
    (one,) = Budget(meter, SpendLimit("tokens", 15, billing_day=9)).allowances("cus_1")
    assert one.resets_at is not None
    assert one.resets_at.day == 9
    with pytest.raises(ConfigurationError, match="billing_day=9"):
        SpendLimit("tokens", 15, per="day", billing_day=9)


async def later(error: SpendLimitError) -> str:
    return str(error)


@pytest.mark.parametrize("message", [None, 5, later])
def test_a_message_that_is_none_is_refused_at_once(meter: StripeMeterCallbackHandler, message: Any) -> None:
    with pytest.raises(ConfigurationError, match="message="):
        SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 1)), message=message)


@pytest.mark.parametrize(("message", "answer"), [(lambda _: 1 / 0, "is used up"), (lambda _: 7, "7")])
def test_a_message_that_fails_breaks_no_chat(
    meter: StripeMeterCallbackHandler, message: Any, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    middleware = SpendLimitMiddleware(Budget(meter, SpendLimit("tokens", 0)), message=message)
    agent: Any = create_agent(GenericFakeChatModel(messages=iter([])), [], middleware=[middleware])
    config: Any = paid_by("cus_1", meter)
    assert answer in agent.invoke({"messages": [HumanMessage("Hi")]}, config)["messages"][-1].text
    assert ("ZeroDivisionError" in caplog.text) == (answer != "7")
