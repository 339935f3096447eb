"""Headline numbers of reports beside each other, as a terminal's table and a page show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")  # the kind of report


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """`better`: 1 if more is better, -1 if less is, 0 if neither. `is_brief`: a terminal has room for it too.

    `number` is None where nothing was measured.
    """

    title: str
    number: Callable[[R], float | None]
    form: str  # as in format(number, form)
    better: int
    is_brief: bool = True

    def text(self, report: R) -> str:
        value = self.number(report)
        return "-" if value is None else format(value, self.form)

    def best(self, rivals: Sequence[R]) -> str | None:
        """As it is written, so that no difference counts that is not seen; None where all are alike."""
        known = [rival for rival in rivals if self.number(rival) is not None]
        if not self.better or len({self.text(rival) for rival in known}) < 2:
            return None
        return self.text(max(known, key=lambda rival: self.better * (self.number(rival) or 0.0)))


@dataclass(frozen=True, slots=True)
class Row(Generic[R]):
    """A report in a table. `names` say what was measured; rows of one `setting` are rivals of each other."""

    names: tuple[str, ...]
    setting: object
    report: R
