"""Usage: inclusive buckets that add up, whatever shape a provider reports them in."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage

from langchain_stripe_meter.core.usage import (
    KINDS,
    Usage,
    beside_text,
    completed,
    text_of,
    thoughts_of,
    usage_from_metadata,
    usage_from_token_usage,
)
from langchain_stripe_meter.errors import UsageError

counts = st.integers(0, 10**9)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Any usage that does not contradict itself."""
    read, written, fresh, said, thought, spoken = (draw(counts) for _ in range(6))
    total = read + written + fresh
    return Usage(
        input=total,
        output=said + thought + spoken,
        cache_read=read,
        cache_write=written,
        audio_input=draw(st.integers(0, total)),
        reasoning=thought,
        audio_output=spoken,
    )


@given(usages())
def test_the_exclusive_parts_add_up_to_the_total_and_to_each_sum(usage: Usage) -> None:
    parts = usage.exclusive()
    assert set(parts) == set(KINDS)
    assert all(count >= 0 for count in parts.values())
    assert sum(parts.values()) == usage.total
    assert sum(parts[kind] for kind in ("input", "cache_read", "cache_write", "audio_input")) == usage.input
    assert sum(parts[kind] for kind in ("output", "reasoning", "audio_output")) == usage.output


@given(usages())
def test_a_report_in_langchains_shape_is_read_back_as_it_was(usage: Usage) -> None:
    report = {
        "input_tokens": usage.input,
        "output_tokens": usage.output,
        "total_tokens": usage.total,
        "input_token_details": {
            "cache_read": usage.cache_read, "cache_creation": usage.cache_write, "audio": usage.audio_input
        },
        "output_token_details": {"reasoning": usage.reasoning, "audio": usage.audio_output},
    }  # fmt: skip
    assert usage_from_metadata(report) == usage


@given(counts, counts, counts, counts)
def test_parts_beyond_their_sum_are_refused_with_both_numbers(total: int, read: int, written: int, more: int) -> None:
    if read + written > total:
        with pytest.raises(UsageError, match=rf"= {read + written}, which is more than input = {total}"):
            Usage(total, 0, cache_read=read, cache_write=written)
    with pytest.raises(UsageError, match=rf"audio_input = {total + more + 1}.*input = {total}"):
        Usage(total, 0, audio_input=total + more + 1)
    with pytest.raises(UsageError, match=rf"= {total + more + 1}.*output = {total}"):
        Usage(0, total, reasoning=total, audio_output=more + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [-1, 1.0, 0.5, "3", True, False, float("nan")])
def test_a_count_is_a_whole_number_from_zero_up(kind: str, count: Any) -> None:
    with pytest.raises(UsageError, match=kind):
        Usage(**{"input": 5, "output": 5, kind: count})


@pytest.mark.parametrize("count", [True, False, 0.0, "", "3", -1])
def test_a_detail_that_is_no_count_is_refused_not_taken_for_zero(count: Any) -> None:
    with pytest.raises(UsageError, match="cache_read"):
        usage_from_metadata({"input_tokens": 9, "output_tokens": 1, "input_token_details": {"cache_read": count}})


def test_a_count_may_be_of_any_whole_kind() -> None:
    class Count(IntEnum):
        NONE = 0
        SOME = 3

    report = {"input_tokens": Count.SOME, "output_tokens": Count.NONE, "input_token_details": {"audio": Count.NONE}}
    assert usage_from_metadata(report) == Usage(3, 0)


@pytest.mark.parametrize("details", [[], "x", 7, ["cache_read"]])
def test_details_that_are_no_mapping_contradict_the_report(details: Any) -> None:
    with pytest.raises(UsageError, match="input_token_details"):
        usage_from_metadata({"input_tokens": 9, "output_tokens": 1, "input_token_details": details})
    with pytest.raises(UsageError, match="completion_tokens_details"):
        usage_from_token_usage({"prompt_tokens": 9, "completion_tokens": 1, "completion_tokens_details": details})


@pytest.mark.parametrize("report", [None, {}])
def test_no_report_is_no_usage_rather_than_zero(report: Any) -> None:
    assert usage_from_metadata(report) is None
    assert usage_from_token_usage(report) is None


def test_a_report_may_have_details_of_either_side_of_both_or_of_none() -> None:
    report = {"input_tokens": 9, "output_tokens": 8}
    inputs, outputs = {"input_token_details": {"cache_read": 3}}, {"output_token_details": {"reasoning": 2}}
    assert usage_from_metadata(report) == Usage(9, 8)
    assert usage_from_metadata(report | inputs) == Usage(9, 8, cache_read=3)
    assert usage_from_metadata(report | outputs) == Usage(9, 8, reasoning=2)
    assert usage_from_metadata(report | inputs | outputs) == Usage(9, 8, cache_read=3, reasoning=2)


@pytest.mark.parametrize(
    ("read", "input", "output"),
    [
        (usage_from_metadata, "input_tokens", "output_tokens"),
        (usage_from_token_usage, "prompt_tokens", "completion_tokens"),
    ],
)
def test_a_total_without_parts_contradicts_them_and_one_part_is_enough(read: Any, input: str, output: str) -> None:
    for parts in ({input: 0, output: 1}, {input: 1, output: 0}):
        assert read({**parts, "total_tokens": 1}).total == 1
    with pytest.raises(UsageError, match="total_tokens = 1, but input = 0 and output = 0"):
        read({input: 0, output: 0, "total_tokens": 1})


def test_a_sum_that_nobody_knows_stays_unknown() -> None:
    usage = usage_from_metadata({"input_tokens": 7})
    assert usage == Usage(7, None)
    assert usage.total is None
    assert Usage(None, 3).total is None
    assert Usage(0, 0).total == 0


def test_a_part_of_an_unknown_sum_is_refused() -> None:
    with pytest.raises(UsageError, match="more than input = None"):
        Usage(None, 3, cache_read=2)


def test_openais_service_tiers_are_added_to_the_plain_buckets() -> None:
    report = {
        "input_tokens": 100,
        "output_tokens": 20,
        "input_token_details": {"flex_cache_read": 64, "flex": 36},
        "output_token_details": {"priority_reasoning": 5, "priority": 15},
    }
    assert usage_from_metadata(report) == Usage(100, 20, cache_read=64, reasoning=5)


def test_anthropics_cache_writes_are_added_over_their_lifetimes() -> None:
    details = {"cache_read": 5, "cache_creation": 0, "ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 10}
    report = {"input_tokens": 100, "output_tokens": 1, "input_token_details": details}
    assert usage_from_metadata(report) == Usage(100, 1, cache_read=5, cache_write=40, cache_write_1h=10)


def test_openais_service_tiers_write_caches_too() -> None:
    for tier in ("", "flex_", "priority_"):
        report = {"input_tokens": 100, "output_tokens": 1, "input_token_details": {f"{tier}cache_creation": 90}}
        assert usage_from_metadata(report) == Usage(100, 1, cache_write=90)


def test_more_that_is_kept_for_an_hour_than_was_written_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="cache_write_1h = 3, which is more than cache_write = 2"):
        Usage(10, 1, cache_write=2, cache_write_1h=3)


def test_missing_and_empty_details_are_no_parts() -> None:
    report = {
        "input_tokens": 3,
        "output_tokens": 4,
        "input_token_details": None,
        "output_token_details": {"audio": None},
    }
    assert usage_from_metadata(report) == Usage(3, 4)


def test_audio_read_from_a_cache_is_counted_as_cached_once() -> None:
    parts = Usage(10, 0, cache_read=8, audio_input=6).exclusive()
    assert (parts["input"], parts["cache_read"], parts["audio_input"]) == (0, 8, 2)


def test_a_legacy_llms_report_is_read_by_openais_names() -> None:
    report = {
        "prompt_tokens": 50,
        "completion_tokens": 20,
        "total_tokens": 70,
        "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 20, "audio_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 1},
    }
    expected = Usage(50, 20, cache_read=8, cache_write=20, audio_input=2, reasoning=5, audio_output=1)
    assert usage_from_token_usage(report) == expected


def test_a_legacy_report_of_one_sum_leaves_the_other_unknown() -> None:
    assert usage_from_token_usage({"prompt_tokens": 5}) == Usage(5, None)
    assert usage_from_token_usage({"completion_tokens": 6}) == Usage(None, 6)


@pytest.mark.parametrize("report", [{"total_tokens": 7}, [], "7", 7, object()])
def test_a_legacy_report_without_openais_names_says_nothing(report: Any) -> None:
    assert usage_from_token_usage(report) is None


# -- estimates that fill what a report leaves out


@given(usages(), counts, counts)
def test_an_estimate_never_lowers_what_was_reported(usage: Usage, prompt: int, answer: int) -> None:
    full = completed(usage, Usage(prompt, answer, estimated=True))
    assert full.total is not None
    assert (full.input or 0) >= (usage.input or 0)
    assert (full.output or 0) >= (usage.output or 0)
    assert full.estimated == ((full.input, full.output) != (usage.input, usage.output))


def test_an_estimate_stands_alone_where_nothing_was_reported() -> None:
    estimate = Usage(5, 6, estimated=True)
    assert completed(None, estimate) is estimate
    assert completed(Usage(None, 4), estimate) == Usage(5, 6, estimated=True)


def test_where_nothing_came_the_estimate_adds_nothing() -> None:
    assert completed(Usage(5, 0), Usage(9, 0, estimated=True)) == Usage(5, 0)
    assert completed(Usage(5, None), Usage(9, 0, estimated=True)) == Usage(5, 0, estimated=True)


def test_content_blocks_hold_text_and_thoughts_and_whatever_else_says_nothing() -> None:
    blocks = [
        {"type": "text", "text": "Hel"},
        {"type": "thinking", "thinking": "Hm"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": ", so"}, {"text": ", then"}]},
        {"type": "reasoning", "reasoning": "."},
        {"type": "text", "text": "lo", "thinking": "no thought"},
        {"type": "image", "summary": [{"text": "nor this"}]},
        {"type": "text", "text": None},
        "bare",
    ]
    assert (text_of(blocks), thoughts_of(blocks)) == ("Hello", "Hm, so, then.")
    for nothing in (None, "Hello", [], {"type": "text", "text": "Hello"}):
        assert (text_of(nothing), thoughts_of(nothing)) == ("", "")


def test_beside_the_text_of_a_message_thoughts_and_refusals_are_charged() -> None:
    blocks = [{"type": "text", "text": "Hello"}, {"type": "thinking", "thinking": "Hm"}, {"refusal": ". No"}, "bare"]
    extra = {"reasoning_content": ", so", "refusal": " way.", "other": "x"}
    assert beside_text(AIMessage(blocks, additional_kwargs=extra)) == "Hm. No, so way."
    assert beside_text(AIMessage("Hello")) == ""
