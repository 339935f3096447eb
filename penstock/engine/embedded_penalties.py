"""What a request and the tokens so far change about the logits: bans, biases and penalties, in vLLM's order.

bad_words, min_tokens   -inf for tokens that must not come now
logit_bias              added
repetition_penalty      logits of tokens that prompt or output have are divided by it, or multiplied if negative
frequency_penalty       taken off for each time that the output has the token
presence_penalty        taken off once if it has
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.api import Past
from penstock.request import Sampling

_KEPT_TALLIES = 512  # more than sequences run at a time

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Tally:
    """The distinct tokens of a sequence, ascending, and how often its output has each. Kept while it grows.

    Counting all of a long context takes about a hundred times as long as counting one token more.
    """

    def __init__(self, past: Past) -> None:
        self.past = past
        self.ids: Ints
        self.counts: Floats  # 0 for a token of the prompt alone
        tokens = np.array(past.tokens, np.int64)
        self.ids, indices = np.unique(tokens, return_inverse=True)
        self.counts = np.bincount(indices[past.prompt_tokens :], minlength=len(self.ids)).astype(np.float32)
        self._counted = len(tokens)

    def catch_up(self) -> None:
        """Counts what was sampled since."""
        for token in self.past.tokens[self._counted :]:
            at = int(self.ids.searchsorted(token))
            if at == len(self.ids) or self.ids[at] != token:
                self.ids = np.insert(self.ids, at, token)
                self.counts = np.insert(self.counts, at, 0)
            self.counts[at] += 1
            self._counted += 1


class Penalties:
    """Applies all of the above, and keeps the tallies of the sequences that were penalized last."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos = tuple(eos_token_ids)
        self._tallies: dict[str, Tally] = {}  # by sequence, the least recently used first

    def are_due(self, sampling: Sampling, past: Past) -> bool:
        """Whether `apply` would change anything for this token."""
        return (
            _penalizes(sampling) or bool(sampling.logit_bias) or bool(sampling.bad_words) or _is_short(sampling, past)
        )

    def apply(self, logits: Tensor, rows: Sequence[tuple[Sampling, Past]]) -> None:
        """Changes `logits` [rows, vocabulary], float32, in place. A row may end up with no token left."""
        self._ban(logits, rows)
        _add_biases(logits, [sampling for sampling, _ in rows])
        penalized = [(row, sampling, past) for row, (sampling, past) in enumerate(rows) if _penalizes(sampling)]
        if penalized:
            _penalize(logits, [(row, sampling, self._tally(past)) for row, sampling, past in penalized])

    def _ban(self, logits: Tensor, rows: Sequence[tuple[Sampling, Past]]) -> None:
        for row, (sampling, past) in enumerate(rows):
            banned = [*_ends_of_bad_words(sampling, past), *self._early_ends(sampling, past)]
            if banned := _known(banned, logits):
                logits[row, banned] = -torch.inf

    def _early_ends(self, sampling: Sampling, past: Past) -> tuple[int, ...]:
        """Tokens that would end the output before it has its `min_tokens`."""
        if not _is_short(sampling, past):
            return ()
        return sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *self._eos)

    def _tally(self, past: Past) -> Tally:
        tally = self._tallies.pop(past.sequence, None)
        if tally is None or tally.past is not past:
            tally = Tally(past)
        tally.catch_up()
        self._tallies[past.sequence] = tally
        if len(self._tallies) > _KEPT_TALLIES:
            del self._tallies[next(iter(self._tallies))]
        return tally


def _penalizes(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


def _is_short(sampling: Sampling, past: Past) -> bool:
    return sampling.min_tokens > len(past.tokens) - past.prompt_tokens


def _ends_of_bad_words(sampling: Sampling, past: Past) -> Iterator[int]:
    """Of those whose other tokens are what the output ends with."""
    output_tokens = len(past.tokens) - past.prompt_tokens
    for *head, last in filter(None, sampling.bad_words):
        if not head or (len(head) <= output_tokens and past.tokens[-len(head) :].tolist() == head):
            yield last


def _known(tokens: Sequence[int], logits: Tensor) -> list[int]:
    """Those that there are logits of."""
    return [token for token in tokens if 0 <= token < logits.shape[-1]]


def _add_biases(logits: Tensor, samplings: Sequence[Sampling]) -> None:
    for row, sampling in enumerate(samplings):
        if biases := {token: bias for token, bias in sampling.logit_bias if 0 <= token < logits.shape[-1]}:
            logits[row, list(biases)] += logits.new_tensor(list(biases.values()))


def _penalize(logits: Tensor, penalized: Sequence[tuple[int, Sampling, Tally]]) -> None:
    """Touches the tokens that the sequences have, of all rows at once."""
    sizes = [len(tally.ids) for _, _, tally in penalized]
    rows = np.repeat([row for row, _, _ in penalized], sizes)
    index = (_tensor(rows, logits), _tensor(np.concatenate([tally.ids for _, _, tally in penalized]), logits))
    factors = np.repeat(np.array([s.repetition_penalty for _, s, _ in penalized], np.float32), sizes)
    amounts = np.concatenate(
        [s.frequency_penalty * t.counts + s.presence_penalty * (t.counts > 0) for _, s, t in penalized]
    ).astype(np.float32)
    factor, amount, values = _tensor(factors, logits), _tensor(amounts, logits), logits[index]
    logits[index] = torch.where(values > 0, values / factor, values * factor) - amount


def _tensor(numbers: Ints | Floats, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device)
