"""The simulator's network: CPU time per flow event, against solving everything anew at each event, in one run.

1,024 hosts with 36 GB/s each way in racks of 32 and pods of 8 racks, uplinks oversubscribed 2:1 and again 2:1; half of
the hosts send to the other half, 60 % within the rack. LIVE senders send about 1 GB each (log-normal), pause briefly,
and send again. An event is a start or an end; its cost is all of the process: coroutines, timers, books, rates. The
reference is the plain solver of the tests alone, given what flows at some moments of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from report import Row, emit

from penstock import clock
from penstock.sim.loop import run_virtual
from penstock.sim.network import Flow, Link, Network, Options
from tests.sim.max_min import max_min

HOSTS, RACK, POD = 1_024, 32, 256
NIC_BYTES_PER_S = 36e9
MEAN_BYTES = 1e9
NEAR = 0.6
PAUSE_S = 0.01
AT_ONCE = Options(exact_flows=10**9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="fewer events")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 8
    rows = []
    for live in (1, 16, 64, 256, 1_024):
        transfers = rounds * max(live, 500)
        rows += compared(live, transfers)
    emit(rows, arguments.json)


def compared(live: int, transfers: int) -> list[Row]:
    """With the default options and, where these batch, also without batches."""
    usual = Crowd(live, transfers, Options())
    run_virtual(usual.run())
    rows = [usual.row(f"flow event, {live} senders")]
    if live > Options().exact_flows:
        exact = Crowd(live, transfers, AT_ONCE)
        run_virtual(exact.run())
        rows.append(exact.row(f"flow event, {live} senders, every change at once"))
        rows.append(Row(f"mean transfer, {live} senders", usual.mean_s * 1e3, "ms", "at once", exact.mean_s * 1e3))
    return rows


@dataclass(slots=True)
class Crowd:
    """So many senders on one network, until so many transfers are done."""

    live: int
    transfers: int
    options: Options
    took_s: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    plain_s: list[float] = field(default_factory=list)
    flows: dict[int, Flow] = field(default_factory=dict)  # by sender

    @property
    def mean_s(self) -> float:
        return sum(self.took_s) / len(self.took_s)

    def row(self, name: str) -> Row:
        plain_us = sum(self.plain_s) / len(self.plain_s) * 1e6
        return Row(name, self.spent_s / (2 * len(self.took_s)) * 1e6, "us", "plain solver", plain_us)

    async def run(self) -> None:
        network = Network(self.options)
        path = tree(network)
        begun_s = time.process_time()
        async with asyncio.TaskGroup() as group:
            for sender in range(self.live):
                group.create_task(self.send(network, path, sender))
        self.spent_s = time.process_time() - begun_s - sum(self.plain_s)

    async def send(self, network: Network, path: Callable[[Random], Sequence[Link]], sender: int) -> None:
        rng = Random(sender)
        await asyncio.sleep(rng.random() * PAUSE_S)
        while len(self.took_s) < self.transfers:
            begun_s = clock.now()
            self.flows[sender] = network.start(path(rng), MEAN_BYTES * rng.lognormvariate(-0.5, 1))
            await self.flows[sender].wait_done()
            del self.flows[sender]
            self.took_s.append(clock.now() - begun_s)
            if len(self.took_s) * 8 % self.transfers == 0:
                self.solve_plainly(network)
            await asyncio.sleep(rng.expovariate(1 / PAUSE_S))

    def solve_plainly(self, network: Network) -> None:
        capacities = {link: link.bytes_per_s for link in network.links.values()}
        paths = {sender: flow.links for sender, flow in self.flows.items()}
        begun_s = time.process_time()
        max_min(capacities, paths)
        self.plain_s.append(time.process_time() - begun_s)


def tree(network: Network) -> Callable[[Random], Sequence[Link]]:
    """Adds the links; what it returns draws the path from an even host to an odd one."""
    out, into = both_ways(network, "host", HOSTS, NIC_BYTES_PER_S)
    rack_out, rack_into = both_ways(network, "rack", HOSTS // RACK, NIC_BYTES_PER_S * RACK / 2)
    pod_out, pod_into = both_ways(network, "pod", HOSTS // POD, NIC_BYTES_PER_S * POD / 4)

    def path(rng: Random) -> Sequence[Link]:
        a = rng.randrange(0, HOSTS, 2)
        b = (a // RACK * RACK + rng.randrange(1, RACK, 2)) if rng.random() < NEAR else rng.randrange(1, HOSTS, 2)
        if a // RACK == b // RACK:
            return [out[a], into[b]]
        core = [] if a // POD == b // POD else [pod_out[a // POD], pod_into[b // POD]]
        return [out[a], rack_out[a // RACK], *core, rack_into[b // RACK], into[b]]

    return path


def both_ways(network: Network, name: str, number: int, bytes_per_s: float) -> tuple[list[Link], list[Link]]:
    out, into = (
        [network.add_link(f"{name}-{index}-{way}", bytes_per_s) for index in range(number)] for way in ("out", "into")
    )
    return out, into


if __name__ == "__main__":
    main()
