"""``stripe-meter init``: what is counted, on which meter, and who pays, asked or given, becomes a file of settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_stripe_meter.cli.shared import JsonOption, clear_errors, open_gateway, say
from langchain_stripe_meter.errors import ConfigurationError

if TYPE_CHECKING:
    from langchain_stripe_meter.gateway.client import Gateway

Count = StrEnum("Count", ["tokens", "messages", "credits", "cost"])
Pays = StrEnum("Pays", ["lead", "static", "metadata", "auth_user"])
By = StrEnum("By", ["email", "name", "phone", "id"])
_IDENTIFIED = {Pays.lead: (By.email, By.name, By.phone), Pays.static: (By.email, By.name, By.phone, By.id)}
"""By what each kind of payer may be identified; the others are known by their ``cus_…`` id."""
_METADATA = {Pays.lead: ', "metadata": {"lead": {"%s": …}}', Pays.metadata: ', "metadata": {"stripe_customer_id": …}'}


def init(
    file: Annotated[Path, typer.Argument(help="The file of settings to write.")] = Path("stripe_meter.toml"),
    *,
    meter: Annotated[str | None, typer.Option(help="The event name of one of your meters.")] = None,
    count: Annotated[Count | None, typer.Option(help="What is counted.")] = None,
    pays: Annotated[
        Pays | None, typer.Option(help="Who pays: the lead of a chat, one fixed customer, or whom a run names.")
    ] = None,
    by: Annotated[By | None, typer.Option(help="What identifies a lead or the fixed customer.")] = None,
    customer: Annotated[str | None, typer.Option(help="The fixed customer: 'cus_…', an e-mail, …")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose a meter, what is counted and who pays; ask for what is not given. The key stays in the environment."""
    with clear_errors(as_json=as_json):
        from langchain_stripe_meter.settings import kind_of

        write = _toml if kind_of(file) == "TOML" else _json
        if file.exists() and not force:
            raise ConfigurationError(f"{file} is there already. Give another name, or --force to write over it.")
        with open_gateway() as gateway:
            names = _usable(gateway, meter)
        ask = _Questions(may_ask=not as_json)
        event_name = meter or ask("--meter", "Which meter", names)
        kind = count or Count(ask("--count", "What is counted", list(Count)))
        who = pays or Pays(ask("--pays", "Who pays", list(Pays)))
        payer = _customer(ask, who, by, customer)
        data: dict[str, Any] = {"meters": [_meter(event_name, kind)], "customer": payer}
        _check(data)
        try:
            file.write_text(write(data), encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be written: {error.strerror}. Give another path.") from None
    python = _python(file, who, payer.get("by", ""))
    say(f"{file} is written. In Python:\n\n{python}", {"file": str(file), "python": python, **data}, as_json=as_json)


class _Questions:
    """Asks until the answer is one of the choices; the first is recommended. Where nobody answers, it names the option
    that was missing."""

    def __init__(self, *, may_ask: bool) -> None:
        self._may_ask = may_ask

    def __call__(self, option: str, question: str, choices: Sequence[str] = ()) -> str:
        if not self._may_ask:
            raise ConfigurationError(f"{option} is missing; with --json nothing is asked.")
        told = f"{question} ({', '.join(choices)})" if choices else question
        while True:
            try:  # a member of an enumeration would be shown with all the others
                answer = str(typer.prompt(told, default=str(choices[0]) if choices else None)).strip()
            except typer.Abort:
                if sys.stdin.isatty():
                    raise
                typer.echo()  # the question's own line ends
                raise ConfigurationError(f"{option} is missing, and there is no terminal to ask for it on.") from None
            if not choices or answer in choices:
                return answer
            typer.echo(f"{answer!r} is none of them.")


def _usable(gateway: Gateway, wanted: str | None) -> list[str]:
    """The event names of the account's meters that add up rightly; ``wanted`` must be one."""
    from langchain_stripe_meter.gateway.meters import problem_with

    known = {meter.event_name: meter for meter in gateway.meters()}
    if wanted is not None and (problem := problem_with(wanted, known.get(wanted))) is not None:
        raise ConfigurationError(f"{problem}.")
    usable = sorted(name for name, meter in known.items() if meter.problem is None)
    if not usable:
        raise ConfigurationError("There is no meter that can be used. Run: stripe-meter meters create ai_tokens")
    return usable


def _meter(event_name: str, kind: Count) -> dict[str, Any]:
    worth = {"default": 1} if kind is Count.credits else {}
    return {"kind": kind.value, "event_name": event_name, **worth}


def _customer(ask: _Questions, who: Pays, by: By | None, customer: str | None) -> dict[str, str]:
    allowed = _IDENTIFIED.get(who, ())
    if by is not None and by not in allowed:
        raise ConfigurationError(f"--by {by} does not go with --pays {who}.")
    if customer is not None and who is not Pays.static:
        raise ConfigurationError(f"--customer goes with --pays static, not with --pays {who}.")
    if not allowed:
        return {"source": who.value}
    if by is None and (customer or "").startswith("cus_"):
        by = By.id
    field = by or ask("--by", "Identified by", allowed)
    if who is Pays.lead:
        return {"source": who.value, "by": str(field)}
    return {"source": who.value, str(field): customer or ask("--customer", f"The customer's {field}")}


def _check(data: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from langchain_stripe_meter.settings import MeteringSettings, in_one_line

    try:
        MeteringSettings.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError(f"{in_one_line(error)}.") from None


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _toml(data: dict[str, Any]) -> str:
    """The settings as TOML, of whose strings JSON's are some."""
    tables = {"[[meters]]": data["meters"][0], "[customer]": data["customer"]}
    lines = [
        "\n".join([head, *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in table.items())])
        for head, table in tables.items()
    ]
    return "\n\n".join(lines) + "\n"


def _python(file: Path, who: Pays, by: str) -> str:
    metadata = _METADATA.get(who, "").replace("%s", by)
    return "\n".join(
        [
            "from langchain_stripe_meter import MeteringSettings",
            f"meter = MeteringSettings.from_file({str(file)!r}).handler()",
            f'chain.invoke(question, config={{"callbacks": [meter]{metadata}}})',
        ]
    )
