"""What commands do alike for who waits for them: a progress bar, and files that are known to be writable in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from penstock.errors import SetupError

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
