"""Records as tables, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any


class NotebookTable:
    """Shows a record as a small table in a notebook."""

    def _repr_html_(self) -> str:
        return html_table(("", ""), [(name, value) for name, value in asdict(self).items()])  # type: ignore[call-overload]


def table_of(kind: Any, items: Iterable[object], *more: str, hide: Sequence[str] = ()) -> str:
    """Records of one dataclass as an HTML table; ``more`` are properties to show behind the fields."""
    head = [*(one.name for one in fields(kind) if one.name not in hide), *more]
    return html_table(head, [[getattr(item, name) for name in head] for item in items])


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain HTML table; every cell is escaped."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table>{line('th', head)}{body}</table>" if any(head) else f"<table>{body}</table>"
