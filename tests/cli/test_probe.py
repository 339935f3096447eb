"""Links between running workers, on virtual time: what workers measure, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.probe import as_topology, find_members, measure
from penstock.errors import SetupError
from penstock.serve.probe import Row, pairs
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
