"""Settings: what they add up to, and in which words they are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock import plugin
from penstock.config import (
    EngineSettings,
    FleetSettings,
    KvSettings,
    ListenSettings,
    Model,
    Secrets,
    ServiceSettings,
    SharedPort,
    WorkerConfig,
    parse,
    read_tenants,
)
from penstock.errors import SetupError


@dataclass(frozen=True, slots=True)
class Options:
    model: str
    step_s: float = 0.5
    threads: int | None = None


def test_texts_become_what_the_options_want() -> None:
    given = {"model": "demo", "step_s": "0.006", "threads": "4"}
    assert parse(Options, given, "the engine") == Options("demo", 0.006, 4)
    assert parse(Options, {"model": "demo"}, "the engine") == Options("demo")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "steps_s": "1"}, r"the engine has no option 'steps_s' \(did you mean 'step_s'\?\)"),
        ({"model": "m", "wings": "2"}, "the engine has no option 'wings': it has model, step_s, threads"),
        ({"model": "m", "threads": "many"}, r"an option of the engine does not fit: .*threads"),
        ({}, "missing required field `model`"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        parse(Options, values, "the engine")


def test_engine_flags_and_engine_options_reach_the_engine_alike() -> None:
    settings = EngineSettings(dtype="float32", threads=2, engine_option={"step_s": "0.1"})
    assert settings.values() == {"dtype": "float32", "threads": "2", "step_s": "0.1"}


def test_a_server_has_a_prefill_and_a_decode_worker_unless_told_otherwise() -> None:
    assert FleetSettings().roles() == {"prefill-0": "prefill", "decode-0": "decode"}
    assert FleetSettings(decode=2).roles() == {
        "prefill-0": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
    }
    assert FleetSettings(prefill=0).roles() == {"decode-0": "decode"}
    assert FleetSettings(workers=2).roles() == {"worker-0": "any", "worker-1": "any"}


@pytest.mark.parametrize(
    ("prefill", "decode", "workers"), [(1, None, 1), (None, 1, 1), (0, 0, None), (None, None, 0), (-1, 2, None)]
)
def test_a_fleet_that_makes_no_sense_is_refused(prefill: int | None, decode: int | None, workers: int | None) -> None:
    with pytest.raises(SetupError, match="--workers"):
        FleetSettings(prefill, decode, workers).roles()


def test_workers_join_at_the_next_port_unless_told_otherwise() -> None:
    assert ListenSettings(port=9000).join_port_after(9000) == 9001
    assert ListenSettings(port=0).join_port_after(54321) == 0
    assert ListenSettings(port=0, join_port=7000).join_port_after(54321) == 7000


def test_kv_memory_is_given_in_gib() -> None:
    assert KvSettings().kv_bytes == 0
    assert KvSettings(kv_gib=1.5).kv_bytes == 3 << 29


def test_no_settings_show_their_secrets() -> None:
    secrets = Secrets("hush", "hush")
    model = Model(Path("demo"), "demo")
    config = WorkerConfig("a", "any", model, secrets, "", None, "", EngineSettings(), KvSettings(), "", {})
    assert "hush" not in repr((config, ListenSettings(api_key="hush")))


@pytest.mark.parametrize(
    "settings",
    [{"ttft_slo": 0.0}, {"ttft_slo": -1.0}, {"ttft_patience": 0.9}, {"max_queued": -1}, {"affinity_s": float("nan")}],
)
def test_levels_that_nobody_can_keep_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SetupError, match="--" + next(iter(settings)).replace("_", "-")):
        ServiceSettings(**settings)  # type: ignore[arg-type]


def test_tenants_come_from_a_file_and_keep_their_keys_to_themselves(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    file.write_text('{"acme": {"key": "hush-hush", "weight": 2}, "others": {}}')
    tenants = read_tenants(file)
    assert {name: (tenant.key, tenant.weight) for name, tenant in tenants.items()} == {
        "acme": ("hush-hush", 2.0),
        "others": (None, 1.0),
    }
    assert "hush" not in repr(tenants)
    assert read_tenants(None) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "cannot be read"),
        ('{"acme": {"wieght": 2}}', "wieght"),
        ('{"acme": {"weight": 0}}', "> 0"),
        ('{"acme": {"key": "short"}}', "length >= 8"),
        ('{"a": {"key": "one-for-both"}, "b": {"key": "one-for-both"}}', "two tenants have the same key"),
    ],
)
def test_tenants_that_cannot_be_told_apart_or_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tenants.json"
    file.write_text(text)
    with pytest.raises(SetupError, match=message):
        read_tenants(file)


def test_engines_are_found_by_name() -> None:
    assert {"embedded", "simulated"} <= set(plugin.names("engine"))
    assert "api" not in plugin.names("engine")
    for name in plugin.names("engine"):
        assert hasattr(plugin.find("engine", name), "Options")


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(SetupError, match=r"no engine 'simulatd' \(did you mean 'simulated'\?\): there is .*embedded"):
        plugin.find("engine", "simulatd")


def test_processes_that_share_a_port_find_each_other() -> None:
    own = SharedPort("ab12", 1, 3)
    assert SharedPort.parse(str(own)) == own
    assert own.name == "frontend-1"
    assert list(own.others()) == ["frontend-0", "frontend-2"]
    assert own.address in SharedPort("ab12", 0, 3).others().values()


@pytest.mark.parametrize("text", ["", "ab12", "ab12:1", "ab12:3:3", "ab12:x:3", ":0:2"])
def test_what_names_no_process_is_refused(text: str) -> None:
    with pytest.raises(SetupError, match="MESH:INDEX:PROCESSES"):
        SharedPort.parse(text)
