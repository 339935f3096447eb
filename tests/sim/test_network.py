"""The network: rates are max-min fair, bytes are conserved, and the same story runs the same way twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import clock
from penstock.errors import ConnectionLost, SetupError
from penstock.sim.loop import Deadlock, run_virtual
from penstock.sim.network import Flow, Link, Network, Options
from tests.sim.max_min import max_min

GB = 1e9
EXACT = Options(exact_flows=10**9)
BATCHED = Options(exact_flows=0, batch_s=1e-3)


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


# Known answers


def test_one_flow_takes_what_its_narrowest_link_carries() -> None:
    async def story() -> None:
        network = Network()
        await network.send([network.add_link("wide", 4 * GB), network.add_link("narrow", 2 * GB)], 6 * GB)
        assert clock.now() == close(3.0)

    run_virtual(story())


def test_incast_is_shared_and_those_who_remain_speed_up() -> None:
    async def story() -> None:
        network = Network()
        into = network.add_link("into", 12 * GB)
        flows = [network.start([network.add_link(f"from-{n}", 9 * GB), into], (n + 1) * GB) for n in range(3)]
        ends = []
        for flow in flows:
            await flow.wait_done()
            ends.append(clock.now())
        # 4 GB/s each until 0.25 s; 6 each until 0.25 + 1/6; then the last has 9, all its own link carries.
        assert ends == [close(1 / 4), close(1 / 4 + 1 / 6), close(1 / 4 + 1 / 6 + 1 / 9)]

    run_virtual(story())


def test_who_is_held_back_elsewhere_leaves_its_share_to_others() -> None:
    async def story() -> None:
        network = Network()
        wide, narrow = network.add_link("wide", 10 * GB), network.add_link("narrow", 1 * GB)
        flows = [network.start([wide, narrow], GB), network.start([wide], GB), network.start([wide], GB, 3 * GB)]
        await asyncio.sleep(0.01)
        assert [flow.bytes_per_s for flow in flows] == [close(1 * GB), close(6 * GB), close(3 * GB)]
        assert network.use(wide).bytes_per_s == close(10 * GB)

    run_virtual(story())


def test_bytes_that_come_to_be_while_others_flow_are_sent_when_they_are_there() -> None:
    async def story() -> None:
        network = Network()
        wire = network.add_link("wire", 10 * GB)
        flow = network.start([wire])
        for chunk in range(3):  # each takes 0.5 s to be made and 0.4 s to be sent; the last is twice as long
            await asyncio.sleep(0.5)
            flow.write(4 * GB if chunk < 2 else 8 * GB)
        await flow.wait_done()
        use = network.use(wire)
        assert (use.carried_bytes, use.busy_s) == (close(16 * GB), close(1.6))
        assert clock.now() == close(1.5 + 0.8)

    run_virtual(story())


def test_somebody_who_waits_for_a_part_is_told_in_time() -> None:
    async def story() -> None:
        network = Network()
        flow = network.start([network.add_link("wire", 10 * GB)], 10 * GB)
        await asyncio.sleep(0.1)
        assert flow.sent_bytes(clock.now()) == close(1 * GB)
        await flow.wait_sent(0.5 * GB)
        assert clock.now() == 0.1
        async with asyncio.TaskGroup() as group:
            later = group.create_task(flow.wait_sent(6 * GB))
            await flow.wait_sent(3 * GB)
            assert clock.now() == close(0.3) and not later.done()
        assert clock.now() == close(0.6)
        flow.write(1 * GB)
        await flow.wait_done()
        assert clock.now() == close(1.1)

    run_virtual(story())


def test_a_cancelled_transfer_frees_its_share_and_tells_who_waits() -> None:
    async def story() -> None:
        network = Network()
        wire = network.add_link("wire", 2 * GB)
        stays, goes = network.start([wire], 2 * GB), network.start([wire], 2 * GB)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(raises_lost(goes.wait_done(), "decode-1 died"))
            await asyncio.sleep(0.5)
            goes.cancel("decode-1 died")
            goes.cancel("and again")
            await waiting
        await stays.wait_done()
        assert clock.now() == close(0.5 + 1.5 / 2)
        assert network.use(wire).carried_bytes == close(2.5 * GB)
        with pytest.raises(ConnectionLost, match="decode-1 died"):
            goes.write(1)
        await raises_lost(goes.wait_sent(0), "decode-1 died")

    async def raises_lost(waiting: object, match: str) -> None:
        with pytest.raises(ConnectionLost, match=match):
            await waiting  # type: ignore[misc]

    run_virtual(story())


def test_a_sender_that_is_cancelled_stops_sending() -> None:
    async def story() -> None:
        network = Network()
        wire = network.add_link("wire", 1 * GB)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await network.send([wire], 5 * GB)
        await asyncio.sleep(1)
        use = network.use(wire)
        assert (use.flows, use.bytes_per_s, use.carried_bytes, use.busy_s) == (0, 0.0, close(GB), close(1.0))

    run_virtual(story())


def test_faults_of_links() -> None:
    async def story() -> None:
        network = Network()
        wire = network.add_link("wire", 4 * GB)
        flows = [network.start([wire], 4 * GB), network.start([wire], 4 * GB)]
        network.slow(wire, 0.5)
        await asyncio.sleep(1)
        network.cut(wire)
        await asyncio.sleep(10)
        assert [flow.sent_bytes(clock.now()) for flow in flows] == [close(1 * GB)] * 2
        network.restore(wire)
        await flows[0].wait_done()
        assert clock.now() == close(11 + 6 / 4)
        assert network.use(wire).busy_s == close(12.5)

    run_virtual(story())


def test_who_sends_over_a_cut_link_waits_for_ever() -> None:
    async def story() -> None:
        network = Network()
        wires = [network.add_link(f"wire-{n}", 3 * GB) for n in range(2)]
        flows = [network.start(wires, GB, cap * GB) for cap in (0.1, 0.7, 1.3)]
        network.cut(wires[1])
        await network.send(wires[:1], GB)
        await asyncio.create_task(flows[0].wait_done(), name="sender")

    with pytest.raises(Deadlock, match=r"sender in .*wait_done"):
        run_virtual(story())


def test_mistakes_are_refused() -> None:
    async def story() -> None:
        network = Network()
        wire = network.add_link("wire", GB)
        with pytest.raises(SetupError, match="two links wire"):
            network.add_link("wire", GB)
        with pytest.raises(SetupError, match="dead carries 0"):
            network.add_link("dead", 0)
        with pytest.raises(ValueError, match="no link"):
            network.start([], 1)
        with pytest.raises(ValueError, match="-1 bytes"):
            network.start([wire], -1)

    run_virtual(story())


# Fairness

Paths = list[tuple[int, ...]]
LINKS = 8

capacities = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 7.5]), min_size=LINKS, max_size=LINKS)
one_path = st.lists(st.integers(0, LINKS - 1), min_size=1, max_size=4, unique=True).map(tuple)
some_paths = st.lists(one_path, min_size=1, max_size=25)
some_caps = st.lists(st.sampled_from([0.1, 0.4, 1.0, float("inf")]), min_size=25, max_size=25)


def check_fair(flows: Sequence[Flow]) -> None:
    """The conditions of max-min fairness, and equality with the reference."""
    links = {link: None for flow in flows for link in flow.links}
    rates = max_min({link: link.bytes_per_s for link in links}, {flow: flow.links for flow in flows})
    for flow in flows:
        assert flow.bytes_per_s == close(rates[flow])
        assert any(is_bottleneck(link, flow, flows) for link in flow.links)


def is_bottleneck(link: Link, flow: Flow, flows: Sequence[Flow]) -> bool:
    rates = [other.bytes_per_s for other in flows if link in other.links]
    return sum(rates) >= link.bytes_per_s * (1 - 1e-6) and flow.bytes_per_s >= max(rates) * (1 - 1e-6)


@given(capacities, some_paths, some_caps, st.sampled_from([EXACT, BATCHED]))
@settings(deadline=None, max_examples=150)
def test_rates_are_max_min_fair(widths: list[float], paths: Paths, caps: list[float], options: Options) -> None:
    async def story() -> None:
        network = Network(options)
        links = [network.add_link(f"link-{n}", width * GB) for n, width in enumerate(widths)]
        flows = [
            network.start([links[n] for n in path], 1e6 * GB, cap * GB) for path, cap in zip(paths, caps, strict=False)
        ]
        await asyncio.sleep(0.01)
        check_fair(flows)

    run_virtual(story())


events = st.lists(
    st.one_of(
        st.tuples(st.just("start"), one_path, st.sampled_from([0.3, 1.0, 1e6, 1e6])),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
        st.tuples(st.just("slow"), st.integers(0, LINKS - 1), st.sampled_from([0.2, 0.5, 1.0])),
    ),
    min_size=1,
    max_size=40,
)


@given(capacities, events, st.sampled_from([EXACT, BATCHED]))
@settings(deadline=None, max_examples=150)
def test_rates_stay_fair_and_bytes_are_conserved_whatever_happens(
    widths: list[float], events: list[tuple[object, ...]], options: Options
) -> None:
    """Every change moves only the flows that it concerns; all the others must still be right."""

    async def story() -> None:
        network = Network(options)
        links = [network.add_link(f"link-{n}", width * GB) for n, width in enumerate(widths)]
        flows: list[Flow] = []
        for event in events:
            match event:
                case ("start", path, size):
                    flows.append(network.start([links[n] for n in path], size * GB))
                case ("cancel", n) if flows:
                    flows[n % len(flows)].cancel()
                case ("slow", n, factor):
                    network.slow(links[n], factor)
            await asyncio.sleep(0.004)
            check_fair([flow for flow in flows if flow.sent_bytes(clock.now()) < flow.written_bytes])
        await asyncio.sleep(1)
        for flow in flows:
            flow.cancel()
        check_conserved(network, flows)

    run_virtual(story())


def check_conserved(network: Network, flows: Sequence[Flow]) -> None:
    """At rest, each link carried what the flows over it sent, and never more than it can."""
    for link in network.links.values():
        use = network.use(link)
        assert use.flows == 0 and use.bytes_per_s == 0
        assert use.carried_bytes == close(sum(flow.sent_bytes(clock.now()) for flow in flows if link in flow.links))
        assert use.carried_bytes <= use.busy_s * link.nominal_bytes_per_s * (1 + 1e-9)


@pytest.mark.parametrize("options", [EXACT, BATCHED])
def test_rates_stay_fair_in_a_crowd(options: Options) -> None:
    """Changes that travel over several links before they end, and links that are cut, which leaves crumbs of sums."""

    async def story(seed: int) -> None:
        network = Network(options)
        rng = Random(seed)
        links = [network.add_link(f"link-{n}", rng.uniform(1, 10) * GB) for n in range(20)]
        flows: list[Flow] = []
        for _ in range(60):
            flows.append(network.start(rng.sample(links, rng.randint(1, 5)), 1e6 * GB))
            if len(flows) > 30:
                flows.pop(rng.randrange(len(flows))).cancel()
            network.slow(rng.choice(links), rng.choice([0, 0.3, 1, 1]))
            await asyncio.sleep(0.004)
            check_fair(flows)

    for seed in range(5):
        run_virtual(story(seed))


def test_alone_a_transfer_takes_its_time_and_no_more_in_batches_too() -> None:
    async def story() -> None:
        network = Network(BATCHED)
        wire = network.add_link("wire", 10 * GB)
        for _ in range(10):
            await network.send([wire], 1e6)
        assert clock.now() == close(10 * 1e6 / (10 * GB))

    run_virtual(story())


def test_all_bytes_arrive_over_a_busy_tree_and_batches_cost_little() -> None:
    exact = run_virtual(busy_tree(EXACT, seed=3))
    batched = run_virtual(busy_tree(BATCHED, seed=3))
    assert sum(batched) / sum(exact) == pytest.approx(1, abs=0.01)


async def busy_tree(options: Options, seed: int) -> list[float]:
    """Two racks of eight hosts, half of which send to the other half. Returns how long each transfer took."""
    network = Network(options)
    rng = Random(seed)
    out = [network.add_link(f"out-{host}", 36 * GB) for host in range(8)]
    into = [network.add_link(f"into-{host}", 36 * GB) for host in range(8)]
    between = [network.add_link(f"rack-{way}", 72 * GB) for way in range(2)]
    sizes: list[float] = []
    took: list[float] = []

    async def send() -> None:
        sender, receiver = rng.randrange(8), rng.randrange(8)
        is_near = sender // 4 == receiver // 4
        path = [out[sender], *([] if is_near else [between[sender // 4]]), into[receiver]]
        sizes.append(GB * rng.lognormvariate(0, 1))
        begun_s = clock.now()
        await network.send(path, sizes[-1])
        took.append(clock.now() - begun_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(300):
            await asyncio.sleep(rng.expovariate(120))
            group.create_task(send())
    assert sum(network.use(link).carried_bytes for link in into) == close(sum(sizes))
    return took


def test_the_same_story_runs_the_same_way_in_other_processes() -> None:
    script = "from tests.sim.test_network import *\nprint(run_virtual(busy_tree(Options(exact_flows=5), seed=7)))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{run_virtual(busy_tree(Options(exact_flows=5), seed=7))}\n"}


def test_ends_of_equal_flows_come_in_the_order_of_their_starts() -> None:
    async def story() -> list[int]:
        network = Network()
        wire = network.add_link("wire", GB)
        ended: list[int] = []

        async def send(number: int) -> None:
            await network.send([wire], GB)
            ended.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(send(number))
        return ended

    ended = run_virtual(story())
    assert all(one < other for one, other in pairwise(ended))
