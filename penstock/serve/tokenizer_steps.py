"""A tokenizer's parts as the steps that tokenizer.json writes. Used by `text`, `pieces` and `detokenizer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

Step: TypeAlias = Mapping[str, Any]  # "type", and what such a step is told

_MEMBERS = ("normalizers", "pretokenizers", "processors", "decoders")  # what sequences of each kind call their steps


class Part(Protocol):
    """A normalizer, pre-tokenizer, post-processor or decoder of the tokenizers library."""

    def __getstate__(self) -> Any: ...


def steps_of(part: Part | None) -> list[Step]:
    """In order, sequences opened."""
    return [] if part is None else _opened(json.loads(part.__getstate__()))


def _opened(step: Step) -> list[Step]:
    if step["type"] != "Sequence":
        return [step]
    return [one for name in _MEMBERS for inner in step.get(name, ()) for one in _opened(inner)]
