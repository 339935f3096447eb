"""Links between running workers, on virtual time: what workers measure, and what is made of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock import clock
from penstock.blocks import KvLayout
from penstock.cli.probe import as_topology, check_names, find_members, measure
from penstock.cluster import Member
from penstock.errors import SetupError
from penstock.serve.probe import Measured, Row, pairs
from penstock.sim.faults import Weather
from penstock.sim.loop import run_virtual
from penstock.sim.processes import FRONTEND
from penstock.sim.world import Shape, World
from penstock.topology.file import FileTopology, Options

JOIN = FRONTEND.removeprefix("memory:")


async def probed(world: World, crash: str = "") -> list[Row]:
    endpoint = world.router.endpoint
    peer = await endpoint.peer((FRONTEND,))
    members = [worker.member for worker in world.workers.values()]
    assert peer.is_open
    if crash:
        world.crash(crash)
    return await measure(endpoint, pairs(members, 0), 32 << 20, lambda share: None)


def test_workers_measure_what_lies_between_them_and_go_on_serving() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(decode=2), weather=Weather(delay_s=1e-3)) as world:
            rows = await probed(world)
            assert len(rows) == 6 and {(row.source, row.target) for row in rows} >= {("decode-0", "decode-1")}
            for row in rows:
                assert row.measured is not None and row.measured.latency_s == pytest.approx(1e-3)
                # Four pieces of a MiB are under way at a time, and an answer takes two ways.
                assert row.measured.bytes_per_s == pytest.approx(4 * (1 << 20) / 2e-3, rel=0.2)
            assert (await world.ask(tokens=200)).is_whole
            await world.settle()

    run_virtual(story())


def test_a_worker_that_died_fails_in_its_own_rows() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(decode=2)) as world:
            rows = await probed(world, crash="decode-1")
            failed = {(row.source, row.target) for row in rows if row.measured is None}
            assert failed == {(row.source, row.target) for row in rows if "decode-1" in (row.source, row.target)}
            assert all(row.failure for row in rows if row.measured is None)

    run_virtual(story())


def test_a_worker_that_dies_while_it_measures_fails_in_its_own_rows() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(decode=2), weather=Weather(delay_s=1e-3)) as world:
            members = [worker.member for worker in world.workers.values()]
            some = [pair for pair in pairs(members, 0) if "decode-0" in (pair[0].worker, pair[1].worker)]
            endpoint = world.router.endpoint
            await measure(endpoint, some, 1 << 20, lambda share: None)  # all know each other now
            begun_s = clock.now()
            asyncio.get_running_loop().call_later(0.05, world.crash, "decode-0")  # in the first pair's bulk
            rows = await measure(endpoint, pairs(members, 0), 256 << 20, lambda share: None)
            failed = {(row.source, row.target) for row in rows if row.failure}
            assert failed == {(source.worker, target.worker) for source, target in some}
            assert all((row.measured is None) == bool(row.failure) for row in rows)
            assert clock.now() - begun_s < 60
            assert (await world.ask(tokens=200)).is_whole
            await world.settle()

    run_virtual(story())


@pytest.mark.parametrize("names", [("1", "2"), ("on", "off"), ("1e3", "0x10"), ("host.lab-17", "a_b")])
def test_the_file_can_be_read_whatever_workers_are_called(names: tuple[str, str], tmp_path: Path) -> None:
    members = called(*names)
    check_names(members)
    path = tmp_path / "measured.yaml"
    path.write_text(as_topology(members, [Row(*names, Measured("unix", 1e-5, 1e9, 1 << 20))]))
    assert FileTopology(Options(path)).load().path(*names).bytes_per_s == pytest.approx(1e9)


@pytest.mark.parametrize("name", ["rack/w0", "w*", "a b", "a,b", "w: x", "#w", '"w"'])
def test_a_name_that_no_file_can_hold_is_refused(name: str) -> None:
    with pytest.raises(SetupError, match="cannot be named in a topology file"):
        check_names(called("w0", name))


def called(*names: str) -> list[Member]:
    layout = KvLayout(layers=1, kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
    return [Member(name, 1, "any", "m", (f"memory:{name}",), layout, 1, 16) for name in names]


def test_a_frontend_tells_who_is_there() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(decode=1)) as world:
            endpoint = world.router.endpoint
            with pytest.raises(SetupError, match="no frontend tells its workers"):
                await find_members(endpoint, JOIN)  # there is no TCP in this world

    run_virtual(story())


def test_each_is_measured_to_some_of_the_others() -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(prefill=2, decode=3)) as world:
            members = [worker.member for worker in world.workers.values()]
            some = pairs(members, 2)
            assert len(some) == 10 and all(source is not target for source, target in some)
            assert {source.worker for source, _ in some} == {target.worker for _, target in some}

    run_virtual(story())


def test_the_file_gives_the_measurements_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with World(seed=1, shape=Shape(decode=2), weather=Weather(delay_s=1e-3)) as world:
            rows = await probed(world)
            path = tmp_path / "measured.yaml"
            path.write_text(as_topology([worker.member for worker in world.workers.values()], rows))
            fabric = FileTopology(Options(path)).load()
            way = fabric.path("decode-0", "decode-1")
            found = [row.measured for row in rows if {row.source, row.target} == {"decode-0", "decode-1"}]
            assert way.bytes_per_s == pytest.approx(min(one.bytes_per_s for one in found if one), rel=1e-3)
            assert way.latency_s == pytest.approx(1e-3, rel=1e-2)

    run_virtual(story())
