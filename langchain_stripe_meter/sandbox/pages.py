"""Stripe's two ways of listing: cursors for lists, page tokens for searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_stripe_meter.sandbox.params import EXPAND, Field
from langchain_stripe_meter.sandbox.replies import Json, bad_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LISTING = {
    "limit": Field("integer"),
    "starting_after": Field(),
    "ending_before": Field(),
    "expand": EXPAND,
}
_DEFAULT_LIMIT = 10
_MOST = 100


def _limit(params: Json) -> int:
    limit = int(params.get("limit", _DEFAULT_LIMIT))
    if not 1 <= limit <= _MOST:
        word = "greater than or equal to 1" if limit < 1 else f"less than or equal to {_MOST}"
        raise bad_parameter(
            f"Invalid integer: {limit}; this value must be {word}.", "limit", "parameter_invalid_integer"
        )
    return limit


def page(items: Sequence[Json], params: Json, url: str) -> Json:
    """One page of ``items``, which are given newest first; the limit is 1 to 100, by default 10."""
    limit = _limit(params)
    ids = [item["id"] for item in items]
    if "ending_before" in params:
        before = items[: _position(ids, params["ending_before"], "ending_before")]
        return _listing(before[-limit:], url, has_more=len(before) > limit)
    start = _position(ids, params["starting_after"], "starting_after") + 1 if "starting_after" in params else 0
    return _listing(items[start : start + limit], url, has_more=len(items) > start + limit)


def _position(ids: list[str], cursor: str, param: str) -> int:
    if cursor not in ids:
        raise bad_parameter(f"No such object: '{cursor}'", param, "resource_missing")
    return ids.index(cursor)


def _listing(data: Sequence[Json], url: str, *, has_more: bool) -> Json:
    return {"object": "list", "data": list(data), "has_more": has_more, "url": url}


def search_page(items: Sequence[Json], params: Json, url: str) -> Json:
    """One page of a search; ``next_page`` is the token of the following one."""
    limit, start = _limit(params), _start(params.get("page", "page_0"))
    more = len(items) > start + limit
    return {
        "object": "search_result",
        "data": list(items[start : start + limit]),
        "has_more": more,
        "next_page": f"page_{start + limit}" if more else None,
        "url": url,
    }


def _start(token: str) -> int:
    number = token.removeprefix("page_")
    if not (token.startswith("page_") and number.isdigit()):
        raise bad_parameter(f"Invalid page token: {token}", "page")
    return int(number)


def created_filter(wanted: object) -> Callable[[int], bool]:
    """The ``created`` filter of lists: a number of Unix seconds, or bounds gt, gte, lt, lte."""
    if isinstance(wanted, str):
        wanted = {"gte": wanted, "lte": wanted}
    if not isinstance(wanted, dict) or not set(wanted) <= {"gt", "gte", "lt", "lte"}:
        raise bad_parameter("Invalid created: give Unix seconds, or gt, gte, lt, lte.", "created")
    if not all(isinstance(bound, str) and bound.isdigit() for bound in wanted.values()):
        raise bad_parameter("Invalid integer in created.", "created", "parameter_invalid_integer")
    low = max(int(wanted.get("gte", 0)), int(wanted["gt"]) + 1 if "gt" in wanted else 0)
    highs = [int(wanted["lte"])] if "lte" in wanted else []
    highs += [int(wanted["lt"]) - 1] if "lt" in wanted else []
    return lambda created: low <= created and all(created <= high for high in highs)
