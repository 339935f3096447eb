"""How long it takes to move KV: a fixed part, a part for each descriptor, and a part for each byte.

    seconds = start_s + descriptor_s * descriptors + byte_s * bytes

A block-major layout needs one descriptor for each run of neighbouring blocks; others need blocks x layers x 2. What a
path can do belongs to the topology: `over` makes a prior of it.
"""

from __future__ import annotations

import math

import msgspec

from penstock.policy.latency.fit import MEMORY, NOISE, Estimate, Line, OnlineFit, believe

DRIFT = math.log(2)  # by which the last transfers may be off
DRIFT_GAIN = 0.5
LEAST_PRICE = 1e-15  # of what came out free
DOUBT = 0.5  # how far off a data sheet may be: links come to 0.7 of it alone, and are shared


class TransferModel(msgspec.Struct, frozen=True):
    """Seconds of a transfer. `line` has the prices of the parts above, in this order."""

    line: Line

    def seconds(self, size_bytes: float, descriptors: int = 1) -> float:
        """Never falls when more is moved."""
        return self.line.seconds((1, descriptors, size_bytes))

    def estimate(self, size_bytes: float, descriptors: int = 1) -> Estimate:
        return self.line.estimate((1, descriptors, size_bytes))


def over(start_s: float, descriptor_s: float, bytes_per_s: float, doubt: float = DOUBT) -> TransferModel:
    """A path that takes `start_s` for nothing at all and moves `bytes_per_s` over all its rails together.

    Raises ValueError unless all are positive.
    """
    return TransferModel(believe((start_s, descriptor_s, 1 / bytes_per_s), doubt))


class TransferFit:
    """One worker's own transfers over paths of one kind. Owned by whoever moves KV.

    A fit takes what is far off for an outlier. Here it may as well be a path that is nothing like its prior, or has
    changed: where the last transfers were off by a factor, all prices are taken times that, and fitted from there.
    """

    def __init__(self, prior: TransferModel, memory: float = MEMORY) -> None:
        self._fit = OnlineFit(prior.line, memory)
        self._memory = memory
        self._drift = 0.0  # log of measured over expected, of the last few

    def observe(self, size_bytes: float, descriptors: int, seconds: float) -> None:
        """Raises ValueError for a time that is negative or no number."""
        if seconds > 0:
            off = math.log(seconds / self._fit.recall((1, descriptors, size_bytes)))
            self._drift += DRIFT_GAIN * (off - self._drift)
            if abs(self._drift) > DRIFT:
                self._start_again(math.exp(self._drift))
        self._fit.observe((1, descriptors, size_bytes), seconds)

    def seconds(self, size_bytes: float, descriptors: int = 1) -> float:
        """What is believed now; see `TransferModel`."""
        return self._fit.seconds((1, descriptors, size_bytes))

    def _start_again(self, times: float) -> None:
        prices = tuple(max(price * times, LEAST_PRICE) for price in self._fit.prices)
        self._fit, self._drift = OnlineFit(believe(prices, DOUBT), self._memory), 0.0

    @property
    def model(self) -> TransferModel:
        """What is believed now: to predict with, and to report."""
        return TransferModel(self._fit.line)


# vLLM with Mooncake, Qwen3-8B from 8 GPUs to 8 over 8 x 400G RoCE: 20 MB 0.54 ms, 146 MB 1.50 ms, 1.13 GB 8.84 ms,
# 4.5 GB 31.65 ms. The fit is t = 0.42 ms + bytes / 146 GB/s, descriptors within it.
MOONCAKE_8X400G = over(0.42e-3, 1e-9, 146e9, doubt=NOISE)
# NIXL over UCX 1.18 inside an H100 node, READ of many blocks: 64, 128, 256 KiB come to 5.2, 10.3, 19.9 GB/s.
NIXL_H100_READ = over(17e-6, 12.3e-6, 300e9, doubt=NOISE)
