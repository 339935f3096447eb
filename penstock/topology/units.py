"""Quantities as people write and read them: "36 GB/s", "400 Gb/s", "3 us", "80 GiB", "989 TF"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Kind = Literal["rate", "time", "memory", "compute"]

EXAMPLES: dict[Kind, str] = {"rate": "36 GB/s or 400 Gb/s", "time": "3 us", "memory": "80 GiB", "compute": "989 TF"}

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _with_prefixes(unit: str, worth: float = 1.0) -> dict[str, float]:
    return {prefix + unit: times * worth for prefix, times in (_PREFIXES | _BINARY).items()}


_UNITS: dict[Kind, dict[str, float]] = {
    "rate": _with_prefixes("B/s") | _with_prefixes("b/s", 1 / 8) | _with_prefixes("bit/s", 1 / 8),
    "time": _SECONDS,
    "memory": _with_prefixes("B"),
    "compute": _with_prefixes("F") | _with_prefixes("FLOPS") | _with_prefixes("FLOP/s"),
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(\S.*)?")


def parse(text: str, kind: Kind) -> float:
    """In bytes per second, seconds, bytes, or operations per second. Raises ValueError that says what to write."""
    match = _QUANTITY.fullmatch(text.strip())
    unit = match and (match[2] or "").strip()
    if match is None or unit not in _UNITS[kind]:
        raise ValueError(f"{text!r} is not a {kind}: write a number and a unit, such as {EXAMPLES[kind]}")
    return float(match[1]) * _UNITS[kind][unit]


def rate(bytes_per_s: float) -> str:
    return _scaled(bytes_per_s, "B/s")


def memory(size_bytes: float) -> str:
    """As drivers and operating systems count it."""
    return _scaled(size_bytes, "B", _BINARY)


def compute(flops_per_s: float) -> str:
    return _scaled(flops_per_s, "F")


def time(seconds: float) -> str:
    name, size_s = next(((name, size) for name, size in _SECONDS.items() if seconds >= size), ("ns", 1e-9))
    return f"{seconds / size_s:.3g} {name}"


def _scaled(amount: float, unit: str, prefixes: Mapping[str, float] = _PREFIXES) -> str:
    """With the largest prefix that leaves a number of at least one."""
    fits = [(prefix, size) for prefix, size in prefixes.items() if amount >= size]
    prefix, size = fits[-1] if fits else ("", 1.0)
    return f"{float(f'{amount / size:.3g}'):g} {prefix}{unit}"
