"""The README's table of faults is what the suite tried. This file runs last; a partial run checks what it tried."""

from __future__ import annotations

import pytest
from faults import TESTS, Row, files, not_passed, readme_lines, roughly, rows


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def tried_in(line: str) -> int:
    return int(cells(line)[1].removeprefix("≈ "))


def was_whole(request: pytest.FixtureRequest) -> bool:
    """Whether every test of every file that tallies was run, and passed."""
    options = request.config.option
    chosen = options.keyword or options.markexpr or any("::" in argument for argument in request.config.args)
    ran = {item.path for item in request.session.items}
    ours = files()
    left_out = [one for one in not_passed if TESTS / one.split("::")[0].split("/")[-1] in ours]
    return not chosen and not left_out and ran.issuperset(ours)


def test_no_fault_in_the_readme_lost_anything_or_billed_it_twice() -> None:
    lines = readme_lines()
    assert lines
    assert {tuple(cells(line)[2:4]) for line in lines.values()} == {("0", "0")}


def test_the_readmes_table_is_what_the_suite_tried(request: pytest.FixtureRequest) -> None:
    lines = readme_lines()
    missing = rows.keys() - lines.keys()
    assert not missing, "run: python tests/faults.py"
    for fault, row in rows.items():
        assert row.tried <= tried_in(lines[fault]) or row.varies, f"{fault}: run python tests/faults.py"
    if was_whole(request):
        assert rows.keys() == lines.keys()
        assert {row.line() for row in rows.values() if not row.varies} <= set(lines.values())
        assert all(2 * row.tried >= tried_in(lines[fault]) for fault, row in rows.items())


def test_a_row_that_varies_says_roughly_how_often() -> None:
    assert [roughly(count) for count in (1, 9, 10, 87, 340, 1999)] == [1, 9, 10, 80, 300, 1000]
    assert Row("power loss", 340, varies=True).line() == "| power loss | ≈ 300 | 0 | 0 | 0 |"
    assert Row("power loss", 340).line() == "| power loss | 340 | 0 | 0 | 0 |"
