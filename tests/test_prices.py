"""What a run cost: genai-prices' table, exact arithmetic, and never 0 for a model without a price."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal, Inexact, localcontext
from pathlib import Path
from typing import Any

import pytest
from metering import Shop
from providers import AnthropicServer, OpenAIServer, Reply, anthropic_usage, openai_usage

from langchain_stripe_meter import Cost
from langchain_stripe_meter.core.usage import Usage
from langchain_stripe_meter.prices import genai_price

MILLION = Decimal(1_000_000)


def price(model: str, provider: str = "openai", **tokens: Any) -> Decimal:
    return genai_price(Usage(**{"input": 0, "output": 0, **tokens}), model, provider)


def test_a_cached_token_has_its_own_price_and_is_not_charged_as_a_fresh_one_too() -> None:
    fresh, cached = price("gpt-4o", input=1_000_000), price("gpt-4o", input=1_000_000, cache_read=1_000_000)
    assert 0 < cached < fresh
    mixed = price("gpt-4o", input=1_000_000, cache_read=400_000)
    assert mixed == fresh * Decimal("0.6") + cached * Decimal("0.4")


def test_what_anthropic_keeps_for_an_hour_costs_more_than_what_it_keeps_for_five_minutes() -> None:
    written = {"input": 1_000_000, "cache_write": 1_000_000}
    short = price("claude-sonnet-4-0", "anthropic", **written)
    long = price("claude-sonnet-4-0", "anthropic", **written, cache_write_1h=1_000_000)
    assert long == short * Decimal("1.6")
    mixed = price("claude-sonnet-4-0", "anthropic", **written, cache_write_1h=400_000)
    assert mixed == short * Decimal("0.6") + long * Decimal("0.4")


def test_reasoning_costs_what_the_output_costs_that_it_is_a_part_of() -> None:
    assert price("o3", output=1000, reasoning=900) == price("o3", output=1000) > 0


def test_a_dated_model_and_a_plain_one_cost_the_same() -> None:
    assert price("gpt-4o-2024-08-06", input=1000) == price("gpt-4o", input=1000)


def test_an_unknown_model_is_a_lookup_error_not_a_price_of_nothing() -> None:
    with pytest.raises(LookupError):
        price("no-such-model-anywhere", input=1000)


def test_a_model_that_a_user_runs_is_not_priced_as_somebody_elses() -> None:
    assert price("deepseek-chat", "deepseek", input=1000) > 0
    with pytest.raises(LookupError):
        price("deepseek-chat", "ollama", input=1000)


def test_openais_client_may_speak_to_anybodys_server_so_the_model_is_looked_for_everywhere() -> None:
    assert price("deepseek-chat", "openai", input=1000) == price("deepseek-chat", "deepseek", input=1000)


def test_an_applications_own_decimal_context_changes_no_price() -> None:
    usual = price("gpt-4o", input=123_457, output=23_461)
    with localcontext() as context:
        context.prec = 3
        context.traps[Inexact] = True
        assert price("gpt-4o", input=123_457, output=23_461) == usual


@pytest.mark.parametrize(("unit", "factor"), [("usd", 1), ("cents", 100), ("micro_usd", 1_000_000)])
def test_a_run_is_billed_at_its_price_times_the_markup_in_the_chosen_unit(
    unit: Any, factor: int, tmp_path: Path
) -> None:
    with OpenAIServer() as server, Shop(tmp_path, Cost("cost", markup=Decimal("1.3"), unit=unit)) as shop:
        server.reply(Reply(usage=openai_usage(1200, 300, cached=800)))
        server.chat(model="gpt-4o").invoke("Hi", shop.config())
        expected = price("gpt-4o", input=1200, output=300, cache_read=800) * Decimal("1.3") * factor
        assert shop.billed() == {"cost": expected}


def test_anthropics_cache_writes_and_reads_are_priced_once_each(tmp_path: Path) -> None:
    with AnthropicServer() as server, Shop(tmp_path, Cost("cost", unit="usd")) as shop:
        server.reply(Reply(usage=anthropic_usage(10, 50, cache_read=1000, cache_creation=200)))
        server.chat(model="claude-sonnet-4-6").invoke("Hi", shop.config())
        by_hand = (10 * 3 + 1000 * Decimal("0.3") + 200 * Decimal("3.75") + 50 * 15) / MILLION
        assert shop.billed() == {"cost": by_hand}


def test_a_model_without_a_price_is_held_with_its_name(tmp_path: Path) -> None:
    with OpenAIServer() as server, Shop(tmp_path, Cost("cost")) as shop:
        server.chat(model="my-own-model").invoke("Hi", shop.config())
        assert shop.billed() == {}
        (held,) = shop.handler.held()
        assert "my-own-model" in held.reason
        assert held.value is None


def test_own_prices_come_first_and_name_dollars_per_million_tokens(tmp_path: Path) -> None:
    prices = {"my-own-model": {"input": Decimal("0.5"), "output": 2}}
    with OpenAIServer() as server, Shop(tmp_path, Cost("cost", prices=prices, unit="micro_usd")) as shop:
        server.reply(Reply(usage=openai_usage(1000, 100)))
        server.chat(model="my-own-model").invoke("Hi", shop.config())
        assert shop.billed() == {"cost": 1000 * Decimal("0.5") + 100 * 2}


def test_prices_are_read_before_the_first_run(tmp_path: Path) -> None:
    """Not on the event loop of that run. (In a process of its own, since each reads them once.)"""
    program = f"""
import sys
from langchain_stripe_meter import Cost, StripeMeterCallbackHandler
from langchain_stripe_meter.core.meters import Call
from langchain_stripe_meter.core.usage import Usage
meter = StripeMeterCallbackHandler(Cost("cost"), customer="cus_1", deliver=False, ledger="sqlite:///{tmp_path}/l.db")
known, opened = set(sys.modules), []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
print([one.value for one in meter.meters[0].readings(Call(Usage(1000, 10), "gpt-4o", "openai"))])
print(opened, sorted(set(sys.modules) - known))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.endswith("Decimal('2600.0000')]\n[] []\n"), (done.stdout, done.stderr)
