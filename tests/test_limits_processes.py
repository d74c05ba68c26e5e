"""Several real processes share one limit: together they never go beyond it by more than was in flight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from langchain_stripe_meter.core.periods import Period
from langchain_stripe_meter.core.references import Reference
from langchain_stripe_meter.ledger.counters import Counters
from langchain_stripe_meter.ledger.store import Ledger

THREADS = 8
PROCESSES = 2
TOKENS = 15
LIMIT = 600

WORKER = """
import sys, threading
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, from_metadata
from langchain_stripe_meter.agents.budget import Budget, SpendLimit, SpendLimitCallback
from langchain_stripe_meter.errors import SpendLimitError

url, threads, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
meter = StripeMeterCallbackHandler(
    Tokens("tokens"), customer=from_metadata("stripe_customer_id"), ledger=url, deliver=False
)
budget = Budget(meter, SpendLimit("tokens", limit, per="ever"), on_failure="stop")
budget.refresh()
config = {"metadata": {"stripe_customer_id": "cus_1"}, "callbacks": [meter, SpendLimitCallback(budget)]}
passed = [0] * threads

def work(number):
    while True:
        model = GenericFakeChatModel(messages=iter([AIMessage("Hi", usage_metadata=usage)]))
        try:
            model.invoke("Hello", config)
        except SpendLimitError:
            return
        passed[number] += 1

print("ready", flush=True)
sys.stdin.readline()
workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(sum(passed), meter.status().unrecorded, flush=True)
meter.close()
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db?timeout=60"  # a busy machine may let one wait longer than the usual 5 s


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    workers = []

    def start(url: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, url, str(THREADS), str(LIMIT)]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.communicate()


def test_processes_that_share_a_limit_go_beyond_it_by_no_more_than_what_was_in_flight(
    start: Callable[[str], subprocess.Popen[str]], url: str
) -> None:
    ledger, ever = Ledger(url), Period("ever")
    workers = [start(url) for _ in range(PROCESSES)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    passed, unrecorded = zip(*(map(int, worker.communicate(timeout=100)[0].split()) for worker in workers), strict=True)
    assert [worker.returncode for worker in workers] == [0] * PROCESSES
    assert unrecorded == (0,) * PROCESSES

    (used,) = Counters(ledger, [ever]).used(Reference("id", "cus_1"), [("tokens", ever)])
    ledger.close()
    assert used == sum(passed) * TOKENS
    in_flight = THREADS * PROCESSES - 1  # besides the call that was let through last
    assert LIMIT <= used <= LIMIT + in_flight * TOKENS
