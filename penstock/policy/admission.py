"""Whether a request may go to the workers, must wait for that, or had better be told at once to come later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.policy.forecast import Forecast

OWN_SHARE = 0.5  # of the objective: a prompt that alone takes longer than that has an objective of its own
AIM = 0.95  # of the objective: forecasts are off by a few percent
LEARNED_FROM = 50  # requests, about, that tell how far forecasts are off
MOST_SLOWED = 4.0


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What requests are admitted for: `ttft_s` from arrival to the first token. Infinite: whatever comes may go.

    A request that is predicted to take more than `patience` times that is refused; at most `max_queued` wait. Tenants
    share what there is by `weights`, 1 where nothing is said.
    """

    ttft_s: float = math.inf
    patience: float = 1.0
    max_queued: int = 256
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_limited(self) -> bool:
        return self.ttft_s < math.inf

    def objective_s(self, seen: Forecast) -> float:
        """`ttft_s`, but twice its own time for a prompt that takes longer than half of it on idle workers."""
        return max(self.ttft_s, seen.own_s / OWN_SHARE)

    def limit_s(self, seen: Forecast) -> float:
        """Seconds after its arrival by which the first token is to be expected."""
        return AIM * self.patience * self.objective_s(seen)

    def may_go(self, seen: Forecast) -> bool:
        """Whether the queue at the workers is short enough.

        Half of the time that can be waited is waited there, so that no worker runs dry before its next report; the
        other half here, where the order is fair and can still change.
        """
        return seen.first_s <= (self.objective_s(seen) + seen.own_s) / 2


def expected_s(seen: Forecast, tokens_ahead: float) -> float:
    """Seconds until the first token of a request that comes now and lets `tokens_ahead` go before it."""
    return seen.first_s + tokens_ahead / seen.tokens_per_s


class Calibration:
    """How many times as long as foreseen first tokens take: forecasts know nothing of what steps of decoding cost.

    Sums of both, so that long waits count for more; what is long ago fades. Owned by one router's admission.
    """

    def __init__(self) -> None:
        self._foreseen_s = 1.0
        self._took_s = 1.0

    def note(self, foreseen_s: float, took_s: float) -> None:
        """One request's first token came."""
        fade = 1 - 1 / LEARNED_FROM
        self._foreseen_s = fade * self._foreseen_s + foreseen_s
        self._took_s = fade * self._took_s + took_s

    def corrected(self, seen: Forecast) -> Forecast:
        """Never to less than was foreseen: workers that do better are found out by their reports."""
        slowed = min(max(self._took_s / self._foreseen_s, 1.0), MOST_SLOWED)
        return Forecast(slowed * seen.first_s, slowed * seen.own_s, seen.tokens, seen.tokens_per_s / slowed)
