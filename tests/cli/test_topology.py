"""`penstock topology show`."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from penstock.cli import main

LAB = "holds: [{kind: rack, count: 2, oversubscription: 2, holds: [{preset: hgx-h100, count: 4}]}]"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["topology", "show", *arguments])
    assert not exit.value.code
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["topology", "show", *arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_a_file_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text(LAB)
    shown = show(capsys, str(tmp_path / "lab.yaml"))
    assert "64 gpu h100_sxm, 5 TiB" in shown
    assert "── rack0 … rack1 (2)  uplink 576 GB/s 200 ns 2:1" in shown
    assert "── node0 … node3 (4)" in shown


def test_this_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cpu0" in show(capsys)
    assert "cpu0" in show(capsys, "--local")


def test_a_preset_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(show(capsys, "gb200-nvl72", "--json"))
    assert sum(vertex["kind"] == "gpu" for vertex in shown["vertices"]) == 72
    assert {"source", "target", "way", "medium", "bytes_per_s", "latency_s"} == set(shown["links"][0])


def test_labels_of_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nodes.json").write_text('{"n1": {"topology.kubernetes.io/zone": "a"}}')
    shown = show(capsys, "--labels", str(tmp_path / "nodes.json"))
    assert "── a" in shown
    assert "── n1" in shown


def test_a_drawing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(capsys, "hgx-h100", "--svg", str(tmp_path / "out.svg"))
    assert ElementTree.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")


def test_refusals_are_one_line_that_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text("holds:\n- preset: hgx-h100\n  cuont: 2\n")
    told = refusal(capsys, str(tmp_path / "lab.yaml"))
    assert told.count("\n") == 1
    assert "lab.yaml:3: holds[0].cuont: no such field (did you mean 'count'?)" in told
    assert "did you mean 'hgx-h100'?" in refusal(capsys, "hgx-h10")
    assert "name one" in refusal(capsys, "hgx-h100", "--local")
    assert "cannot write" in refusal(capsys, "hgx-h100", "--svg", str(tmp_path))
