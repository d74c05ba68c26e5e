"""The README's table of faults is what the suite tried: see the end of conftest.py, which holds them together."""

from __future__ import annotations

from decimal import Decimal

from faults import Row, differences, readme_lines, roughly

TABLE = {"power loss": "| power loss | ≈ 300 | 0 | 0 | 0 |", "full disk": "| full disk | 2 | 0 | 0 | 1 |"}


def tried(power_losses: int = 340, full_disks: int = 2, needed_a_person: int = 1) -> dict[str, Row]:
    full_disk = Row("full disk", full_disks, needed_a_person=Decimal(needed_a_person))
    return {"power loss": Row("power loss", power_losses, varies=True), "full disk": full_disk}


def test_no_fault_in_the_readme_lost_anything_or_billed_it_twice() -> None:
    lines = readme_lines()
    assert lines
    assert {tuple(line.strip("| ").split(" | ")[2:4]) for line in lines.values()} == {("0", "0")}


def test_a_row_that_varies_says_roughly_how_often() -> None:
    assert [roughly(count) for count in (1, 9, 10, 87, 340, 1999)] == [1, 9, 10, 80, 300, 1000]
    assert {fault: row.line() for fault, row in tried().items()} == TABLE


def test_a_whole_run_tries_exactly_what_the_table_says() -> None:
    assert differences(tried(), TABLE, whole=True) == []
    assert differences(tried(power_losses=160), TABLE, whole=True) == []
    for wrong in (tried(power_losses=140), tried(full_disks=1), tried(full_disks=3), tried(needed_a_person=2), {}):
        assert differences(wrong, TABLE, whole=True) != []


def test_a_partial_run_may_try_less_but_nothing_that_is_not_in_the_table() -> None:
    assert differences({}, TABLE, whole=False) == []
    assert differences(tried(1, 1, 0), TABLE, whole=False) == []
    assert differences(tried(full_disks=3), TABLE, whole=False) != []
    assert differences({"flood": Row("flood", 1)}, TABLE, whole=False) == ["'flood' is not in the table"]
