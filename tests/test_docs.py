"""docs/api.md tells of every field that a request may have."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from penstock.serve.asks import IDLE_IN_CHATS, IDLE_IN_COMPLETIONS, ChatBody, CompletionBody

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")


def told(*verdicts: str) -> set[str]:
    """Fields of rows whose second column is one of these."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+) \|", PAGE, re.MULTILINE)
    return {field for fields, verdict in rows if verdict in verdicts for field in re.findall(r"\w+", fields)}


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_what_is_taken_is_told(body: type[msgspec.Struct]) -> None:
    assert set(body.__struct_fields__) <= told("supported", "ignored", "ours")


def test_what_is_told_is_taken() -> None:
    assert told("supported", "ignored", "ours") == {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}


def test_what_is_refused_is_told() -> None:
    assert told("refused") == {*IDLE_IN_CHATS, *IDLE_IN_COMPLETIONS}
