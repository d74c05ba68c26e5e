"""What travels: requests, replies and refusals, parameters, pages of lists, and the search query language."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

from langchain_stripe_meter.errors import StripeError

Json = dict[str, Any]
_BOUNDS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_SIGNS = {":": operator.eq, ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class RecordedRequest:
    """A request as it came, and the status it was answered with.

    ``params`` are the decoded query or body, ``headers`` have lower-case names, ``at`` is in Unix seconds
    on the sandbox's clock, ``status`` is None when the connection was closed without an answer.
    """

    method: str
    path: str
    params: Json
    headers: Mapping[str, str]
    at: int
    status: int | None = None

    @property
    def v2(self) -> bool:
        """Whether it asks API v2, whose errors have another shape."""
        return self.path.startswith("/v2/")

    @property
    def idempotency_key(self) -> str:
        """Empty if it has none; only a POST has one."""
        return self.headers.get("idempotency-key", "") if self.method == "POST" else ""


@dataclass(frozen=True)
class Reply:
    """One HTTP answer: its status, its JSON body, and the headers that only this answer has.

    ``stored`` says whether Stripe keeps it under the request's idempotency key.
    """

    status: int
    body: Json
    headers: Mapping[str, str] = field(default_factory=dict)
    stored: bool = True


class StripeRefusalError(StripeError):
    """The sandbox refuses a request as Stripe would; over HTTP it becomes an error body.

    ``stored=False`` marks what Stripe decides about the parameters, before it starts to work: such answers
    are never replayed for an idempotency key.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        stored: bool = True,
    ) -> None:
        super().__init__(message)
        error = {"type": kind, "code": code, "message": message, "param": param}
        body = {"error": {name: value for name, value in error.items() if value is not None}}
        self.reply = Reply(status, body, headers or {}, stored)


def v2_error(error: Mapping[str, str]) -> Json:
    """The error body of API v2, which has codes where v1 has types.

    Its ``type`` only names the errors that have a class of their own.
    """
    ours = {"code": "invalid_fields", **error}
    ours.pop("param", None)
    if ours["type"] == "invalid_request_error":
        del ours["type"]
    return {"error": ours}


def bad_parameter(message: str, param: str, code: str | None = None) -> StripeRefusalError:
    """A parameter that Stripe refuses before it does anything."""
    return StripeRefusalError(message, code=code, param=param, stored=False)


def no_such(kind: str, name: str, param: str = "id") -> StripeRefusalError:
    """An object that does not exist (any more)."""
    return StripeRefusalError(f"No such {kind}: '{name}'", status=404, code="resource_missing", param=param)


def rfc3339(epoch: int) -> str:
    """Unix seconds as API v2 writes a time."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


def decode_form(text: str) -> Json:
    """``a[b]=c`` as nested dicts, which is how Stripe reads query strings and form bodies."""
    params: Json = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        match = _KEY.fullmatch(key)
        *parents, last = [match[1], *match[2][1:-1].split("][")] if match and match[2] else [key]
        place = params
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise bad_parameter("Invalid object", key, "parameter_invalid_object")
        place[last] = value
    return params


def decode_json(body: bytes) -> Json:
    """The JSON object of a v2 request; an absent body is an empty one."""
    try:
        params = json.loads(body or b"{}")
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise StripeRefusalError("The request body must be a JSON object.", code="invalid_json", stored=False)
    return params


def anything(value: object, _wanted: Field, _path: str) -> Any:
    """Is left as it is."""
    return value


def text(value: object, wanted: Field, path: str) -> str:
    """Text of 1 to ``limit`` characters."""
    if value == "":
        raise bad_parameter(
            f"You passed an empty string for '{path}'. Remove '{path}' from your request or supply a non-empty value.",
            path,
            "parameter_invalid_empty",
        )
    return _string(value, wanted, path)


def _string(value: object, wanted: Field, path: str) -> str:
    if not isinstance(value, str):
        raise bad_parameter(f"Invalid string: {path} must be a string.", path)
    if len(value) > wanted.limit:
        shown = f"{value[:12]}...{value[-4:]}"
        raise bad_parameter(f"Invalid string: {shown}; must be at most {wanted.limit} characters", path)
    return value


def integer(value: object, _: Field, path: str) -> int:
    """A whole number, as forms write it."""
    if not isinstance(value, str) or not re.fullmatch(r"-?\d{1,18}", value):
        raise bad_parameter(f"Invalid integer: {value}", path, "parameter_invalid_integer")
    return int(value)


def moment(value: object, _: Field, path: str) -> int:
    """An RFC 3339 time; becomes Unix seconds."""
    try:
        parsed = datetime.fromisoformat(value if isinstance(value, str) and "T" in value.upper() else "")
        if parsed.tzinfo is not None:
            return int(parsed.timestamp())
    except (ValueError, OverflowError):
        pass
    raise bad_parameter(f"{path} must be an RFC 3339 string, such as 2026-01-31T12:00:00Z.", path)


def period(value: object, wanted: Field, path: str) -> Callable[[int], bool]:
    """Unix seconds, or bounds of them (gt, gte, lt, lte); becomes the question whether a time lies inside."""
    if isinstance(value, dict):
        bounds = check(value, dict.fromkeys(_BOUNDS, INTEGER), path)
        return lambda epoch: all(_BOUNDS[name](epoch, bound) for name, bound in bounds.items())
    exactly = integer(value, wanted, path)
    return lambda epoch: epoch == exactly


def choice(value: object, wanted: Field, path: str) -> str:
    """One of the ``choices``."""
    if value not in wanted.choices:
        raise bad_parameter(f"Invalid {path}: must be one of {' or '.join(wanted.choices)}", path)
    return str(value)


def texts(value: object, wanted: Field, path: str) -> dict[str, str]:
    """Free names, each with text of at most ``limit`` characters."""
    if not isinstance(value, dict):
        raise bad_parameter("Invalid object", path, "parameter_invalid_object")
    return {name: _string(item, wanted, f"{path}[{name}]") for name, item in value.items()}


def fields(value: object, wanted: Field, path: str) -> Json:
    """An object with the given ``fields``."""
    if not isinstance(value, dict):
        raise bad_parameter("Invalid object", path, "parameter_invalid_object")
    return check(value, wanted.fields, path)


def objects(value: object, wanted: Field, path: str) -> list[Json]:
    """At most ``limit`` objects with the given ``fields``."""
    if not isinstance(value, list):
        raise bad_parameter("Invalid array", path, "parameter_invalid_array")
    if len(value) > wanted.limit:
        raise bad_parameter(f"{path} may have at most {wanted.limit} items, not {len(value)}.", path)
    return [fields(item, wanted, f"{path}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True)
class Field:
    """What one parameter may hold: ``kind`` is one of the functions above."""

    kind: Callable[[object, Field, str], Any] = text
    required: bool = False
    limit: int = 5000
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)


INTEGER = Field(integer)
EXPAND = {"expand": Field(anything)}
LISTING = {"limit": INTEGER, "starting_after": Field(), "ending_before": Field(), **EXPAND}


def check(params: Json, known: Mapping[str, Field], within: str = "") -> Json:
    """The parameters, with integers and times as ``int``; refuses what Stripe would refuse."""
    path = f"{within}[{{}}]" if within else "{}"
    unknown = [path.format(name) for name in params if name not in known]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        message = f"Received unknown parameter{plural}: {', '.join(unknown)}"
        raise bad_parameter(message, unknown[0], "parameter_unknown")
    for name, wanted in known.items():
        if wanted.required and params.get(name) is None:
            missing = path.format(name)
            raise bad_parameter(f"Missing required param: {missing}.", missing, "parameter_missing")
    given = {name: value for name, value in params.items() if value is not None}
    return {name: known[name].kind(value, known[name], path.format(name)) for name, value in given.items()}


def page(items: Sequence[Json], params: Json, url: str) -> Json:
    """One page of ``items``, which are given newest first; the limit is 1 to 100, by default 10."""
    limit = _limit(params)
    ids = [item["id"] for item in items]
    for cursor in params.keys() & {"starting_after", "ending_before"}:
        if params[cursor] not in ids:
            raise bad_parameter(f"No such object: '{params[cursor]}'", cursor, "resource_missing")
    if "ending_before" in params:
        items = items[: ids.index(params["ending_before"])]
        data = items[-limit:]
    else:
        items = items[ids.index(params["starting_after"]) + 1 :] if "starting_after" in params else items
        data = items[:limit]
    return {"object": "list", "data": list(data), "has_more": len(items) > limit, "url": url}


def _limit(params: Json) -> int:
    limit = int(params.get("limit", 10))
    if not 1 <= limit <= 100:
        word = "greater than or equal to 1" if limit < 1 else "less than or equal to 100"
        message = f"Invalid integer: {limit}; this value must be {word}."
        raise bad_parameter(message, "limit", "parameter_invalid_integer")
    return limit


def search_page(items: Sequence[Json], params: Json, url: str) -> Json:
    """One page of a search; ``next_page`` is the token of the following one."""
    limit, token = _limit(params), re.fullmatch(r"page_(\d+)", params.get("page", "page_0"))
    if token is None:
        raise bad_parameter(f"Invalid page token: {params['page']}", "page")
    end = int(token[1]) + limit
    more = len(items) > end
    return {
        "object": "search_result",
        "data": list(items[end - limit : end]),
        "has_more": more,
        "next_page": f"page_{end}" if more else None,
        "url": url,
    }


_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\''
_CLAUSE = re.compile(
    rf"(?P<minus>-)?(?P<field>[a-z_]+)(?:\[(?P<key>{_QUOTED})\])?"
    rf"(?P<sign>:|~|>=|<=|>|<)(?P<value>{_QUOTED}|null\b|\d+)",
    re.DOTALL,
)
_JOINT = re.compile(r"\s+(?:(and|or)\s+)?", re.IGNORECASE)
_MOST_CLAUSES = 10


def parse_search(query: str) -> Callable[[Any], bool]:
    """Whether a customer matches ``query``; a query that Stripe could not read is refused.

        name:"jane doe"                     all words, in this order, whatever their case
        name~"jan"                          a part of it
        metadata["plan"]:"pro"   email:null   -phone:"+41..."   created>1700000000

    Clauses are joined by ``AND`` (or a space) or by ``OR``, never by both [doc].
    """
    clauses, joints = _split(query.strip())
    if len(joints) > 1:
        raise _malformed("AND and OR cannot be mixed in one query.")
    if len(clauses) > _MOST_CLAUSES:
        raise _malformed(f"At most {_MOST_CLAUSES} clauses are allowed.")
    join = any if joints == {"or"} else all
    return lambda customer: join(_holds(clause, customer) != bool(clause["minus"]) for clause in clauses)


def _split(query: str) -> tuple[list[re.Match[str]], set[str]]:
    clauses: list[re.Match[str]] = []
    joints: set[str] = set()
    at = 0
    while clause := _CLAUSE.match(query, at):
        _check_clause(*clause.group("field", "key", "sign", "value"))
        clauses.append(clause)
        if clause.end() == len(query):
            return clauses, joints
        joint = _JOINT.match(query, clause.end())
        if joint is None:
            raise _malformed(f"Expected AND, OR or a space at position {clause.end()}.")
        joints.add((joint[1] or "and").lower())
        at = joint.end()
    raise _malformed(f'Expected a clause such as field:"value" at position {at}.')


def _check_clause(field: str, key: str | None, sign: str, value: str) -> None:
    if field not in ("name", "phone", "email", "metadata", "created"):
        raise _malformed(f"Field `{field}` is an unsupported search field for resource `customers`.")
    if (field == "metadata") != (key is not None):
        raise _malformed('Metadata is searched as metadata["key"]:"value".')
    if field == "created" and (sign == "~" or not value.isdigit()):
        raise _malformed("Field `created` takes a number and one of : > < >= <=.")
    if field != "created" and (value.isdigit() or sign not in ":~"):
        raise _malformed(f"Field `{field}` takes a quoted string.")
    if sign == "~" and (key is not None or value == "null"):
        raise _malformed(f"Field `{field}` cannot be searched by substring here.")


def _holds(clause: re.Match[str], customer: Any) -> bool:
    if clause["field"] == "created":
        return bool(_SIGNS[clause["sign"]](customer.created, int(clause["value"])))
    key = clause["key"]
    have = customer.metadata.get(_unquote(key)) if key else getattr(customer, clause["field"])
    if clause["value"] == "null" or have is None:
        return have is None and clause["value"] == "null"
    have, wanted = have.casefold(), _unquote(clause["value"]).casefold()
    return wanted in have if clause["sign"] == "~" else _has_phrase(have.split(), wanted.split())


def _has_phrase(words: list[str], wanted: list[str]) -> bool:
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in starts)


def _unquote(quoted: str) -> str:
    return re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL)


def _malformed(why: str) -> StripeRefusalError:
    return StripeRefusalError(f"We were unable to parse your search query. {why}", param="query", stored=False)
