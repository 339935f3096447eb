"""The examples do what they say, in under 60 lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PENSTOCK_TOKEN": "a token of this test"}


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *arguments]


def test_a_million_tokens_between_two_processes() -> None:
    done = subprocess.run(command("move_between_processes.py"), capture_output=True, text=True, timeout=60, check=True)
    assert "1,000,000 tokens" in done.stdout


def test_a_million_tokens_between_two_hosts() -> None:
    name = "move_between_hosts.py"
    with subprocess.Popen(
        command(name, "receive", "127.0.0.1"), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as receiver:
        assert receiver.stdout is not None
        offer = receiver.stdout.readline().strip()
        sent = subprocess.run(
            command(name, "send", offer), capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=True
        )
        assert "977 MiB" in sent.stdout
        assert receiver.stdout.readline() == "1,000,000 tokens are here\n"
        assert receiver.wait(timeout=60) == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("move_*.py")), ids=lambda path: path.name)
def test_they_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
