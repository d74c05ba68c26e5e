"""Stripe's search query language, as far as customers have it.

    name:"jane doe"                     all words, in this order, whatever their case
    name~"jan"                          a part of it
    metadata["plan"]:"pro"   email:null   -phone:"+41..."   created>1700000000

Clauses are joined by ``AND`` (or a space) or by ``OR``, never by both [doc].
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.replies import StripeRefusalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_stripe_meter.sandbox.records import Customer

_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\''
_CLAUSE = re.compile(
    rf"(?P<minus>-)?(?P<field>[a-z_]+)(?:\[(?P<key>{_QUOTED})\])?"
    rf"(?P<operator>:|~|>=|<=|>|<)(?P<value>{_QUOTED}|null\b|\d+)",
    re.DOTALL,
)
_JOINT = re.compile(r"\s+(?:(and|or)\s+)?", re.IGNORECASE)
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    ":": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_MOST_CLAUSES = 10


@dataclass(frozen=True)
class _Clause:
    negated: bool
    field: str
    key: str | None
    operator: str
    value: str | int | None

    def matches(self, customer: Customer) -> bool:
        return self._holds(customer) != self.negated

    def _holds(self, customer: Customer) -> bool:
        if isinstance(self.value, int):
            return _COMPARE[self.operator](customer.created, self.value)
        have = customer.metadata.get(self.key) if self.key is not None else getattr(customer, self.field)
        if self.value is None or have is None:
            return have is self.value
        if self.operator == "~":
            return self.value.casefold() in have.casefold()
        return _has_phrase(have.casefold().split(), self.value.casefold().split())


def _has_phrase(words: list[str], wanted: list[str]) -> bool:
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in starts)


def parse(query: str) -> Callable[[Customer], bool]:
    """Whether a customer matches ``query``; a query that Stripe could not read is refused."""
    clauses, joints = _split(query.strip())
    if len(joints) > 1:
        raise _malformed("AND and OR cannot be mixed in one query.")
    if len(clauses) > _MOST_CLAUSES:
        raise _malformed(f"At most {_MOST_CLAUSES} clauses are allowed.")
    join = any if joints == {"or"} else all
    return lambda customer: join(clause.matches(customer) for clause in clauses)


def _split(query: str) -> tuple[list[_Clause], set[str]]:
    clauses: list[_Clause] = []
    joints: set[str] = set()
    at = 0
    while True:
        match = _CLAUSE.match(query, at)
        if match is None:
            raise _malformed(f'Expected a clause such as field:"value" at position {at}.')
        clauses.append(_clause(match))
        at = match.end()
        if at == len(query):
            return clauses, joints
        joint = _JOINT.match(query, at)
        if joint is None:
            raise _malformed(f"Expected AND, OR or a space at position {at}.")
        joints.add((joint[1] or "and").lower())
        at = joint.end()


def _clause(match: re.Match[str]) -> _Clause:
    field, key, sign, text = match["field"], match["key"], match["operator"], match["value"]
    _check_field(field, key, sign, text)
    value = None if text == "null" else int(text) if text.isdigit() else _unquote(text)
    return _Clause(match["minus"] is not None, field, _unquote(key) if key else None, sign, value)


def _check_field(field: str, key: str | None, sign: str, text: str) -> None:
    if field not in ("name", "phone", "email", "metadata", "created"):
        raise _malformed(f"Field `{field}` is an unsupported search field for resource `customers`.")
    if (field == "metadata") != (key is not None):
        raise _malformed('Metadata is searched as metadata["key"]:"value".')
    if field == "created" and (sign == "~" or not text.isdigit()):
        raise _malformed("Field `created` takes a number and one of : > < >= <=.")
    if field != "created" and (text.isdigit() or sign not in ":~"):
        raise _malformed(f"Field `{field}` takes a quoted string.")
    if sign == "~" and (key is not None or text == "null"):
        raise _malformed(f"Field `{field}` cannot be searched by substring here.")


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)


def _malformed(why: str) -> StripeRefusalError:
    return StripeRefusalError(f"We were unable to parse your search query. {why}", param="query", stored=False)
