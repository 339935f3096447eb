"""What a model's authors advise where a client says nothing, from the generation_config.json of its folder.

The same fields count as in vLLM; others (`do_sample`, beams, ...) are not about how a server samples.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.errors import UnreadableModel

FEATURE_OF = {
    "temperature": "sampling",
    "top_p": "sampling",
    "top_k": "sampling",
    "min_p": "sampling",
    "repetition_penalty": "penalties",
}  # that an engine must have, by field of `request.Sampling`


class Defaults(msgspec.Struct, frozen=True):
    """Named and limited as in requests. None: the model's authors say nothing either."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None

    def sampling(self, supports: Collection[str]) -> dict[str, object]:
        """Fields of `request.Sampling`. What an engine without the feature cannot do is no default for it."""
        advised = {name: getattr(self, name) for name, feature in FEATURE_OF.items() if feature in supports}
        if self.top_k == -1:  # keeps all, as 0 does
            advised.pop("top_k", None)
        return {name: value for name, value in advised.items() if value is not None}


NO_DEFAULTS = Defaults()


def load_defaults(folder: Path) -> Defaults:
    """Of a Hugging Face model folder; NO_DEFAULTS if it has no such file. Raises UnreadableModel."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return NO_DEFAULTS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Defaults)
    except msgspec.MsgspecError as error:
        raise UnreadableModel(f"{path}: {error}; mend it, or start with --no-generation-config") from error
