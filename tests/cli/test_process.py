"""Signals, parents and the environment."""

from __future__ import annotations

import os
import signal

import pytest

from penstock.cli import process
from penstock.errors import SetupError
from tests.support import run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_kills(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def scenario() -> None:
        requested = process.stop_requested()
        assert signal.getsignal(number) != signal.SIG_DFL
        os.kill(os.getpid(), number)
        await requested.wait()
        assert signal.getsignal(number) == signal.SIG_DFL

    run(scenario())
    signal.signal(number, before)


def test_an_orphan_is_a_child_whose_launcher_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_PARENT", raising=False)
    assert not process.is_orphan()  # nobody launched it
    monkeypatch.setenv("PENSTOCK_PARENT", str(os.getppid()))
    assert not process.is_orphan()
    monkeypatch.setenv("PENSTOCK_PARENT", str(os.getpid()))
    assert process.is_orphan()


def test_tokens_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "t")
    assert process.token() == "t"
    assert process.token_or_new() == ("t", False)
    monkeypatch.delenv("PENSTOCK_TOKEN")
    with pytest.raises(SetupError, match="PENSTOCK_TOKEN is not set"):
        process.token()
    (one, is_new), (other, _) = process.token_or_new(), process.token_or_new()
    assert is_new
    assert one != other
    assert len(one) >= 32


def test_a_key_on_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "from the environment")
    assert process.api_key("given") == "given"
    assert process.api_key("") == "from the environment"
