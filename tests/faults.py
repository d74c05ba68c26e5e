"""What was tried to break it, and what that cost: each test of a fault adds to one table.

pytest prints the table when it ends, and the README shows it. After a change that is meant, write it anew:
python tests/faults.py
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from conftest import assert_invariant, is_pending

from langchain_stripe_meter.core.states import EventState, ReadingState
from langchain_stripe_meter.delivery.courier import Courier
from langchain_stripe_meter.gateway.client import Gateway
from langchain_stripe_meter.ledger import views
from langchain_stripe_meter.ledger.store import Ledger
from langchain_stripe_meter.sandbox import StripeSandbox

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
START, END = "<!-- faults: written by python tests/faults.py -->\n", "\n<!-- end of faults -->"
HEAD = "| fault | times tried | lost | billed twice | needed a person |\n|---|---|---|---|---|"
FOR_A_PERSON = (ReadingState.HELD, EventState.REJECTED, EventState.DOUBTFUL)
PERHAPS_BILLED = (EventState.PENDING, EventState.SENDING, EventState.DOUBTFUL)


@dataclass
class Row:
    """One fault: how often it was tried, and the amounts that it cost. ``varies``: not every machine tries it as
    often, so that the README only says roughly how often."""

    fault: str
    tried: int = 0
    lost: Decimal = Decimal(0)
    billed_twice: Decimal = Decimal(0)
    needed_a_person: Decimal = Decimal(0)
    varies: bool = False

    def line(self) -> str:
        """The row as the README has it."""
        tried = f"≈ {roughly(self.tried)}" if self.varies else str(self.tried)
        person = self.needed_a_person
        return f"| {self.fault} | {tried} | {self.lost} | {self.billed_twice} | {person} |"


def roughly(count: int) -> int:
    """``count`` rounded down to its first digit, which the next version of a library will hardly change."""
    scale = int(10 ** (len(str(count)) - 1))
    return count // scale * scale


rows: dict[str, Row] = {}
"""What this session has tried so far, in this process."""
ran: set[Path] = set()
"""The files of this session's tests."""
not_passed: set[Path] = set()
"""Those of which a test was skipped or failed."""


def told() -> list[dict[str, Any]]:
    """``rows`` for another process."""
    return [
        {name: value if name == "varies" else str(value) for name, value in asdict(row).items()}
        for row in rows.values()
    ]


def take_in(others: Iterable[dict[str, Any]]) -> None:
    """Add the rows that another process ``told``."""
    for row in others:
        amounts = {name: Decimal(row[name]) for name in ("lost", "billed_twice", "needed_a_person")}
        tally(row["fault"], tried=int(row["tried"]), varies=row["varies"], **amounts)


def tally(
    fault: str,
    *,
    tried: int = 1,
    lost: Decimal | int = 0,
    billed_twice: Decimal | int = 0,
    needed_a_person: Decimal | int = 0,
    varies: bool = False,
) -> None:
    """Add to the table's row of ``fault``, which is a few words that a user understands.

    ``varies``: how often it was tried depends on the machine, or on the versions of the libraries.
    """
    assert "|" not in fault
    row = rows.setdefault(fault, Row(fault))
    row.tried += tried
    row.lost += lost
    row.billed_twice += billed_twice
    row.needed_a_person += needed_a_person
    row.varies |= varies


def settled(
    ledger: Ledger,
    sandbox: StripeSandbox,
    *,
    fault: str,
    tried: int = 1,
    acknowledged: Iterable[str] = (),
    varies: bool = False,
) -> None:
    """Nothing is on its way any more: hold the ledger against Stripe, tally what the fault cost, and fail if it cost
    anything.

    ``acknowledged`` are the keys of readings whose recording returned. Lost is what was acknowledged and is not in the
    ledger (1 each), or what the ledger calls delivered and Stripe does not bill; billed twice is what Stripe bills
    beyond what it may have, or under one identifier again.
    """
    totals = views.totals(ledger)
    lost = Decimal(len(set(acknowledged) - {row.identifier for row in views.every(ledger)}))
    twice, person = _billed_again(sandbox), Decimal(0)
    for (event_name, customer), amounts in totals.items():
        billed = sandbox.billed(event_name, customer) if customer != "?" else Decimal(0)
        delivered = amounts.get(EventState.DELIVERED, Decimal(0))
        lost += max(delivered - billed, Decimal(0))
        possible = delivered + sum(amounts.get(state, Decimal(0)) for state in PERHAPS_BILLED)
        twice += max(billed - possible, Decimal(0))
        person += sum(amounts.get(state, Decimal(0)) for state in FOR_A_PERSON)
    twice += _billed_unrecorded(sandbox, totals)
    tally(fault, tried=tried, lost=lost, billed_twice=twice, needed_a_person=person, varies=varies)
    assert (lost, twice) == (0, 0)
    assert_invariant(ledger, sandbox, settled=True)


def deliver(ledger: Ledger, sandbox: StripeSandbox, *, url: str | None = None, concurrency: int = 4) -> None:
    """Deliver all that is pending, moving the sandbox's clock on while a courier waits; the invariant holds at every
    turn. The ledger goes by that clock."""
    courier = Courier(ledger, Gateway(sandbox.api_key, api_base=url or sandbox.url), concurrency=concurrency)
    while is_pending(ledger):
        if not courier.turn() and not courier.in_flight:
            sandbox.advance(seconds=5)
        assert_invariant(ledger, sandbox)
    courier.close(5)
    courier.gateway.close()


def _billed_again(sandbox: StripeSandbox) -> Decimal:
    """What Stripe bills under an identifier beyond its first event."""
    seen: Counter[str] = Counter()
    again = Decimal(0)
    for event in sandbox.events:
        if event.billed:
            again += event.value if seen[event.identifier] else 0
            seen[event.identifier] += 1
    return again


def _billed_unrecorded(sandbox: StripeSandbox, totals: Iterable[tuple[str, str]]) -> Decimal:
    """What Stripe bills to customers of whom the ledger knows nothing."""
    known = set(totals)
    payers = {event.event_name: sandbox.billed(event.event_name) for event in sandbox.events}
    amounts = [amount for name, bills in payers.items() for who, amount in bills.items() if (name, who) not in known]
    return sum(amounts, Decimal(0))


def table() -> str:
    """What this session has tried, as the README shows it."""
    return "\n".join([HEAD, *(rows[fault].line() for fault in sorted(rows))])


def readme_lines() -> dict[str, str]:
    """The README's table: its lines by fault."""
    text = README.read_text()
    lines = text[text.index(START) + len(START) : text.index(END)].splitlines()
    assert "\n".join(lines[:2]) == HEAD
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


def files() -> set[Path]:
    """The test files that tally."""
    mine = TESTS / "test_faults_table.py"
    return {path for path in TESTS.glob("test_*.py") if path != mine and "from faults import" in path.read_text()}


def was_whole() -> bool:
    """Whether every file that tallies was run, and passed."""
    return files() <= ran - not_passed


def differences(tried: dict[str, Row], lines: dict[str, str], *, whole: bool) -> list[str]:
    """How the README's table (its ``lines``) is not what was ``tried``; less is asked where the run was not whole."""
    wrong = [f"{fault!r} is not in the table" for fault in tried.keys() - lines.keys()]
    if whole:
        wrong += [f"{fault!r} was not tried" for fault in lines.keys() - tried.keys()]
    for fault in tried.keys() & lines.keys():
        row, told = tried[fault], _tried_in(lines[fault])
        if not row.varies and (row.tried > told or (whole and row.line() != lines[fault])):
            wrong.append(f"{row.line()!r} is {lines[fault]!r} in the table")
        if row.varies and whole and 2 * row.tried < told:
            wrong.append(f"{fault!r} was tried {row.tried} times only")
    return sorted(wrong)


def _tried_in(line: str) -> int:
    return int(line.split(" | ")[1].removeprefix("≈ "))


def write(text: str) -> None:
    """Put the table into the README."""
    whole = README.read_text()
    start, end = whole.index(START) + len(START), whole.index(END)
    README.write_text(whole[:start] + text + whole[end:])


if __name__ == "__main__":
    arguments = ["-q", "-p", "no:cacheprovider", "--write-faults", *map(str, sorted(files()))]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=TESTS.parent, check=False).returncode)
