"""The README's examples run as they are written."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langgraph.graph import START, MessagesState, StateGraph

import langchain_stripe_meter
from langchain_stripe_meter.sandbox import StripeSandbox

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)
EXAMPLES = [block for block in BLOCKS if "with StripeSandbox()" not in block]
SCRIPTS = [block for block in BLOCKS if block not in EXAMPLES]
"""Complete by themselves: they bring their own Stripe."""
FILES = re.findall(r"^```toml\n# (\S+)\n(.*?)^```", README, flags=re.S | re.M)
USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


def model() -> GenericFakeChatModel:
    message = AIMessage("Hi", usage_metadata=USAGE, response_metadata={"model_name": "gpt-4o"})
    return GenericFakeChatModel(messages=iter([message] * 100))


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stripe_sandbox: StripeSandbox) -> dict[str, Any]:
    """What the reader has already: a chain, a graph, a key, and no name of this package."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    for name in ("ai_tokens_used", "bot_messages", "message_credits"):
        stripe_sandbox.create_meter(name)
    stripe_sandbox.create_customer(id="cus_123", email="ann@example.com")
    builder = StateGraph(MessagesState)
    builder.add_node("answer", lambda state: {"messages": [model().invoke(state["messages"])]})
    builder.add_edge(START, "answer")
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", stripe_sandbox.webhook_secret)
    monkeypatch.setenv("STRIPE_METER_TOKEN_SECRET", "a-secret-of-more-than-32-bytes-indeed")
    chain = ChatPromptTemplate.from_template("{question}") | model()
    return {"chain": chain, "builder": builder, "model": model(), "tools": []}


def test_what_an_example_imports_is_used_in_it_or_after_it() -> None:
    for number, example in enumerate(EXAMPLES):
        imports = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom | ast.Import)]
        imported = {name.asname or name.name for node in imports for name in node.names}
        nodes = [node for later in EXAMPLES[number:] for node in ast.walk(ast.parse(later))]
        assert imported <= {node.id for node in nodes if isinstance(node, ast.Name)}


def test_every_example_runs_and_bills_what_it_says(namespace: dict[str, Any], stripe_sandbox: StripeSandbox) -> None:
    handlers = []
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), namespace)
        if namespace.get("meter") not in (None, *handlers):
            handlers.append(namespace["meter"])
        if "def paid_by_user" in example:  # with the handler that is shown beside it
            user = SimpleNamespace(user=SimpleNamespace(stripe_customer_id="cus_123"))
            assert namespace["paid_by_user"]({}, user)["callbacks"] == [namespace["meter"]]
    report = namespace["report"]
    assert (report.delivered, report.pending, report.held, report.skipped) == (1, 0, 0, 1)
    assert "paid_by_user" in namespace
    assert namespace["out"]["success"] is True
    assert namespace["app"].routes[0].path == "/stripe/webhooks"
    taken_back = [event.value for event in stripe_sandbox.events if event.cancelled]
    assert taken_back == [-100]
    for handler in handlers:
        assert handler.close().pending == 0
    otherwise = 15 + 15  # by several sources in order, and from a file of settings
    limited = 15 + 15  # an agent and a chain
    assert stripe_sandbox.billed("ai_tokens_used", "cus_123") == 15 + 15 + otherwise + 812 + 500 + limited
    assert namespace["strict"].remaining("cus_123") == namespace["left"] + 900_000
    assert namespace["strict"].remaining("cus_456") == 10_000
    recorded = 15 + 15 + otherwise + 812 + limited  # what was sent without a ledger does not count
    assert namespace["left"] == 100_000 - recorded
    assert stripe_sandbox.billed("bot_messages", "cus_123") == Decimal(2)


def test_the_first_script_runs_as_it_stands_and_again(tmp_path: Path) -> None:
    (script,) = SCRIPTS
    (tmp_path / "try_it.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STRIPE_")}
    environment["PYTHONPATH"] = str(Path(langchain_stripe_meter.__file__).parent.parent)
    for _ in range(2):
        run = [sys.executable, "try_it.py"]
        ran = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines() == [
            "FlushReport(delivered=1, pending=0, held=0, skipped=0, rejected=0, doubtful=0)",
            "billed: 15",
        ]
        assert ran.stderr == ""
