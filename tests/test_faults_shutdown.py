"""Ends of processes: SIGTERM, Ctrl-C and the interpreter's shutdown, on each Python that is supported.

The interpreter of this run is always tried. Others are tried where ``$STRIPE_METER_PYTHONS`` names them, with colons in
between: each a Python that has the package's dependencies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import deliver, settled

from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox, refuse

VERSIONS = ["3.11", "3.12", "3.13"]
ROOT = Path(__file__).parent.parent

START = """
import asyncio, atexit, os, signal, sys, threading
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens, first_of, from_lead

class Model(GenericFakeChatModel):
    async def _agenerate(self, *args, **kwargs):
        return self._generate(*args, **kwargs)  # the base class would use a thread

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore these
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def model(usage={"input_tokens": 1, "output_tokens": 0, "total_tokens": 1}):
    return Model(messages=iter([AIMessage("Hi", usage_metadata=usage)]))

def run(handler):
    model().invoke("Hi", {"callbacks": [handler]})
    os.write(1, b"recorded\\n")

def handler(customer="cus_1"):
    return StripeMeterCallbackHandler(Tokens("ai_tokens"), customer=customer, ledger=sys.argv[1], on_error=print)
"""

ENDS = {
    "runs are recorded until the main thread ends": """
handler = handler()
for _ in range(5):
    run(handler)
""",
    "a thread goes on recording while the interpreter waits for it": """
handler = handler()
run(handler)
main = threading.main_thread()
def go_on():
    main.join()
    for _ in range(5):
        run(handler)
threading.Thread(target=go_on).start()
""",
    "runs are recorded by exit functions, before and after the handler's own": """
atexit.register(lambda: run(made))
made = handler()
run(made)
atexit.register(lambda: run(made))
""",
    "a handler that was closed records and is flushed by exit functions, before and after its own": """
def late():
    run(made)
    made.flush(0.2)
atexit.register(late)
made = handler()
atexit.register(late)
run(made)
made.close()
run(made)
""",
    "a loop records by exit functions, when no thread can start any more": """
atexit.register(lambda: asyncio.run(arun()))
made = handler()
async def arun():
    await model().ainvoke("Hi", {"callbacks": [made]})
    os.write(1, b"recorded\\n")
""",
    "a loop that must look up a lead records by exit functions, when no thread can start any more": """
atexit.register(lambda: asyncio.run(arun()))
made = handler(first_of(from_lead("email"), "cus_1"))
async def arun():
    await model().ainvoke("Hi", {"callbacks": [made]})
    os.write(1, b"recorded\\n")
""",
    "a daemon thread records until it is stopped in mid-run": """
handler = handler()
run(handler)
first = threading.Event()
def go_on():
    for _ in range(100):
        run(handler)
        first.set()
    threading.Event().wait()
threading.Thread(target=go_on, daemon=True).start()
first.wait()
""",
    "sys.exit within a run": """
handler = handler()
run(handler)
sys.exit(0)
""",
}


@cache
def pythons() -> dict[str, str]:
    """The interpreters that can be tried, by version."""
    found = {}
    for python in [*os.environ.get("STRIPE_METER_PYTHONS", "").split(":"), sys.executable]:
        if python and Path(python).exists():
            ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            found[subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()] = python
    return found


class Place(NamedTuple):
    """Where one Python's process records, and to whom it would deliver."""

    python: str
    url: str
    sandbox: StripeSandbox

    def begin(self, program: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-c", START + program, self.url],
            env={**os.environ, **self.sandbox.environment(), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Place]]:
    """One for each Python; their processes run at the same time."""
    with ExitStack() as stack:
        found = []
        for version, python in pythons().items():
            sandbox = stack.enter_context(StripeSandbox())
            sandbox.create_meter("ai_tokens")
            sandbox.create_customer(id="cus_1")
            found.append(Place(python, f"sqlite:///{tmp_path}/{version}.db", sandbox))
        yield found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_supported_python_is_among_those_that_are_tried(version: str) -> None:
    if version not in pythons():
        pytest.skip(f"no Python {version} with the package's dependencies is named in $STRIPE_METER_PYTHONS")
    ask = [pythons()[version], "-c", "import langchain_core, sqlalchemy, stripe"]
    subprocess.run(ask, check=True, timeout=60)


def settle(url: str, sandbox: StripeSandbox, told: int, *, fault: str, exactly: bool = True) -> None:
    """A new process would find it all: deliver what is pending."""
    ledger = Ledger(url, clock=sandbox.now)
    stored = sum(1 for _ in views.every(ledger))
    assert stored == told if exactly else stored >= told
    deliver(ledger, sandbox)
    settled(ledger, sandbox, fault=fault, varies=True)  # not every machine has every Python
    assert sandbox.billed("ai_tokens", "cus_1") == stored
    ledger.close()


@pytest.mark.parametrize(
    ("end", "reachable"), [*((end, True) for end in ENDS), *((end, False) for end in list(ENDS)[:2])]
)
def test_what_is_recorded_while_the_interpreter_shuts_down_is_durable_and_nothing_is_printed(
    places: list[Place], end: str, reachable: bool
) -> None:
    if not reachable:
        for place in places:
            place.sandbox.fail(refuse(503), path=None, times=None)
    children = [place.begin(ENDS[end]) for place in places]
    for place, child in zip(places, children, strict=True):
        told, errors = child.communicate(timeout=60)
        said = [line for line in errors.splitlines() if "what is pending waits, nothing is lost" not in line]
        assert (child.returncode, said) == (0, [])  # Stripe is away: a slow machine may have said so
        place.sandbox.clear_faults()
        assert set(told.splitlines()) == {"recorded"}
        count, exactly = told.count("recorded"), "daemon" not in end
        settle(place.url, place.sandbox, count, fault="the interpreter shuts down while runs end", exactly=exactly)


WORKER = """
handler = handler()
for _ in range(5):
    run(handler)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_process_that_is_told_to_end_with_work_pending_loses_nothing_and_the_next_one_delivers(
    places: list[Place], number: signal.Signals
) -> None:
    """By default Python does not run exit functions on SIGTERM: nothing depends on them."""
    for place in places:
        place.sandbox.fail(refuse(503), path=None, times=None)
    children = [place.begin(WORKER) for place in places]
    for place, child in zip(places, children, strict=True):
        assert child.stdout is not None
        for _ in range(5):
            assert child.stdout.readline() == "recorded\n"
        child.send_signal(number)
        child.communicate(timeout=60)
        assert child.returncode in (-number, 1)  # KeyboardInterrupt is an error like any other
        place.sandbox.clear_faults()
        settle(place.url, place.sandbox, 5, fault=f"{number.name} with work pending")
