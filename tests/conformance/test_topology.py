"""What every source of a topology promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from penstock import plugin
from penstock.topology.api import Topology
from penstock.topology.file import FileTopology
from penstock.topology.file import Options as FileOptions
from penstock.topology.labels import LabelsTopology
from penstock.topology.labels import Options as LabelsOptions
from penstock.topology.local import LocalTopology
from penstock.topology.local import Options as LocalOptions
from tests.topology.fake_host import FakeHost


def file(folder: Path) -> Topology:
    path = folder / "lab.yaml"
    path.write_text("holds: [{kind: rack, count: 2, holds: [{preset: hgx-h100}, {preset: tcp-host, count: 2}]}]")
    return FileTopology(FileOptions(path))


def labels(_: Path) -> Topology:
    zones = {f"n{number}": {"topology.kubernetes.io/zone": f"z{number % 2}"} for number in range(4)}
    return LabelsTopology(LabelsOptions({**zones, "gpus": {"ray.io/accelerator-type": "H100"}}))


def local(folder: Path) -> Topology:
    host = FakeHost(folder)
    host.add_numa(0, "0-3", 1_000_000)
    host.add_numa(1, "4-7", 1_000_000)
    host.add_gpu("0000:00:02.0/0000:58:00.0", 1)
    host.add_ethernet("0000:00:06.0/0000:5c:00.0", "eth0", 0, "25000")
    return LocalTopology(LocalOptions(host.root), lambda: None)


BACKENDS: dict[str, Callable[[Path], Topology]] = {"file": file, "labels": labels, "local": local}


def test_every_backend_is_here() -> None:
    assert plugin.names("topology") == sorted(BACKENDS)


@pytest.fixture(params=BACKENDS)
def topology(request: pytest.FixtureRequest, tmp_path: Path) -> Topology:
    return BACKENDS[request.param](tmp_path)


@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_found_by_its_name_and_configured_by_its_options(name: str, tmp_path: Path) -> None:
    module = plugin.find("topology", name)
    assert isinstance(BACKENDS[name](tmp_path), module.TOPOLOGY)
    assert module.Options.__dataclass_params__.frozen


def test_loading_twice_is_the_same(topology: Topology) -> None:
    one, other = topology.load(), topology.load()
    assert list(one.vertices.values()) == list(other.vertices.values())
    assert one.links == other.links


def test_all_devices_reach_each_other(topology: Topology) -> None:
    fabric = topology.load()
    assert fabric.devices
    for source, target in product(fabric.devices, repeat=2):
        path = fabric.path(source, target)
        assert path.latency_s < 1.0
        assert (path.seconds(1 << 30) > 0.0) == (source != target)
        assert math.isfinite(path.seconds(1 << 30))
        assert path.seconds(1 << 30) == pytest.approx(fabric.path(target, source).seconds(1 << 30))


def test_devices_are_on_nodes_and_nodes_have_domains_around_them(topology: Topology) -> None:
    fabric = topology.load()
    for device in fabric.devices:
        assert fabric.vertices[device].kind in ("gpu", "cpu")
        assert fabric.find_domain(device, "node") is not None
        assert fabric.failure_domains(device)[-1] == fabric.root


def test_nodes_lead_out_by_nics_alone(topology: Topology) -> None:
    fabric = topology.load()
    for vertex in fabric.vertices.values():
        if vertex.kind == "node":
            kinds = {fabric.vertices[fabric.links[number].source].kind for number in fabric.egress(vertex.name)}
            assert kinds == {"nic"}
