"""`penstock profile`: it finds the prices of an engine that has known ones, and shows what it found."""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from penstock.cli import main
from penstock.cli.model import BUNDLED
from penstock.cli.profile import Point, Profile, charts, expert_share, fit, grid, measure, show
from penstock.engine.simulated import Options, SimulatedEngine
from penstock.errors import SetupError
from penstock.policy.latency.steps import Mix, StepModel
from penstock.sim.loop import run_virtual
from tests.support import run

PRICES = Options(max_context_tokens=256, step_s=0.010, prefill_token_s=1e-4, decode_sequence_s=1e-3)
ROOM = 1 << 20


def profiled(options: Options = PRICES, budget_s: float = 20.0) -> Profile:
    points = run_virtual(measure(SimulatedEngine(options), budget_s, ROOM, lambda done: None))
    return fit("simulated", "cpu", points, share=0.0)


def test_it_finds_the_prices_of_a_simulated_engine() -> None:
    profile = profiled()
    assert profile.step_model.free_tokens == 0
    assert profile.step_model.line.prices == pytest.approx((0.010, 1e-4, 0, 1e-3, 0), rel=1e-3, abs=1e-9)
    assert max(abs(profile.error(point)) for point in profile.points) < 1e-3
    assert 1 <= profile.saturating_tokens <= 256
    assert profile.saturated_tokens_per_s == pytest.approx(0.95 * 256 / 0.0356, rel=0.01)


def test_every_kind_of_step_is_measured_often_enough() -> None:
    points = profiled().points
    assert {point.mix for point in points} == set(grid(256))
    assert all(point.count >= 5 and point.seconds == pytest.approx(point.upper_s) for point in points)
    kinds = {(point.mix.tokens > 0, point.mix.sequences > 0) for point in points}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_time_bounds_what_is_measured() -> None:
    done: list[float] = []
    slow = Options(max_context_tokens=256, step_s=0.0, prefill_token_s=0.1)
    points = run_virtual(measure(SimulatedEngine(slow), 10.0, ROOM, done.append))
    assert max(point.mix.tokens for point in points) < 64
    assert done == sorted(done) and 1 <= done[-1] < 3


def test_too_little_time_is_refused() -> None:
    with pytest.raises(SetupError, match="raise --seconds"):
        run_virtual(measure(SimulatedEngine(PRICES), 0.01, ROOM, lambda done: None))


def test_what_has_no_room_is_left_out() -> None:
    blocks = 8
    layout = SimulatedEngine(PRICES).info.layout
    points = run_virtual(measure(SimulatedEngine(PRICES), 10.0, blocks * layout.block_bytes, lambda done: None))
    assert 0 < max(point.mix.sequences for point in points) <= blocks
    assert max(point.mix.context + point.mix.tokens for point in points) == blocks * layout.block_tokens


def test_the_grid_stays_within_the_context() -> None:
    for longest in (2, 20, 2048, 1_000_000):
        mixes = grid(longest)
        assert all(mix.context + mix.tokens <= longest and mix.depth < longest for mix in mixes)
        assert len(mixes) == len(set(mixes))


def test_people_read_a_table() -> None:
    shown = io.StringIO()
    show(profiled(), Console(file=shown, width=100))
    text = shown.getvalue()
    for part in ("32 after 64", "16 at 128", "saturates the device", "token_s", "off by 0.0% in the median"):
        assert part in text
    assert "busy" not in text


def test_a_busy_machine_is_named() -> None:
    points = [Point(Mix(tokens), tokens / 1e3, tokens / 500, tokens / 400, 9) for tokens in (1, 2, 4, 8, 16)]
    shown = io.StringIO()
    show(fit("m", "cpu", points, share=0.0), Console(file=shown, width=100))
    assert "a usual step took 2.0 times the best" in shown.getvalue()


def test_scripts_read_json_and_the_plot_is_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "fit.svg"
    engine = ["--engine", "simulated", "--max-context-tokens", "128", "--engine-option.step_s", "0.0005"]
    with pytest.raises(SystemExit) as exit:
        main(["profile", *engine, "--seconds", "1", "--json", "--plot", str(plot)])
    assert exit.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "demo"
    assert msgspec.convert(told["step_model"], StepModel).seconds(Mix(64).work) > 0
    assert {"mix", "seconds", "fitted_s"} <= set(told["points"][0])
    assert told["saturating_tokens"] > 1
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--seconds", "0"], "--seconds 0 is too short"),
        (["--plot", "/no/such/folder/fit.svg"], "cannot write /no/such/folder/fit.svg"),
        (["--engine", "none"], "there is no engine 'none'"),
    ],
)
def test_refusals(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["profile", *arguments])
    assert exit.value.code == 2
    assert what in capsys.readouterr().err


def test_a_real_model_is_profiled(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from penstock.engine.embedded import EmbeddedEngine
    from penstock.engine.embedded import Options as EmbeddedOptions
    from tests.models import make_model

    folder = make_model(tmp_path)
    engine = EmbeddedEngine(EmbeddedOptions(str(folder), device="cpu", threads=1, max_context_tokens=64))
    points = run(measure(engine, 1.5, ROOM, lambda done: None))
    profile = fit("tiny", "cpu", points, expert_share(folder))
    assert all(point.seconds > 0 for point in profile.points)
    assert profile.step_model.seconds(Mix(32).work) > 0
    assert len(charts(profile)) == 3


def test_the_share_of_experts_comes_from_the_model(tmp_path: Path) -> None:
    assert expert_share(BUNDLED) == 0
    sizes = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_local_experts": 8, "num_experts_per_tok": 2}))
    assert expert_share(tmp_path) == 0.25
    (tmp_path / "config.json").write_text("{}")
    assert expert_share(tmp_path) == 0
