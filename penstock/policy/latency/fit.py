"""Times that are sums of parts: each part's price is never negative, and is learned from what was measured.

    seconds = price[0] * amount[0] + price[1] * amount[1] + ...

`fit_line` learns prices from a batch; `OnlineFit` starts from a prior and learns from one measurement at a time. Both
weigh relative errors, so that a step of 2 ms counts as much as one of 200 ms, and pass over outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from penstock.policy.latency.algebra import Matrix, Rows, dot, frozen, inverse, scaled, solve_nonnegative, times

NOISE = 0.1  # relative scatter of single measurements, until they have shown their own
LEAST_NOISE = 0.01  # below it a handful of measurements would seem to know everything
OUTLIER = 3.0  # in units of the scatter: what lies further off counts in proportion less
FADE = 100  # measurements, of whatever kind, after which a prior has lost 63 % of its weight
LEAST_FADE = 1e-6  # it never vanishes: it still decides what no measurement does
MEMORY = 100  # measurements of a kind after which an old one has lost 63 % of its weight
_NOISE_GAIN = 0.05
_SURPRISE = 1.0  # a measurement counts as at most this many times (plus one) what was predicted
_SOLVE_EVERY = 16  # measurements between solutions that are only needed to tell outliers
_SETTLED = 10  # measurements before which an error is the prior's, and says nothing about scatter
_PASSES = 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """`error_s` is how far off the prediction may be, `scatter_s` how far single measurements lie from the truth.

    Both are one standard deviation.
    """

    seconds: float
    error_s: float
    scatter_s: float


class Line(msgspec.Struct, frozen=True):
    """Prices, and how well they are known. Small enough to be part of a worker's report.

    `covariance` holds the rows of the prices' covariance matrix, `noise` the relative scatter of measurements, and
    `observations` how many of them were seen.
    """

    prices: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    noise: float = NOISE
    observations: int = 0

    def seconds(self, amounts: Sequence[float]) -> float:
        return sum(price * amount for price, amount in zip(self.prices, amounts, strict=True))

    def estimate(self, amounts: Sequence[float]) -> Estimate:
        seconds = self.seconds(amounts)
        variance = dot(amounts, times(self.covariance, amounts))
        return Estimate(seconds, math.sqrt(max(0.0, variance)), self.noise * seconds)


def believe(prices: Sequence[float], doubt: float, slack: Sequence[float] | None = None) -> Line:
    """A prior: `prices` as somebody else says, every prediction from which may be off by the fraction `doubt`.

    Half of that variance is common to all prices (the device is slower than thought), half is each price's own. Each
    price may be off by `slack` beside, however small it is. Raises ValueError for a price that could never be learned.
    """
    slack = slack or [0.0] * len(prices)
    half = doubt * doubt / 2
    rows = [[half * a * b for b in prices] for a in prices]
    for i, (price, more) in enumerate(zip(prices, slack, strict=True)):
        rows[i][i] += half * price * price + more * more
    if min(prices) < 0 or min(row[i] for i, row in enumerate(rows)) <= 0:
        raise ValueError(f"prices {tuple(prices)} must be positive or have slack, and doubt {doubt} be positive")
    return Line(tuple(prices), frozen(rows))


def fit_line(rows: Rows, seconds: Sequence[float]) -> Line:
    """The prices at which the amounts in `rows` come closest to `seconds`, by relative error.

    Least squares, weights of outliers reduced (Huber) until they settle. A part that no row has any of gets price 0.
    Raises ValueError for no rows, or for times that are not positive.
    """
    if not rows or min(seconds) <= 0:
        raise ValueError("a fit needs measurements, and each must have taken some time")
    scale = [1 / (max(abs(row[i]) for row in rows) or 1.0) for i in range(len(rows[0]))]
    shares = [
        [amount * unit / taken for amount, unit in zip(row, scale, strict=True)]
        for row, taken in zip(rows, seconds, strict=True)
    ]
    weights, noise = [1.0] * len(rows), NOISE
    for _ in range(_PASSES):
        information = _information(shares, weights)
        evidence = [dot(weights, column) for column in zip(*shares, strict=True)]
        solution = solve_nonnegative(information, evidence)
        errors = [abs(1 - dot(share, solution)) for share in shares]
        noise = max(LEAST_NOISE, 1.48 * sorted(errors)[len(errors) // 2])
        weights = [_trust(error, noise) for error in errors]
    covariance = [[noise * noise * entry for entry in row] for row in inverse(information)]
    prices = tuple(part * unit for part, unit in zip(solution, scale, strict=True))
    return Line(prices, scaled(covariance, scale), noise, len(rows))


class OnlineFit:
    """Starts from a prior and believes its own measurements more the more of them it has.

    The prior counts as measurements whose weight fades; it goes on deciding what they leave open. An old measurement is
    forgotten as new ones of the same kind come in, and no sooner: an hour of decode steps says nothing about prefill,
    so it erases nothing about it (directional forgetting, Cao and Schwartz, Automatica 36, 2000). A measurement costs
    O(parts^2), a look at `line` O(parts^3).
    """

    def __init__(self, prior: Line, memory: float = MEMORY) -> None:
        self._scale = [math.sqrt(row[i]) for i, row in enumerate(prior.covariance)]
        units = [1 / scale for scale in self._scale]
        self._solution = [price * unit for price, unit in zip(prior.prices, units, strict=True)]
        information = inverse(scaled(prior.covariance, units))
        self._prior = _Evidence(information, times(information, self._solution))
        self._seen = _Evidence([[0.0 for _ in units] for _ in units], [0.0 for _ in units])
        self._noise = prior.noise
        self._forget = 1 / memory
        self._observations = 0
        self._unsolved = 0

    def observe(self, amounts: Sequence[float], seconds: float) -> None:
        """Learns that `amounts` took `seconds`. Raises ValueError for a time that is negative or no number."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a step cannot take {seconds} s")
        share = [amount * scale for amount, scale in zip(amounts, self._scale, strict=True)]
        predicted = dot(share, self._solution)
        unit = max(predicted, seconds / (1 + _SURPRISE))
        if unit <= 0:  # nothing was to be done, and it took no time
            return
        share = [part / unit for part in share]
        error = abs(seconds - predicted) / unit
        trust = _trust(error, self._noise)
        self._seen.forget(share, self._forget * trust)
        self._seen.add(share, seconds / unit, trust)
        self._observations += 1
        if self._observations > _SETTLED:
            self._learn_noise(error)
        self._unsolved += 1
        if self._unsolved >= min(self._observations, _SOLVE_EVERY):
            self._solve()

    @property
    def observations(self) -> int:
        return self._observations

    @property
    def line(self) -> Line:
        """What is believed now."""
        covariance = scaled(inverse(self._known(fade=1).information), self._scale)
        return Line(self.prices, covariance, self._noise, self._observations)

    @property
    def prices(self) -> tuple[float, ...]:
        """Those of `line`, for who need not know how sure they are: much cheaper."""
        if self._unsolved:
            self._solve()
        return tuple(part * scale for part, scale in zip(self._solution, self._scale, strict=True))

    def seconds(self, amounts: Sequence[float]) -> float:
        """What `line` says of these."""
        return dot(self.prices, amounts)

    def recall(self, amounts: Sequence[float]) -> float:
        """Seconds as of the last solution, at most `_SOLVE_EVERY` measurements ago: it tells outliers, and is free."""
        return sum(
            part * scale * amount for part, scale, amount in zip(self._solution, self._scale, amounts, strict=True)
        )

    def _learn_noise(self, error: float) -> None:
        """A running mean of absolute errors, outliers cut; 1.25 of it is a standard deviation (Gauss)."""
        cut = min(error, (OUTLIER + 1) * self._noise)
        self._noise = max(LEAST_NOISE, self._noise + _NOISE_GAIN * (1.25 * cut - self._noise))

    def _known(self, fade: float) -> _Evidence:
        """The prior, times `fade`, and the measurements, each worth the more the less they scatter."""
        return self._prior.weighted(fade).plus(self._seen.weighted(1 / (self._noise * self._noise)))

    def _solve(self) -> None:
        known = self._known(max(LEAST_FADE, math.exp(-self._observations / FADE)))
        self._solution = solve_nonnegative(known.information, known.pull)
        self._unsolved = 0


@dataclass(slots=True)
class _Evidence:
    """What is known about x: the x that fits best solves `information` x = `pull`."""

    information: Matrix
    pull: list[float]

    def add(self, share: Sequence[float], target: float, weight: float) -> None:
        """That share'x was found to be `target`."""
        for row, part in zip(self.information, share, strict=True):
            for j, other in enumerate(share):
                row[j] += weight * part * other
        self.pull = [pull + weight * part * target for pull, part in zip(self.pull, share, strict=True)]

    def forget(self, share: Sequence[float], fraction: float) -> None:
        """Takes the `fraction` of what is known about share'x away, and nothing of what is known beside it."""
        known = times(self.information, share)
        total = dot(share, known)
        if total <= 0:
            return
        taken = fraction / total
        along = taken * dot(share, self.pull)
        for row, part in zip(self.information, known, strict=True):
            for j, other in enumerate(known):
                row[j] -= taken * part * other
        self.pull = [pull - along * part for pull, part in zip(self.pull, known, strict=True)]

    def weighted(self, weight: float) -> _Evidence:
        information = [[weight * entry for entry in row] for row in self.information]
        return _Evidence(information, [weight * pull for pull in self.pull])

    def plus(self, other: _Evidence) -> _Evidence:
        rows = zip(self.information, other.information, strict=True)
        information = [[a + b for a, b in zip(*pair, strict=True)] for pair in rows]
        return _Evidence(information, [a + b for a, b in zip(self.pull, other.pull, strict=True)])


def _information(shares: Rows, weights: Sequence[float]) -> Matrix:
    columns = list(zip(*shares, strict=True))
    weighted = [[w * part for w, part in zip(weights, column, strict=True)] for column in columns]
    return [[dot(left, right) for right in columns] for left in weighted]


def _trust(error: float, noise: float) -> float:
    """Huber's weight: 1 for what scatter explains."""
    return 1.0 if error <= OUTLIER * noise else OUTLIER * noise / error
