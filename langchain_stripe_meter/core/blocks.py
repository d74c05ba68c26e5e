"""The text in content blocks, as the providers' messages carry them: plain mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def _mappings(blocks: Any) -> list[Mapping[str, Any]]:
    return [block for block in blocks if isinstance(block, Mapping)] if isinstance(blocks, list) else []
