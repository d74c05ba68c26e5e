"""What a user imports, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import langchain_stripe_meter
from langchain_stripe_meter.core.states import EVENT_MOVES, READING_MOVES, picture

ROOT = Path(__file__).parent.parent


def test_every_public_name_can_be_imported_and_the_list_is_sorted() -> None:
    names = langchain_stripe_meter.__all__
    assert sorted(names) == sorted(set(names))
    for name in names:
        assert getattr(langchain_stripe_meter, name) is not None
    assert dir(langchain_stripe_meter) == sorted(names)
    assert {name for home in langchain_stripe_meter._HOMES.values() for name in home} == set(names)


def test_an_unknown_name_is_an_attribute_error_naming_it() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = langchain_stripe_meter.nonsense


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["stripe", "sqlalchemy", "alembic", "tiktoken", "langchain_core", "pydantic"]
    code = f"import sys, langchain_stripe_meter; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_making_a_handler_loads_neither_stripe_nor_tiktoken(tmp_path: Path) -> None:
    code = (
        "import sys; from langchain_stripe_meter import StripeMeterCallbackHandler, Tokens\n"
        f"StripeMeterCallbackHandler(Tokens('t'), stripe='sk_test_1', ledger='sqlite:///{tmp_path}/l.db')\n"
        "print([name for name in ['stripe', 'tiktoken', 'alembic'] if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_new_ledger_is_made_without_alembic(tmp_path: Path) -> None:
    """A short-lived process must not wait for it to be imported."""
    code = (
        "import sys; from langchain_stripe_meter.ledger.store import Ledger\n"
        f"Ledger('sqlite:///{tmp_path}/l.db').set_note('made', '1'); print('alembic' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"


def test_the_picture_of_the_states_in_the_readme_is_made_from_the_table() -> None:
    assert picture() in (ROOT / "README.md").read_text()
    assert len(picture().splitlines()) == 5 + sum(
        len(moves) for table in (READING_MOVES, EVENT_MOVES) for moves in table.values()
    )


def test_the_top_level_holds_nothing_beyond_the_design() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    allowed = {"langchain_stripe_meter", "tests", "notebooks", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {path.split("/")[0] for path in tracked if not path.startswith(".")} <= allowed
