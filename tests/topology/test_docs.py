"""docs/topology.md tells the truth: its files load, its code runs, its table has the presets' figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from penstock.topology import units
from penstock.topology.file import FileTopology, Options
from penstock.topology.presets import NODES

DOCS = (Path(__file__).parents[2] / "docs/topology.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_files_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.yaml"
    path.write_text(text, encoding="utf-8")
    assert FileTopology(Options(path)).load().devices


@pytest.mark.parametrize("code", blocks("python"))
def test_the_code_runs(code: str) -> None:
    exec(code, {})


@pytest.mark.parametrize("preset", NODES)
def test_the_table_has_the_figures(preset: str) -> None:
    spec = NODES[preset]
    cells = [f"`{preset}`", "none", "", "", "", f"{spec.nics} of {units.rate(spec.nic.bytes_per_s)}"]
    if spec.gpu is not None and spec.nvlink is not None:
        cells[1:5] = [
            f"{spec.gpus} {spec.gpu.model}",
            f"{units.memory(spec.gpu.memory_bytes)}, {units.rate(spec.gpu.memory_bytes_per_s)}",
            units.compute(spec.gpu.bf16_flops_per_s),
            units.rate(spec.nvlink.bytes_per_s),
        ]
    row = "| " + " | ".join(cells) + " |"
    assert re.sub(" +", " ", row) in DOCS
