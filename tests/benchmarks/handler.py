"""What a handler adds to one run, side by side: ours, LangChain's own, a minimal lock-and-insert one, a naive one.

Run: python tests/benchmarks/handler.py [--rounds 15]. Prints microseconds and ratios; figures drift with the machine,
the ratios are what counts. Nothing is sent to Stripe except by the naive handler, which posts to the local sandbox.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens
from langchain_stripe_meter.sandbox import StripeSandbox

USAGE = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
MESSAGE = AIMessage("Hello there!", usage_metadata=USAGE, response_metadata={"model_name": "m"})
CHUNKS = [AIMessageChunk("word ") for _ in range(19)] + [
    AIMessageChunk("end", usage_metadata=USAGE, response_metadata={"model_name": "m"})
]


class Model(BaseChatModel):
    """Answers at once, so that what is left is the cost of the callbacks."""

    @property
    def _llm_type(self) -> str:
        return "benchmark"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=MESSAGE.model_copy())])

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return self._generate(messages)

    async def _astream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in CHUNKS:
            generation = ChatGenerationChunk(message=chunk.model_copy())
            if run_manager:
                await run_manager.on_llm_new_token(str(chunk.content), chunk=generation)
            yield generation


class Minimal(BaseCallbackHandler):
    """The least that is durable: take a lock, insert a row, commit."""

    run_inline = True

    def __init__(self, path: Path, synchronous: str) -> None:
        self.lock = threading.Lock()
        self.connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute(f"PRAGMA synchronous={synchronous}")
        self.connection.execute("CREATE TABLE usage (run TEXT PRIMARY KEY, tokens INTEGER, customer TEXT)")
        self.customers: dict[Any, str] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.customers[run_id] = (kwargs.get("metadata") or {}).get("stripe_customer_id", "")

    def on_llm_end(self, response: Any, *, run_id: Any, **kwargs: Any) -> None:
        tokens = response.generations[0][0].message.usage_metadata["total_tokens"]
        with self.lock:
            row = (run_id.hex, tokens, self.customers.pop(run_id))
            self.connection.execute("INSERT INTO usage VALUES (?, ?, ?)", row)


class Naive(BaseCallbackHandler):
    """What one writes first: call Stripe in the callback."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.customers: dict[Any, str] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.customers[run_id] = kwargs["metadata"]["stripe_customer_id"]

    def on_llm_end(self, response: Any, *, run_id: Any, **kwargs: Any) -> None:
        tokens = response.generations[0][0].message.usage_metadata["total_tokens"]
        self.client.v1.billing.meter_events.create(
            {
                "event_name": "ai_tokens",
                "payload": {"stripe_customer_id": self.customers.pop(run_id), "value": str(tokens)},
            }
        )


Handlers = dict[str, BaseCallbackHandler | None]
_numbers: Iterator[int] = iter(range(10**9))


def config(handler: BaseCallbackHandler | None) -> dict[str, Any]:
    """A run of a customer of its own: Stripe takes one call at a time per customer and meter."""
    metadata = {"stripe_customer_id": f"cus_{next(_numbers) % 100}"}
    return {"callbacks": [handler] if handler else [], "metadata": metadata}


def sync_invoke(model: Model, handler: BaseCallbackHandler | None, runs: int) -> None:
    for _ in range(runs):
        model.invoke("Hello", config(handler))


def many_ainvoke(model: Model, handler: BaseCallbackHandler | None, runs: int) -> None:
    async def hundred() -> None:
        for _ in range(runs // 100):
            await asyncio.gather(*(model.ainvoke("Hello", config(handler)) for _ in range(100)))

    asyncio.run(hundred())


def astream(model: Model, handler: BaseCallbackHandler | None, runs: int) -> None:
    async def streams() -> None:
        for _ in range(runs):
            async for _ in model.astream("Hello", config(handler)):
                pass

    asyncio.run(streams())


def long_prompt(model: Model, handler: BaseCallbackHandler | None, runs: int) -> None:
    prompt = "word " * 100_000
    for _ in range(runs):
        model.invoke(prompt, config(handler))


def added(work: Callable[..., None], handlers: Handlers, runs: int, rounds: int) -> dict[str, float]:
    """Median microseconds that each handler adds to one run, variants interleaved in every round."""
    model = Model()
    samples: dict[str, list[float]] = {name: [] for name in handlers}
    for _ in range(rounds + 1):
        for name, handler in handlers.items():
            gc.collect()
            start = time.perf_counter()
            work(model, handler, runs)
            samples[name].append((time.perf_counter() - start) / runs * 1e6)
    medians = {name: statistics.median(times[1:]) for name, times in samples.items()}
    print(f"{work.__name__}: base {medians['base']:.0f} us")
    result = {name: medians[name] - medians["base"] for name in handlers if name != "base"}
    for name, cost in result.items():
        print(f"    {name:<24} +{cost:9.0f} us")
    return result


def imports(rounds: int) -> float:
    """Median time of importing the package over that of what it stands on."""
    ours, theirs = "import langchain_stripe_meter", "import langchain_core.callbacks, sqlite3"
    code = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for line, seconds in times.items():
            command = [sys.executable, "-c", code.format(line)]
            seconds.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {line: statistics.median(seconds) for line, seconds in times.items()}
    print(
        f"imports: ours {medians[ours] * 1e3:.1f} ms, langchain_core.callbacks + sqlite3 {medians[theirs] * 1e3:.1f} ms"
    )
    return medians[ours] / medians[theirs]


def memory(folder: Path, runs: int = 100_000) -> None:
    """Python memory after a thousand runs and after ``runs`` of them."""
    handler = StripeMeterCallbackHandler(
        Tokens("ai_tokens"), deliver=False, ledger=f"sqlite:///{folder}/memory.db", synchronous="NORMAL"
    )
    model = Model()
    sync_invoke(model, handler, 1_000)
    gc.collect()
    tracemalloc.start()
    sync_invoke(model, handler, 1_000)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for done in range(0, runs, 10_000):
        sync_invoke(model, handler, 10_000)
        print(f"\rmemory: {done + 10_000:,} of {runs:,} runs", end="", flush=True)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    handler.close()
    print(f"\rmemory: {grown / 1024:+.0f} KiB after {runs:,} further runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-memory", action="store_true", help="leave out the 100,000 runs")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name, StripeSandbox() as sandbox:
        folder = Path(name)
        measure(folder, sandbox, options.rounds)
        if not options.no_memory:
            memory(folder)


def measure(folder: Path, sandbox: StripeSandbox, rounds: int) -> None:
    import stripe

    stripe.enable_telemetry = False
    sandbox.create_meter("ai_tokens")
    for number in range(100):
        sandbox.create_customer(id=f"cus_{number}")
    client = stripe.StripeClient(sandbox.api_key, base_addresses={"api": sandbox.url}, max_network_retries=0)

    def ours(label: str, synchronous: Any) -> StripeMeterCallbackHandler:
        ledger = f"sqlite:///{folder}/{label}.db"
        return StripeMeterCallbackHandler(Tokens("ai_tokens"), deliver=False, ledger=ledger, synchronous=synchronous)

    handlers: Handlers = {
        "base": None,
        "LangChain's usage": UsageMetadataCallbackHandler(),
        "minimal FULL": Minimal(folder / "minimal_full.db", "FULL"),
        "minimal NORMAL": Minimal(folder / "minimal_normal.db", "NORMAL"),
        "ours FULL": ours("full", "FULL"),
        "ours NORMAL": ours("normal", "NORMAL"),
    }
    naive: Handlers = {**handlers, "naive Stripe call": Naive(client)}
    invoke = added(sync_invoke, naive, 200, rounds)
    gathered = added(many_ainvoke, handlers, 300, rounds)
    streamed = added(astream, handlers, 50, rounds)
    long = added(long_prompt, {name: handlers[name] for name in ("base", "ours FULL", "minimal FULL")}, 100, rounds)
    rows = [
        ("T1 sync FULL over minimal", invoke["ours FULL"] / invoke["minimal FULL"], 1.25),
        ("T1 sync NORMAL over minimal", invoke["ours NORMAL"] / invoke["minimal NORMAL"], 1.5),
        ("T2 100 ainvoke over LangChain's", gathered["ours FULL"] / gathered["LangChain's usage"], 0.5),
        ("T3 astream over LangChain's", streamed["ours FULL"] / streamed["LangChain's usage"], 0.25),
        ("T5 sync FULL over naive, 0 ms", invoke["ours FULL"] / invoke["naive Stripe call"], 0.35),
        ("T10 100k-token prompt over a short one", long["ours FULL"] / invoke["ours FULL"], 1.5),
        ("T11 import", imports(max(rounds, 5)), 1.2),
    ]
    for label, ratio, target in rows:
        print(f"{label:<42} {ratio:6.2f}   target <= {target}")


if __name__ == "__main__":
    main()
