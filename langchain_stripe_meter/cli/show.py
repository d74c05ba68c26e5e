"""How the commands answer: tables for people, ``--json`` for programs, one sentence for what went wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from langchain_stripe_meter.errors import MeteringError

LedgerOption = Annotated[
    str | None, typer.Option("--ledger", envvar="STRIPE_METER_LEDGER", help="The ledger's database address.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

console = Console()


@contextmanager
def clear_errors() -> Iterator[None]:
    """A ``MeteringError`` becomes one sentence and exit code 2."""
    try:
        yield
    except MeteringError as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong on standard error, and leave."""
    Console(stderr=True).print(f"[red]stripe-meter:[/] {message}", highlight=False)
    raise typer.Exit(code)


def rows(items: Sequence[Any], *, as_json: bool, empty: str, hide: tuple[str, ...] = ()) -> None:
    """Records of one dataclass, as a table or as a JSON array."""
    if as_json:
        print_json([_plain(item) for item in items])
        return
    if not items:
        console.print(empty)
        return
    names = [field.name for field in dataclasses.fields(items[0]) if field.name not in hide]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name.replace("_", " "))
    for item in items:
        table.add_row(*(cell(name, getattr(item, name)) for name in names))
    console.print(table)


def record(item: Any, *, as_json: bool) -> None:
    """One record, a line for each of its fields."""
    if as_json:
        print_json(_plain(item))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in dataclasses.asdict(item).items():
        table.add_row(f"[dim]{name.replace('_', ' ')}[/]", cell(name, value))
    console.print(table)


def cell(name: str, value: object) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if name == "at" and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple):
        return " ".join(str(one) for one in value)
    return str(value)


def print_json(value: Any) -> None:
    """JSON on standard output; amounts as text, so that no reader rounds them."""
    sys.stdout.write(json.dumps(value, default=str, indent=2) + "\n")


def _plain(item: Any) -> Any:
    return dataclasses.asdict(item)
