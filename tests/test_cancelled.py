"""A cancelled call, of which LangChain tells no end: what its provider reported and what had come of it is billed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import RunnableLambda

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.ledger.views import Row, tail

BEGIN = AIMessageChunk("", usage_metadata={"input_tokens": 4321, "output_tokens": 1, "total_tokens": 4322})
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
