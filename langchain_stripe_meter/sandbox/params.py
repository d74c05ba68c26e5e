"""Parameters: decoding what the client sent, and refusing what Stripe does not know."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl

from langchain_stripe_meter.sandbox.replies import Json, StripeRefusalError, bad_parameter, from_rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)\Z")
_INTEGER = re.compile(r"-?\d{1,18}\Z")


def decode_form(text: str) -> Json:
    """``a[b]=c`` as nested dicts, which is how Stripe reads query strings and form bodies."""
    params: Json = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        match = _KEY.match(key)
        path = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])] if match else [key]
        _put(params, path, value, key)
    return params


def _put(params: Json, path: list[str], value: str, key: str) -> None:
    *parents, last = path
    for name in parents:
        params = params.setdefault(name, {})
        if not isinstance(params, dict):
            raise bad_parameter("Invalid object", key, "parameter_invalid_object")
    params[last] = value


def decode_json(body: bytes) -> Json:
    """The JSON object of a v2 request; an absent body is an empty one."""
    try:
        params = json.loads(body or b"{}")
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise StripeRefusalError("The request body must be a JSON object.", code="invalid_json", stored=False)
    return params


@dataclass(frozen=True)
class Field:
    """What one parameter may hold; ``limit`` is in characters."""

    kind: Literal["text", "integer", "time", "choice", "map", "object", "list", "any"] = "text"
    required: bool = False
    limit: int = 5000
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)


EXPAND = Field("any")


def check(params: Json, fields: Mapping[str, Field], within: str = "") -> Json:
    """The parameters, with integers and times as ``int``; refuses what Stripe would refuse."""
    unknown = [_path(within, name) for name in params if name not in fields]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        raise bad_parameter(
            f"Received unknown parameter{plural}: {', '.join(unknown)}", unknown[0], "parameter_unknown"
        )
    for name, wanted in fields.items():
        if wanted.required and params.get(name) is None:
            path = _path(within, name)
            raise bad_parameter(f"Missing required param: {path}.", path, "parameter_missing")
    return {
        name: _value(value, fields[name], _path(within, name)) for name, value in params.items() if value is not None
    }


def _path(within: str, name: str) -> str:
    return f"{within}[{name}]" if within else name


def _value(value: object, wanted: Field, path: str) -> Any:
    return _CHECKS[wanted.kind](value, wanted, path)


def _text(value: object, wanted: Field, path: str) -> str:
    if not isinstance(value, str):
        raise bad_parameter(f"Invalid string: {path} must be a string.", path)
    if value == "":
        raise bad_parameter(
            f"You passed an empty string for '{path}'. Remove '{path}' from your request or supply a non-empty value.",
            path,
            "parameter_invalid_empty",
        )
    if len(value) > wanted.limit:
        shown = f"{value[:12]}...{value[-4:]}"
        raise bad_parameter(f"Invalid string: {shown}; must be at most {wanted.limit} characters", path)
    return value


def _integer(value: object, _: Field, path: str) -> int:
    if not isinstance(value, str) or not _INTEGER.match(value):
        raise bad_parameter(f"Invalid integer: {value}", path, "parameter_invalid_integer")
    return int(value)


def _time(value: object, _: Field, path: str) -> int:
    try:
        return from_rfc3339(value if isinstance(value, str) else "")
    except (ValueError, OverflowError) as error:
        raise bad_parameter(f"{path} must be an RFC 3339 string, such as 2026-01-31T12:00:00Z.", path) from error


def _choice(value: object, wanted: Field, path: str) -> str:
    if value not in wanted.choices:
        raise bad_parameter(f"Invalid {path}: must be one of {' or '.join(wanted.choices)}", path)
    return str(value)


def _map(value: object, wanted: Field, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise bad_parameter("Invalid object", path, "parameter_invalid_object")
    for key, item in value.items():
        if not isinstance(item, str):
            raise bad_parameter(f"Invalid string: {path}[{key}] must be a string.", f"{path}[{key}]")
        if len(item) > wanted.limit:
            raise bad_parameter(
                f"Invalid string: {path}[{key}] must be at most {wanted.limit} characters", f"{path}[{key}]"
            )
    return dict(value)


def _object(value: object, wanted: Field, path: str) -> Json:
    if not isinstance(value, dict):
        raise bad_parameter("Invalid object", path, "parameter_invalid_object")
    return check(value, wanted.fields, path)


def _list(value: object, wanted: Field, path: str) -> list[Json]:
    if not isinstance(value, list):
        raise bad_parameter("Invalid array", path, "parameter_invalid_array")
    if len(value) > wanted.limit:
        raise bad_parameter(f"{path} may have at most {wanted.limit} items, not {len(value)}.", path)
    return [_object(item, wanted, f"{path}[{index}]") for index, item in enumerate(value)]


def _any(value: object, _wanted: Field, _path: str) -> object:
    return value


_CHECKS: dict[str, Callable[[object, Field, str], Any]] = {
    "text": _text,
    "integer": _integer,
    "time": _time,
    "choice": _choice,
    "map": _map,
    "object": _object,
    "list": _list,
    "any": _any,
}
