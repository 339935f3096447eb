"""What commands do alike: flags with several values, a progress bar, tables, JSON, files that can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from penstock.columns import Column, R, Row
from penstock.errors import SetupError

PLAIN_WIDTH = 140  # of a table where it is not read on a terminal
STANDARD_OUTPUT = "-"  # in the place of a file

OnProgress = Callable[[float], None]  # the share of the work that is done


@contextmanager
def progress(what: str) -> Iterator[OnProgress]:
    """A bar on standard error, if a person looks there."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=min(1.0, done))


def check_writable(path: Path) -> None:
    """Before the time is spent. Raises SetupError."""
    try:
        path.open("a").close()
    except OSError as error:
        raise SetupError(f"cannot write {path} ({error.strerror}): name another file") from error


def write(path: Path, text: str) -> None:
    """Raises SetupError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {path} ({error.strerror}): name another file") from error


# Flags


def listed(flag: str, texts: Sequence[str]) -> list[str]:
    """What stands between commas, each once. Raises SetupError for nothing."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if not names or "" in names:
        raise SetupError(f"{flag} {','.join(texts)} has a gap: write one or more with commas between")
    return list(dict.fromkeys(names))


def positive(flag: str, value: float) -> float:
    """Raises SetupError for what is not above 0, or has no end."""
    if not 0 < value < float("inf"):
        raise SetupError(f"{flag} {value:g} must be above 0")
    return value


# Reports


def as_json(reports: Sequence[msgspec.Struct]) -> str:
    """One object; a report is a line of it."""
    lines = ",\n".join(msgspec.json.encode(report).decode() for report in reports)
    return f'{{"reports":[\n{lines}\n]}}\n'


def table_console() -> Console:
    """Standard output, wide enough for a table if no terminal says how wide it is."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def print_table(heads: Sequence[str], columns: Sequence[Column[R]], rows: Sequence[Row[R]], console: Console) -> None:
    """A row for each report, named under `heads`; a line between settings."""
    brief = [column for column in columns if column.is_brief]
    first, *others = heads
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for title in (*others, *(column.title for column in brief)):
        table.add_column(title, justify="right", vertical="bottom", overflow="fold")
    for _, group in groupby(rows, key=lambda row: row.setting):
        table.add_section()
        for row in group:
            table.add_row(*map(escape, row.names), *(column.text(row.report) for column in brief))
    console.print(table)
