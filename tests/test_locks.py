"""Every lock of ours is taken inside, and let go whatever interrupts its holder: read from the code itself."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_faults_shutdown import VERSIONS, pythons

import langchain_stripe_meter

FOLDER = Path(langchain_stripe_meter.__file__).parent


# -- inside


CALLED_INSIDE = {
    "callbacks.MeteringCallbacks._join_batch": "soon()",
    "callbacks.MeteringCallbacks._let_go_of_abandoned": "soon()",
    "callbacks.MeteringCallbacks._step_failed": "soon(), within()",
    "callbacks.MeteringCallbacks._end": "soon(), within()",
    "callbacks.MeteringCallbacks._sweep": "soon()",
    "callbacks.MeteringCallbacks._cut_all": "soon()",
    "recording.Recorder.recorded": "soon(), within()",
    "recording.Recorder._failed": "soon(), within()",
    "ledger.group.GroupCommit._submit": "within()",
    "ledger.group.GroupCommit._drain": "within()",
    "ledger.group.GroupCommit._write_until": "within()",
    "ledger.group.GroupCommit._tell": "within()",
    "ledger.group.GroupCommit._ring": "within()",
    "ledger.lanes.Lane.run": "within(), by GroupCommit",
    "ledger.database._before_fork": "nothing else runs while a process forks",
    "ledger.database.Database.before_fork": "nothing else runs while a process forks",
}
"""Functions that may take a lock without ``inside()``, for they are called under what stands behind their name."""


def names_of_locks(trees: dict[str, ast.Module]) -> set[str]:
    """Under which names the package keeps locks."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            made = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if isinstance(made, ast.Call) and ast.unparse(made.func).split(".")[-1] in ("Lock", "RLock", "Condition"):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {ast.unparse(target).split(".")[-1] for target in targets}
    return names


def taken_outside(node: ast.AST, names: set[str], place: str, marked: bool = False) -> Iterator[str]:
    """Where below ``node`` a lock of these names, or a connection, is taken without ``inside()`` before it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        place, marked = f"{place}.{getattr(node, 'name', '<lambda>')}", False
    for item in node.items if isinstance(node, ast.With) else ():
        taken = ast.unparse(item.context_expr)
        marked = marked or taken == "inside()"
        if not marked and (taken.split(".")[-1] in names or taken.endswith("engine.connect()")):
            yield place
    called = node.func if isinstance(node, ast.Call) else None
    if not marked and isinstance(called, ast.Attribute) and called.attr == "acquire":
        yield place
    for child in ast.iter_child_nodes(node):
        yield from taken_outside(child, names, place, marked)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The package's modules, without the sandbox's: those meet no streams, and no Ctrl-C outside a test."""
    files = [file for file in FOLDER.rglob("*.py") if file.relative_to(FOLDER).parts[0] != "sandbox"]
    return {".".join(file.relative_to(FOLDER).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


def test_no_lock_of_ours_is_taken_where_garbage_collection_could_come_back_for_it(trees: dict[str, ast.Module]) -> None:
    """Otherwise the end of a stream that somebody left, told on the same thread, waits for the lock for ever."""
    names = names_of_locks(trees)
    assert {"lock", "_lock", "_leader", "_starting", "reading"} <= names
    found = {place for module, tree in trees.items() for place in taken_outside(tree, names, module)}
    forgotten, stale = sorted(found - CALLED_INSIDE.keys()), sorted(CALLED_INSIDE.keys() - found)
    assert not forgotten, f"Write 'with inside(), lock:' there, or say who calls them inside: {forgotten}"
    assert not stale, f"They take no lock any more, or are marked: {stale}"


# -- let go

JUMPS = """
import ast, dis, json, sys, types
from pathlib import Path

def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)

def unguarded(text):
    for code in codes(compile(text, "module", "exec")):
        ranges = [range(one.start, one.end) for one in dis._parse_exception_table(code)]
        if code.co_name.startswith("<"):
            continue  # what it is called by is interrupted with it
        for step in dis.get_instructions(code):
            if step.opname == "JUMP_BACKWARD" and not any(step.offset in one for one in ranges):
                yield step.positions.lineno

print(json.dumps({name: list(unguarded(Path(name).read_text())) for name in sys.argv[1:]}))
"""
"""Where a module jumps back and nobody in that function would hear of an interrupt. Python 3.12 and 3.13 leave the
jumps of ``while condition:``, and of a ``for`` with an ``if`` at its end, out of the ``with`` and ``try`` around."""


def guarded(tree: ast.Module, locks: set[str]) -> Iterator[tuple[range, str]]:
    """The lines in which a lock is held, or whoever interrupts must not pass unnoticed; a function in them is not."""
    for node in ast.walk(tree):
        is_guard = isinstance(node, ast.With) and any(
            ast.unparse(item.context_expr).split(".")[-1] in locks for item in node.items
        )
        if isinstance(node, ast.Try):
            kinds = [ast.unparse(one.type) if one.type else "BaseException" for one in node.handlers]
            is_guard = bool(node.finalbody) or "BaseException" in kinds
        if is_guard:
            assert isinstance(node, ast.With | ast.Try)
            yield range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1), ast.unparse(node).splitlines()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_lock_of_ours_stays_taken_because_an_interrupt_struck_as_a_loop_jumps_back(
    version: str, trees: dict[str, ast.Module]
) -> None:
    if version not in pythons():
        pytest.skip(f"no Python {version} is named in $STRIPE_METER_PYTHONS")
    names = names_of_locks(trees)
    files = {str((FOLDER / module.replace(".", "/")).with_suffix(".py")): tree for module, tree in trees.items()}
    asked = subprocess.run([pythons()[version], "-c", JUMPS, *files], check=True, capture_output=True, text=True)
    found = json.loads(asked.stdout)
    assert version == "3.11" or sum(map(len, found.values())) > 100
    wrong = [
        f"{name}:{line} in {what}"
        for name, lines in found.items()
        for held, what in guarded(files[name], names)
        for line in lines
        if line in held
    ]
    assert not wrong, "Move the loop into a function of its own: " + "; ".join(wrong)
