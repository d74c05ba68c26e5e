"""``stripe-meter demo``: a real agent and a real chain, a local Stripe, every promise tried before your eyes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import PrivateAttr
from rich.console import Console
from rich.padding import Padding

from langchain_stripe_meter import Credits, StripeMeterCallbackHandler, Tokens, from_lead, from_metadata
from langchain_stripe_meter.cli.stage import Played, Stage, open_stage, table
from langchain_stripe_meter.core.values import counted
from langchain_stripe_meter.sandbox import drop_answer

EVENTS = "/v1/billing/meter_events"


def run(*, live: bool, quiet: bool = False) -> Played:
    """Play the demo: six scenes, then what was recorded against what Stripe bills."""
    console = Console(quiet=quiet, highlight=False)
    start = time.monotonic()
    with open_stage(console, live=live) as stage:
        _welcome(stage)
        for scene in (static_customer, by_metadata, by_lead, message_credits, outage, sent_again):
            scene(stage)
            stage.show_recorded()
        stage.title("What was recorded, and what Stripe bills")
        played = Played(stage.compare(), stage.delivered, time.monotonic() - start)
        console.print(Padding(table(played.compared), (0, 0, 0, 3), expand=False))
        _farewell(stage, played)
    return played


def _welcome(stage: Stage) -> None:
    if stage.sandbox is not None:
        where = "a local Stripe"
    else:
        where = f"{os.environ.get('STRIPE_METER_API_BASE') or 'Stripe itself'}, in test mode"
    stage.console.print("[bold]stripe-meter demo[/]")
    stage.console.print(f"A LangChain chain and a LangGraph agent, billed through {where}.")


def _farewell(stage: Stage, played: Played) -> None:
    say = stage.console.print
    verdict = "[bold green]Recorded and billed agree" if played.agrees else "[bold red]Recorded and billed differ"
    say(f"\n{verdict}[/], after {played.delivered} events and {played.seconds:.1f} s.")
    if stage.sandbox is None:
        say(f"Left in your test account: {stage.tokens}, {stage.credits}, {len(stage.customers)} customers.")
    say("Next: attach a handler to your own chain (README.md, 'Use it').")
    say("A Stripe to try it on: [bold]stripe-meter sandbox[/]")


def chain(model: str, *script: Any) -> Any:
    """A prompt and a model: the plainest chain there is."""
    from langchain_core.prompts import ChatPromptTemplate

    return ChatPromptTemplate.from_template("{question}") | ScriptedModel(model=model, script=list(script))


def agent(model: str) -> Any:
    """An agent that looks an order up with a tool: two model calls for one answer."""
    from langchain.agents import create_agent
    from langchain_core.tools import tool

    @tool
    def order_status(number: int) -> str:
        """Where an order is."""
        return f"Order {number} is on its way."

    script = [
        says("", 210, 18, call={"name": "order_status", "args": {"number": 7}}),
        says("Your order is on its way.", 260, 12),
    ]
    return create_agent(ScriptedModel(model=model, script=script), [order_status])


def ask(runnable: Any, handler: StripeMeterCallbackHandler, **metadata: Any) -> None:
    """One message to a chain."""
    runnable.invoke({"question": "Where is my order?"}, {"callbacks": [handler], "metadata": metadata})


def static_customer(stage: Stage) -> None:
    """One fixed customer."""
    stage.title("A static customer pays for everything")
    with stage.handler(Tokens(stage.tokens), stage.customers["acme"]) as meter:
        ask(chain("gpt-4o-mini", says("On its way.", 120, 30)), meter)
        stage.say(f"A chain ran once for Acme. Rows on disk when the run returned: {len(stage.new_rows())}.")


def by_metadata(stage: Stage) -> None:
    """Customers by id, plain, streamed and async; and nobody."""
    stage.title("The customer is in each run's metadata")
    bot = chain("gpt-4o-mini", says("It left our house this morning.", 100, 20))
    with stage.handler(Tokens(stage.tokens), from_metadata("stripe_customer_id")) as meter:
        ask(bot, meter, stripe_customer_id=stage.customers["ann"])
        config = {"callbacks": [meter], "metadata": {"stripe_customer_id": stage.customers["bob"]}}
        for _ in bot.stream({"question": "And mine?"}, config):
            pass
        asyncio.run(bot.ainvoke({"question": "And now?"}, config))
        ask(bot, meter)
    stage.say("Ann asked once; Bob twice, streamed and async. One run named nobody.")


def by_lead(stage: Stage) -> None:
    """The lead of a conversation, from the message on with which it is known."""
    stage.title("A lead gives an e-mail in the third message")
    bot = chain("gpt-4o-mini", says("Gladly!", 80, 10))
    with stage.handler(Tokens(stage.tokens), from_lead(by="email")) as meter:
        ask(bot, meter, session_id="chat-1")
        ask(bot, meter, session_id="chat-1")
        meter.leads.capture("chat-1", email=stage.emails["lead"])
        ask(bot, meter, session_id="chat-1")
        skipped = meter.flush(30).skipped
    stage.say(f"The {skipped} before it are skipped; the third bills that e-mail's customer.")


def message_credits(stage: Stage) -> None:
    """An agent and a chain, each by the model that answered."""
    stage.title("Message credits: 10 for gpt-4o, 1 for gpt-4o-mini")
    meter = Credits(stage.credits, {"gpt-4o": 10, "gpt-4o-mini": 1})
    with stage.handler(meter, stage.customers["ann"]) as handler:
        question = {"messages": [{"role": "user", "content": "Where is order 7?"}]}
        agent("gpt-4o").invoke(question, {"callbacks": [handler]})
        ask(chain("gpt-4o-mini", says("You're welcome.", 60, 8)), handler)
    stage.say("An agent with a tool called gpt-4o twice for one message: 10.")
    stage.say("A chain answered another with gpt-4o-mini: 1.")


def outage(stage: Stage) -> None:
    """Stripe refuses everything for a while."""
    stage.title("Stripe is down, and nothing is lost")
    if stage.sandbox is None:
        stage.say("[dim]Left out: the real Stripe does not go down when asked.[/]")
        return
    bot = chain("gpt-4o-mini", says("Still here.", 40, 10))
    with stage.handler(Tokens(stage.tokens), stage.customers["bob"]) as meter:
        with stage.sandbox.outage():
            for _ in range(3):
                ask(bot, meter)
            down = meter.flush(0.5)
        refused = counted(sum(request.status == 503 for request in stage.sandbox.requests), "request")
        stage.say(f"Stripe refused {refused}. Three chats went on: {counted(down.pending, 'event')} pending.")
        back = meter.flush(30)
        stage.say(f"Stripe is back: {back.delivered} delivered, {back.pending} pending.")


def sent_again(stage: Stage) -> None:
    """The same run recorded twice, and the same event sent twice."""
    stage.title("The same events again, and nothing billed twice")
    if stage.sandbox is None:
        stage.say("[dim]The lost answer is left out: it needs the local Stripe.[/]")
    else:
        stage.sandbox.fail(drop_answer(), path=EVENTS)
    bot = chain("gpt-4o-mini", says("Once is enough.", 30, 5))
    acme = stage.customers["acme"]
    with stage.handler(Tokens(stage.tokens), acme) as one, stage.handler(Tokens(stage.tokens), acme) as two:
        bot.invoke({"question": "Twice?"}, {"callbacks": [one, two]})
        one.flush(30)
    recorded = stage.new_rows()
    stage.say(f"Two handlers recorded the same run; rows in the ledger: {len(recorded)}.")
    if stage.sandbox is not None:
        same = recorded[0].identifier
        sent = sum(_identifier(request) == same for request in stage.sandbox.requests)
        taken = sum(event.identifier == same for event in stage.sandbox.events)
        stage.say(f"Stripe's answer was lost. Sent under one identifier: {counted(sent, 'time')}; billed: {taken}.")


def _identifier(request: Any) -> object:
    return request.params.get("identifier") if request.path == EVENTS else None


class ScriptedModel(BaseChatModel):
    """Says ``script`` in turn, and its last line for ever."""

    model: str = "gpt-4o-mini"
    script: list[AIMessage]
    _said: int = PrivateAttr(default=0)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(ls_provider="openai", ls_model_name=self.model, ls_model_type="chat")

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        """Tools are in the script already."""
        return self

    def _next(self) -> AIMessage:
        message = self.script[min(self._said, len(self.script) - 1)]
        self._said += 1
        return message.model_copy(update={"response_metadata": {"model_name": self.model}})

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next())])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        message = self._next()
        for word in str(message.content).split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f"{word} "))
        last = AIMessageChunk(
            content="",
            usage_metadata=message.usage_metadata,
            response_metadata=message.response_metadata,
            tool_calls=message.tool_calls,
        )
        yield ChatGenerationChunk(message=last)


def says(text: str, tokens_in: int, tokens_out: int, *, call: dict[str, Any] | None = None) -> AIMessage:
    """One line of a script; ``call`` is a tool call."""
    return AIMessage(
        text,
        usage_metadata={"input_tokens": tokens_in, "output_tokens": tokens_out, "total_tokens": tokens_in + tokens_out},
        tool_calls=[{**call, "id": "call_1", "type": "tool_call"}] if call else [],
    )
