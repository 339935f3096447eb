"""How every benchmark prints: a table for people, or one JSON object per row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `reference` names what it is compared with in the same run, `aim` is the most that `ratio` may be.

    Without a reference, or with `aim_is_for_value`, the aim is for `value` itself. A number of which more is better
    says so with `more_is_better`; its aim is then the least.
    """

    name: str
    value: float
    unit: str
    reference: str | None = None
    reference_value: float | None = None
    aim: float | None = None
    more_is_better: bool = False
    aim_is_for_value: bool = False

    @property
    def ratio(self) -> float | None:
        return self.value / self.reference_value if self.reference_value else None

    @property
    def ok(self) -> bool | None:
        """Whether the aim is met; None where there is none."""
        if self.aim is None:
            return None
        reached = self.value if self.ratio is None or self.aim_is_for_value else self.ratio
        return reached >= self.aim if self.more_is_better else reached <= self.aim


def emit(rows: Iterable[Row], as_json: bool) -> None:
    """Prints `rows` to standard output."""
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row) | {"ratio": row.ratio, "ok": row.ok}))
        return
    table = Table("name", "value", "unit", "reference", "its value", "ratio", "aim", "")
    for row in rows:
        verdict = {None: "", True: "ok", False: "missed"}[row.ok]
        numbers = [_short(n) for n in (row.reference_value, row.ratio, row.aim)]
        table.add_row(row.name, _short(row.value), row.unit, row.reference or "", *numbers, verdict)
    Console(width=None if Console().is_terminal else 120).print(table)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"
