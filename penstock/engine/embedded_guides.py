"""Guided decoding: which tokens may follow in each row of a step's logits.

A matcher's state is a function of its guide and the output so far. Matchers are kept by sequence and advanced by what
they have not seen yet; after a move, a preemption or a first token that another worker sampled, a new one catches up.
The end of the output (EOS) is allowed once the guide is fulfilled, and alone once nothing can follow.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from penstock.engine.api import Past, SequencesFailed
from penstock.errors import BadRequest, PenstockError, Unsupported
from penstock.grammar import compile_guide, raise_error_of
from penstock.request import Guide, Sampling
from penstock.tokens import Tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

K = TypeVar("K")
V = TypeVar("V")

_COMPILED = 64  # guides kept, beside those in a step; one that fills its lexer takes about 20 MB
_FOLLOWED = 1024  # sequences whose matchers are kept, more than run at a time

Words = npt.NDArray[np.int32]  # of 32 tokens each, a bit for each token


def read_tokenizer(model: str, vocabulary: int, eos_token_ids: Sequence[int]) -> LLTokenizer | None:
    """The tokens of a model folder or hub id as bytes; None if guides cannot be followed with that model.

    Special tokens, and ids that the tokenizer does not know, are no text. Takes half a second for 128k tokens.
    """
    if not eos_token_ids:
        return None
    try:
        path = cached_file(model, "tokenizer.json")
        if path is None:
            return None
        tokenizer = _tokenizer(Path(path).read_text("utf-8"), vocabulary, list(eos_token_ids))
    except (OSError, ValueError):  # there is none, or it is of a kind that the library cannot take apart
        return None
    # Where an EOS is text as well, one inside of a string would be taken for the end.
    return tokenizer if all(map(tokenizer.is_special_token, eos_token_ids)) else None


def _tokenizer(text: str, vocabulary: int, eos_token_ids: list[int]) -> LLTokenizer:
    """Of as many tokens as the model has, or as the tokenizer names, if that is more. Raises ValueError."""
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(text, n_vocab=vocabulary, eos_token=eos_token_ids)
    except ValueError:  # perhaps since it names more
        return LLTokenizer(text, eos_token=eos_token_ids)


@dataclass(frozen=True, slots=True)
class Mask:
    """What must not follow in the guided rows of a step's logits."""

    rows: Tensor
    banned: Tensor  # bool [rows, vocabulary], not all of a row

    def apply(self, logits: Tensor, own: Tensor) -> Tensor:
        """A copy of `logits` [all rows, vocabulary] with -inf for what is banned.

        Where that leaves nothing, because min_tokens or bad words had ruled out the rest, the guide comes first: such a
        row gets the model's `own` logits for what it may have.
        """
        guided = logits[self.rows].masked_fill_(self.banned, -torch.inf)
        empty = guided.amax(-1) == -torch.inf
        if empty.any():
            guided[empty] = own[self.rows[empty]].masked_fill_(self.banned[empty], -torch.inf)
        return logits.index_copy(0, self.rows, guided)


@dataclass(slots=True)
class _Followed:
    """One sequence's matcher, which shares the lexer of the compiled one, and the output that it has taken in."""

    guide: Guide
    compiled: LLMatcher
    matcher: LLMatcher
    output: Tokens = field(default_factory=lambda: array("I"))
    is_ended: bool = False  # by an EOS; what follows, with ignore_eos, is free

    def fits(self, guide: Guide, output: Tokens) -> bool:
        return self.guide == guide and self.output == output[: len(self.output)]

    def advance(self, output: Tokens, eos: Sequence[int]) -> None:
        """Takes in the rest of `output`. Raises BadRequest if the guide does not allow it, or gives up."""
        for token in output[len(self.output) :]:
            self.output.append(token)
            self.is_ended = self.is_ended or token in eos
            if not self.is_ended and not self.matcher.consume_token(token):
                raise_error_of(self.matcher)


class Guides:
    """The guides of the sequences of one engine. Used from one thread."""

    def __init__(self, tokenizer: LLTokenizer | None) -> None:
        """`tokenizer` as `read_tokenizer` gave it; without one every guide is refused."""
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()  # at the start; copies share a lexer
        self._followed: OrderedDict[str, _Followed] = OrderedDict()
        self._present: frozenset[str] = frozenset()  # sequences of this step

    def mask(self, rows: Sequence[tuple[Sampling, Past]], logits: Tensor) -> Mask | None:
        """For the rows of `logits`, by what is asked and what comes before; None if no guide binds any of them.

        Raises SequencesFailed for guides that cannot be followed.
        """
        guided = [(row, s.guide, past) for row, (s, past) in enumerate(rows) if s.guide is not None]
        if not guided:
            return None
        self._present = frozenset(past.sequence for _, _, past in guided)
        allowed: dict[int, Words] = {}
        failed: dict[str, PenstockError] = {}
        for row, guide, past in guided:
            try:
                if (words := self._follow(past, guide)) is not None:
                    allowed[row] = words
            except PenstockError as error:
                failed[past.sequence] = error
        if failed:
            raise SequencesFailed(failed)
        return _unpack(allowed, logits) if allowed else None

    def _follow(self, past: Past, guide: Guide) -> Words | None:
        """The tokens that may follow, None if all may. Raises BadRequest, Unsupported."""
        if self._tokenizer is None:
            raise Unsupported("this model's tokenizer cannot be guided")
        try:
            return self._next(past, guide, self._tokenizer)
        except BadRequest:
            # Its matcher shares a lexer with all others of the guide, which together may have filled it: begin again.
            self._compiled.pop(guide, None)
            return self._next(past, guide, self._tokenizer)

    def _next(self, past: Past, guide: Guide, tokenizer: LLTokenizer) -> Words | None:
        """What may follow `past`. Raises BadRequest; the sequence's matcher is then forgotten."""
        output = past.output
        followed = self._followed.pop(past.sequence, None)
        if followed is None or not followed.fits(guide, output):
            compiled = self._compile(guide, tokenizer)
            followed = _Followed(guide, compiled, compiled.deep_copy())
        followed.advance(output, tokenizer.eos_tokens)
        words = None
        if not followed.is_ended:
            words = np.frombuffer(followed.matcher.compute_bitmask(), np.int32)
            raise_error_of(followed.matcher)
        _keep(self._followed, past.sequence, followed, _FOLLOWED)
        return words

    def _compile(self, guide: Guide, tokenizer: LLTokenizer) -> LLMatcher:
        compiled = self._compiled.pop(guide, None)
        if compiled is None:
            compiled = compile_guide(guide, tokenizer)
            self._forget_strays()
        _keep(self._compiled, guide, compiled, _COMPILED)
        return compiled

    def _forget_strays(self) -> None:
        """Lets go of matchers that alone keep a lexer, of sequences that are not in this step: most have ended."""
        strays = [
            name
            for name, followed in self._followed.items()
            if name not in self._present and self._compiled.get(followed.guide) is not followed.compiled
        ]
        for name in strays:
            del self._followed[name]


def _unpack(allowed: dict[int, Words], logits: Tensor) -> Mask:
    words = np.stack(list(allowed.values()))
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[-1], bitorder="little")
    bits ^= 1
    banned = torch.from_numpy(bits.view(np.bool_))
    return Mask(torch.tensor(list(allowed), device=logits.device), banned.to(logits.device))


def _keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """As the one used last; lets go of the one used longest ago."""
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
