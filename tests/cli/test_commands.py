"""The command line: its help, its speed, and the one line in which it refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock import __version__
from penstock.cli import main
from penstock.cli.model import BUNDLED

PENSTOCK = (sys.executable, "-m", "penstock")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error with which `penstock ARGUMENTS` refuses, exit status 2."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("penstock: error: ")
    return printed.err.removeprefix("penstock: error: ")


def penstock(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PENSTOCK, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cpu_s(command: Sequence[str]) -> float:
    """CPU seconds that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick() -> None:
    assert min(cpu_s([*PENSTOCK, "--help"]) for _ in range(3)) < 0.3


@pytest.mark.parametrize("command", ["serve", "worker", "frontend"])
def test_every_command_has_help(command: str) -> None:
    assert command in penstock("--help").stdout
    shown = penstock(command, "--help")
    assert shown.returncode == 0
    assert "MODEL" in shown.stdout
    assert "--model-name" in shown.stdout


def test_the_router_has_help() -> None:
    assert "router" in penstock("--help").stdout
    shown = penstock("router", "--help").stdout
    assert all(flag in shown for flag in ("--attach", "--prefill", "--decode", "--tokenizer", "--policy"))


def test_version() -> None:
    assert penstock("--version").stdout.strip() == __version__


REFUSED = {
    "serve --prot 9000": "Did you mean --port?",
    "servee": 'Did you mean "serve"?',
    "serve one two": "two",
    "serve --threads many": "--threads",
    "serve --log-level loud": "--log-level",
    "serve --host 0.0.0.0": "PENSTOCK_API_KEY",
    "serve --host :: --port 0": "PENSTOCK_API_KEY",
    "serve --port 80000": "65536",
    "serve --workers 2 --prefill 1": "--workers",
    "serve --prefill 0 --decode 0": "at least one worker",
    "serve no-such-folder": "neither a folder nor a hub id",
    "serve --engine embeded": "did you mean 'embedded'?",
    "serve --engine simulated --device cuda": "has no option 'device'",
    "serve --engine simulated --engine-option.step 1": "did you mean 'step_s'?",
    "serve --discovery etcd:here": "file:FOLDER",
    "serve --policy p_tokens": "no routing 'p_tokens' (did you mean 'p_token'?)",
    "serve --ttft-slo 0": "give seconds above 0",
    "serve --tenants no-such-file": "--tenants no-such-file cannot be read",
    "worker": "--join HOST:PORT",
    "worker --join 127.0.0.1:8001": "PENSTOCK_TOKEN",
    "worker --join 127.0.0.1:8001 --discovery file:leases": "not both",
    "worker --join 127.0.0.1:8001 --role cook": "prefill",
    "frontend": "PENSTOCK_TOKEN",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert REFUSED[line] in refusal(capsys, *line.split())


@pytest.mark.parametrize("address", ["8001", "host", "host:http", "host:0", ":8001"])
def test_an_address_to_join_is_host_and_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "t")
    assert "write HOST:PORT" in refusal(capsys, "worker", "--join", address)


@pytest.mark.parametrize("kind", ["file", "empty folder"])
def test_a_model_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    model = tmp_path / "model"
    model.mkdir() if kind == "empty folder" else model.write_text("")
    assert f"cannot read {model}/config.json" in refusal(capsys, "serve", str(model))


def test_a_hub_model_that_cannot_be_had(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise hub.errors.OfflineModeIsEnabled("Cannot reach the hub:\noffline mode is enabled.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert "the hub does not give it: Cannot reach the hub:" in refusal(capsys, "serve", "nobody/nothing")


def test_a_hub_model_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'penstock[torch]'" in refusal(capsys, "serve", "nobody/nothing")


@pytest.mark.parametrize("flag", ["--port", "--join-port"])
def test_a_port_in_use(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = "--port=0" if flag == "--join-port" else "--join-port=0"
        line = refusal(capsys, "serve", "--engine", "simulated", f"{flag}={port}", free)
    assert f"port {port} of 127.0.0.1 is in use" in line
    assert f"choose another with {flag}" in line


def test_a_worker_without_the_extra() -> None:
    script = "import sys; sys.modules['torch'] = None; from penstock.cli import main; main()"
    command = [sys.executable, "-c", script, "worker", "--join", "127.0.0.1:9"]
    environment = {**os.environ, "PENSTOCK_TOKEN": "t"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'penstock[torch]'" in done.stderr


def test_a_process_of_the_server_that_refuses_ends_it_in_one_line(tmp_path: Path) -> None:
    shutil.copy(BUNDLED / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    done = penstock("serve", str(tmp_path), "--engine", "simulated", "--port", "0", "--json")
    assert done.returncode == 2
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["starting"]
    assert done.stderr.count("\n") == 1
    assert "tokenizer.json" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "needs --attach URL, or --prefill URL and --decode URL"),
        (("--attach", "http://h:1", "--decode", "http://h:2"), "and not both"),
        (("--prefill", "http://h:1"), "go together"),
        (("--attach", "h:1"), "is no server: write http://HOST:PORT"),
        (("--attach", "http://h:1,rank"), "write NAME=VALUE"),
        (("--attach", "http://h:1,evnts=tcp://h:2"), "did you mean 'events'"),
        (("--attach", "http://h:1", "http://h:1/v1"), "named twice"),
        (("--attach", "http://h:1", "--policy", "pears"), "did you mean 'pairs'"),
    ],
)
def test_a_router_that_cannot_start(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    assert reason in refusal(capsys, "router", "--port", "0", *arguments)
