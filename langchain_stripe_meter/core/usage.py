"""What a run consumed, as inclusive buckets: ``cache_read`` is a part of ``input``, ``reasoning`` of ``output``.

The shapes are those of LangChain's ``UsageMetadata`` (``input_token_details`` and ``output_token_details`` are
parts of ``input_tokens`` and ``output_tokens``). Unknown is ``None``, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langchain_stripe_meter.core.values import shown, valueclass
from langchain_stripe_meter.errors import UsageError

INPUT_PARTS = ("cache_read", "cache_write", "audio_input")
OUTPUT_PARTS = ("reasoning", "audio_output")
KINDS = ("input", "output", *INPUT_PARTS, *OUTPUT_PARTS)
"""The kinds of tokens that a meter can weigh or price."""

_CACHE_READ = ("cache_read", "flex_cache_read", "priority_cache_read")
_CACHE_WRITE_1H = ("ephemeral_1h_input_tokens",)
_CACHE_WRITE = (
    "cache_creation", "flex_cache_creation", "priority_cache_creation", "ephemeral_5m_input_tokens", *_CACHE_WRITE_1H,
)  # fmt: skip
_REASONING = ("reasoning", "flex_reasoning", "priority_reasoning")


@valueclass
class Usage:
    """Tokens of one model call, in inclusive buckets.

    ``input`` and ``output`` are full sums, ``None`` where nobody knows; the other buckets are parts of them, and
    ``cache_write_1h`` is the part of ``cache_write`` that is kept for an hour, at a price of its own (Anthropic).
    ``estimated`` marks numbers that no provider reported.
    """

    input: int | None
    output: int | None
    cache_read: int = 0
    cache_write: int = 0
    audio_input: int = 0
    reasoning: int = 0
    audio_output: int = 0
    estimated: bool = False
    cache_write_1h: int = 0

    def __post_init__(self) -> None:
        parts = (self.cache_read, self.cache_write, self.audio_input, self.reasoning, self.audio_output)
        for count in (self.input, self.output, *parts, self.cache_write_1h):
            if type(count) is not int or count < 0:
                self._check_counts(parts)
        if not any(parts) and not self.cache_write_1h:
            return
        # Cached audio is counted by both details, so each bucket of input is held against the sum by itself.
        _check_part("cache_read + cache_write", self.cache_read + self.cache_write, "input", self.input)
        _check_part("cache_write_1h", self.cache_write_1h, "cache_write", self.cache_write)
        _check_part("audio_input", self.audio_input, "input", self.input)
        _check_part("reasoning + audio_output", self.reasoning + self.audio_output, "output", self.output)

    def _check_counts(self, parts: tuple[object, ...]) -> None:
        for kind, count in zip(KINDS, (self.input, self.output, *parts), strict=True):
            _check_count(kind, count)
        _check_count("cache_write_1h", self.cache_write_1h)

    @property
    def total(self) -> int | None:
        """Input and output together; ``None`` unless both are known."""
        return None if self.input is None or self.output is None else self.input + self.output

    def exclusive(self) -> dict[str, int]:
        """The same tokens cut into parts that do not overlap and add up to ``total``.

        Audio that was read from a cache counts as cached, so that no token is counted twice.
        """
        fresh = (self.input or 0) - self.cache_read - self.cache_write
        audio = min(self.audio_input, fresh)
        return {
            "input": fresh - audio,
            "cache_read": self.cache_read,
            "cache_write": self.cache_write,
            "audio_input": audio,
            "output": (self.output or 0) - self.reasoning - self.audio_output,
            "reasoning": self.reasoning,
            "audio_output": self.audio_output,
        }


def completed(reported: Usage | None, estimated: Usage) -> Usage:
    """What was reported, with the estimate where it is silent, or where a broken-off report falls short of what came.

    A report of no input at all is silence too: some gateways leave it out of a stream, and no prompt costs nothing.
    """
    if reported is None:
        return estimated
    output = max(reported.output or 0, estimated.output or 0)
    usage = replace(reported, input=reported.input or estimated.input, output=output)
    return usage if usage == reported else replace(usage, estimated=True)


def usage_from_metadata(report: Mapping[str, Any] | None) -> Usage | None:
    """Read LangChain's ``usage_metadata``; ``None`` where nothing was reported at all.

    OpenAI's service tiers prefix the details (``flex_cache_read``), Anthropic splits cache writes by lifetime;
    both are added up. Raises ``UsageError`` where the parts exceed their sum, or there is a total of neither input
    nor output, and names the numbers.
    """
    if not report:
        return None
    sent, came = report.get("input_tokens"), report.get("output_tokens")
    if not sent and not came:
        _check_total(report, sent, came)
    if report.get("input_token_details") is None and report.get("output_token_details") is None:
        return Usage(sent, came)
    inputs, outputs = _details(report, "input_token_details"), _details(report, "output_token_details")
    return Usage(
        input=sent,
        output=came,
        cache_read=_sum(inputs, _CACHE_READ),
        cache_write=_sum(inputs, _CACHE_WRITE),
        cache_write_1h=_sum(inputs, _CACHE_WRITE_1H),
        audio_input=_sum(inputs, ("audio",)),
        reasoning=_sum(outputs, _REASONING),
        audio_output=_sum(outputs, ("audio",)),
    )


def usage_from_token_usage(report: Mapping[str, Any] | None) -> Usage | None:
    """Read the ``llm_output["token_usage"]`` of a legacy LLM (OpenAI's names)."""
    if not isinstance(report, Mapping) or ("prompt_tokens" not in report and "completion_tokens" not in report):
        return None
    sent, came = report.get("prompt_tokens"), report.get("completion_tokens")
    if not sent and not came:
        _check_total(report, sent, came)
    prompt = _details(report, "prompt_tokens_details")
    completion = _details(report, "completion_tokens_details")
    return Usage(
        input=sent,
        output=came,
        cache_read=_sum(prompt, ("cached_tokens",)),
        cache_write=_sum(prompt, ("cache_write_tokens",)),
        audio_input=_sum(prompt, ("audio_tokens",)),
        reasoning=_sum(completion, ("reasoning_tokens",)),
        audio_output=_sum(completion, ("audio_tokens",)),
    )


_NOTHING: Mapping[str, Any] = {}


def _details(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    details = report.get(key)
    if details is None:
        return _NOTHING
    if not isinstance(details, Mapping):
        raise UsageError(f"The provider reported {key} as {type(details).__name__}, not as counts by name.")
    return details


def _sum(details: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    total = 0
    for key in keys:
        count = details.get(key)
        if count is None:
            continue
        if type(count) is not int or count < 0:
            _check_count(key, count)
        total += count
    return total


def _check_count(kind: str, count: object) -> None:
    if count is None and kind in ("input", "output"):
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        what = shown(count) if isinstance(count, int | float) else f"a {type(count).__name__}"  # text may be anything
        raise UsageError(f"The provider reported {kind} = {what}; a token count is a whole number from 0 up.")


def _check_total(report: Mapping[str, Any], input: object, output: object) -> None:
    """Something was consumed, and not said what. (A total that differs from its parts says less: integrations count
    caches and thoughts in different ways.)"""
    total = report.get("total_tokens")
    if isinstance(total, int | float) and total > 0:
        raise UsageError(
            f"The provider reported total_tokens = {shown(total)}, but input = {input!r} and output = {output!r}."
        )


def _check_part(name: str, part: int, whole_name: str, whole: int | None) -> None:
    if part > (whole or 0):
        raise UsageError(f"The provider reported {name} = {part}, which is more than {whole_name} = {whole}.")


# -- the text in content blocks, as the providers' messages carry them: plain mappings

_THOUGHTS = ("thinking", "reasoning")


def text_of(blocks: Any) -> str:
    """The text of content blocks."""
    return "".join(str(block.get("text") or "") for block in _mappings(blocks))


def thoughts_of(blocks: Any) -> str:
    """What a model thought before it answered, which its provider charges as output: Anthropic's blocks, OpenAI's
    summaries, and LangChain's own."""
    found = (block.get(key) or text_of(block.get("summary")) for block in _mappings(blocks) for key in _THOUGHTS
             if block.get("type") == key)  # fmt: skip
    return "".join(map(str, found))


def beside_text(message: Any) -> str:
    """What a message, or a piece of one, holds beside its text that is charged as output: thoughts, and a refusal."""
    blocks, extra = message.content, message.additional_kwargs
    said = thoughts_of(blocks) + "".join(str(block.get("refusal") or "") for block in _mappings(blocks))
    return said + "".join(str(extra.get(key) or "") for key in ("reasoning_content", "refusal"))


def _mappings(blocks: Any) -> list[Mapping[str, Any]]:
    return [block for block in blocks if isinstance(block, Mapping)] if isinstance(blocks, list) else []
