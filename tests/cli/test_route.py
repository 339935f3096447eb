"""`penstock route explain`, asked of a frontend on a real socket."""

from __future__ import annotations

import asyncio
import json

import pytest

from penstock.cli import main
from tests.serve.fake_backend import FakeBackend, decided, failing, saying
from tests.serve.test_http_server import client_of, serving
from tests.support import run


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)


def explain(*arguments: str) -> int:
    """Its exit status."""
    try:
        main(["route", "explain", *arguments])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def asked(*arguments: str, ask: bool = True, key: str = "") -> int:
    """The command's exit status, of a server that has answered a request that moved once."""

    async def story() -> int:
        backend = FakeBackend(saying("water"))
        async with serving(backend, api_key=key) as (host, port), client_of((host, port), key or "any") as client:
            if ask:
                headers = {"x-request-id": "mine/1:a+b"}
                await client.completions.create(model="demo", prompt="dam", extra_headers=headers)
                backend.decided[backend.requests[0].id] = decided()
            return await asyncio.to_thread(explain, *arguments, "--url", f"http://{host}:{port}")

    return run(story())


@pytest.mark.parametrize("which", ["--last", "mine/1:a+b"])
def test_a_request_is_explained(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(which) == 0
    page = capsys.readouterr().out
    for line in (
        "of demo: finished",
        "decision 1, after 0.0 ms, by pairs of 4 workers: all on decode-1",
        "decision 2, after 1000.0 ms, by pairs of 4 workers: prefill-0 prefills for decode-0",
        "believed cached of 200 tokens: 64 at decode-0, 128 at prefill-0",
        "passed over: decode-1",
        "next, should prefill-0 fail: prefill-1",
        "but decode-0 prefilled: by its own cache and load that was quicker",
        "what happened",
    ):
        assert line in page
    rows = {words[0]: words[1:] for line in page.splitlines() if (words := line.split())}
    assert "prefill-0 -> decode-1    300.0 ms" in page
    assert rows["wait"] == ["50.0", "ms"] and rows["prefill"][:2] == ["200.0", "ms"]


def test_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("--last", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [one["decode"] for one in record["decisions"]] == ["decode-1", "decode-0"]


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked("--last", key="secret") == 2
    assert "needs an API key" in capsys.readouterr().err
    monkeypatch.setenv("PENSTOCK_API_KEY", "secret")
    assert asked("--last", key="secret") == 0


def test_what_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("unknown") == 2
    assert "no request 'unknown' among the last" in capsys.readouterr().err
    assert asked("--last", ask=False) == 2
    assert "it remembers no request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "say which request"),
        (("x", "--last"), "say which request"),
        (("x", "--url", "https://host"), "write http://HOST:PORT"),
        (("x", "--url", "http://host:port"), "write http://HOST:PORT"),
        (("x", "--url", "http://127.0.0.1:1"), "does not tell"),
    ],
)
def test_refusals(arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(*arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_request_that_failed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async def story() -> int:
        backend = FakeBackend(failing(ValueError("broken")))
        async with serving(backend) as (host, port), client_of((host, port)) as client:
            with pytest.raises(Exception, match="fault of this server"):
                await client.completions.create(model="demo", prompt="dam")
            return await asyncio.to_thread(explain, "--last", "--url", f"http://{host}:{port}")

    assert run(story()) == 0
    page = capsys.readouterr().out
    assert "failed, PenstockError" in page and "it was not routed" in page
