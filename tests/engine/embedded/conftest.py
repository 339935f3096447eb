"""Checkpoints made once per run, and one thread: the machine's other cores belong to other tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.models import make_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_quiet_thread() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of an architecture, to be read only."""
    return cache(lambda architecture: make_model(tmp_path_factory.mktemp(architecture), architecture))
