"""Links that concurrent flows share max-min fairly, in virtual time: incast and congestion appear by themselves.

    flow = network.start(path, 3.9e9)    these bytes leave as fast as the path's share allows
    flow.write(1e9)                      more of them, as they come to be: KV is sent while prefill goes on
    await flow.wait_done()               all that was written so far has arrived

All rates grow together; a flow stops growing when a link on its way is full: that link is its bottleneck. In the end
nobody can have more without taking it from a flow that has no more: every flow has a full link on which none is faster.
Latency is the caller's to add; a flow is a fluid, so packets, windows and their slow starts are not modelled.

After a change, rates are shared out anew: at once while few flows live, else in batches (see Options). `_share_out`
then moves as few flows as it can, and is exact all the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from penstock.errors import ConnectionLost, SetupError

_SAME = 1e-9  # rates that differ by less than this part of themselves are equal


@dataclass(frozen=True, slots=True)
class Options:
    """With at most `exact_flows` flows a change takes effect at once, with more at the next multiple of `batch_s`.

    Until then a new flow takes what its path has to spare, and what others leave lies idle. That adds up to about
    `batch_s` to a transfer, so `batch_s` must be small against transfers.
    """

    exact_flows: int = 100
    batch_s: float = 1e-3


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a link is doing, and did since it was made. Divide by capacity and time for its utilisation."""

    flows: int
    bytes_per_s: float
    carried_bytes: float
    busy_s: float  # with at least one flow


class Link:
    """One direction of a wire, which now carries up to `bytes_per_s`. Changed by its network alone."""

    __slots__ = (
        "_busy_s",
        "_busy_since_s",
        "_carried_bytes",
        "_flows",
        "_growing",
        "_held",
        "_left",
        "_level",
        "_used",
        "bytes_per_s",
        "name",
        "nominal_bytes_per_s",
    )

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name = name
        self.bytes_per_s = self.nominal_bytes_per_s = bytes_per_s
        self._flows: dict[Flow, None] = {}
        self._held: dict[Flow, None] = {}  # those whose bottleneck this is; all of one rate, and none here is faster
        self._used = 0.0  # sum of the flows' rates
        self._carried_bytes = 0.0  # by flows that have left
        self._busy_s = 0.0
        self._busy_since_s = 0.0  # if there are flows
        # For the time of one `_fill`:
        self._left = 0.0  # capacity that nobody has yet
        self._growing = 0  # flows that share it
        self._level: float | None = None  # the rate at which this link stopped flows, if it did

    def __repr__(self) -> str:
        return f"Link({self.name!r}, {self.bytes_per_s:.4g} of {self.nominal_bytes_per_s:.4g} bytes/s)"


class Flow:
    """Bytes on their way over `links`, made by `Network.start`. One that has sent all it was given costs nothing."""

    __slots__ = (
        "_bottleneck",
        "_credited_bytes",
        "_goal_bytes",
        "_lost",
        "_network",
        "_next_bottleneck",
        "_next_rate",
        "_plan",
        "_sent_bytes",
        "_since_s",
        "_waiters",
        "bytes_per_s",
        "links",
        "written_bytes",
    )

    def __init__(self, network: Network, links: tuple[Link, ...]) -> None:
        self.links = links
        self.written_bytes = 0.0
        self.bytes_per_s = 0.0
        self._network = network
        self._sent_bytes = 0.0  # up to `_since_s`; from there on at the present rate
        self._since_s = 0.0
        self._credited_bytes = 0.0  # of those sent, what the links have in their books
        self._goal_bytes = 0.0  # where somebody must be told
        self._plan = 0  # the number of the event that says so; an event of another number is void
        self._waiters: list[tuple[float, int, asyncio.Future[None]]] = []  # heap of (bytes, order, who is told)
        self._bottleneck: Link | None = None
        self._lost: str | None = None
        # For the time of one `_share_out`:
        self._next_rate = -1.0
        self._next_bottleneck = links[0]

    def sent_bytes(self, now: float) -> float:
        """How much has arrived by `now`, which is no earlier than the last event of this network."""
        return min(self._sent_bytes + self.bytes_per_s * (now - self._since_s), self.written_bytes)

    def write(self, size_bytes: float) -> None:
        """Adds bytes to those on their way. Raises ConnectionLost after `cancel`."""
        self._network.write(self, size_bytes)

    async def wait_sent(self, size_bytes: float) -> None:
        """Returns once so many bytes, counted from the first one written, have arrived. Raises ConnectionLost."""
        await self._network.sent(self, size_bytes)

    def sent(self, size_bytes: float) -> asyncio.Future[None]:
        """The same to be told of: done when `wait_sent` would return, with what it would raise."""
        return self._network.sent(self, size_bytes)

    async def wait_done(self) -> None:
        """Returns once all that was written before this call has arrived. Raises ConnectionLost."""
        await self._network.sent(self, self.written_bytes)

    def cancel(self, why: str = "the transfer was cancelled") -> None:
        """What has not arrived never will; who waits for it gets ConnectionLost. Does nothing the second time."""
        self._network.cancel(self, why)


class Network:
    """Owns the state of all its links and flows. Runs on the event loop that is running when flows start."""

    def __init__(self, options: Options = Options()) -> None:
        self.links: dict[str, Link] = {}
        self._options = options
        self._live = 0  # flows that have something to send
        self._order = 0
        self._events: list[tuple[float, int, Flow]] = []  # heap of (time, plan, flow): the flow reaches its goal
        self._alarm: asyncio.TimerHandle | None = None  # for the first event
        self._changed: dict[Link, None] = {}  # links on which rates must be shared out anew
        self._resharing: asyncio.TimerHandle | None = None

    def add_link(self, name: str, bytes_per_s: float) -> Link:
        """A cable is two links. Raises SetupError if the name is taken or the capacity is not a positive number."""
        if name in self.links:
            raise SetupError(f"there are two links {name}: give each direction of each wire a name of its own")
        if not 0 < bytes_per_s < math.inf:
            raise SetupError(f"link {name} carries {bytes_per_s} bytes/s: a capacity must be positive and finite")
        self.links[name] = link = Link(name, bytes_per_s)
        return link

    def start(self, links: Sequence[Link], size_bytes: float = 0.0, cap_bytes_per_s: float = math.inf) -> Flow:
        """A flow over `links`, in no special order, that never exceeds `cap_bytes_per_s`. Needs a link or a cap.

        A sender that makes its bytes at a steady pace is a flow with that cap and all its bytes written at once.
        """
        path = tuple(dict.fromkeys(links))
        if cap_bytes_per_s < math.inf:
            path += (Link("cap", cap_bytes_per_s),)  # a cap is a link that nobody else uses
        if not path:
            raise ValueError("a flow over no link and without a cap would take no time")
        flow = Flow(self, path)
        self.write(flow, size_bytes)
        return flow

    async def send(self, links: Sequence[Link], size_bytes: float, cap_bytes_per_s: float = math.inf) -> None:
        """Returns when the bytes have arrived. If the caller is cancelled, those under way stop."""
        flow = self.start(links, size_bytes, cap_bytes_per_s)
        try:
            await flow.wait_done()
        finally:
            flow.cancel()

    # Faults

    def slow(self, link: Link, factor: float) -> None:
        """The link has `factor` of its nominal capacity from now on. At 0 its flows stand still; they are not lost."""
        self._set_capacity(link, link.nominal_bytes_per_s * factor)

    def cut(self, link: Link) -> None:
        self.slow(link, 0.0)

    def restore(self, link: Link) -> None:
        self.slow(link, 1.0)

    def use(self, link: Link) -> LinkUse:
        """What `link` is doing, and did so far."""
        now = asyncio.get_running_loop().time()
        carried = sum(flow.sent_bytes(now) - flow._credited_bytes for flow in link._flows)
        busy_s = link._busy_s + (now - link._busy_since_s if link._flows else 0.0)
        return LinkUse(len(link._flows), link._used, link._carried_bytes + carried, busy_s)

    # For Flow

    def write(self, flow: Flow, size_bytes: float) -> None:
        if flow._lost is not None:
            raise ConnectionLost(flow._lost)
        if size_bytes < 0:
            raise ValueError(f"{size_bytes} bytes cannot be written")
        was_idle = flow._sent_bytes == flow.written_bytes
        flow.written_bytes += size_bytes
        if was_idle and size_bytes > 0:
            self._join(flow, asyncio.get_running_loop().time())
        elif size_bytes > 0:
            self._plan_next(flow)
            self._set_alarm()

    def sent(self, flow: Flow, size_bytes: float) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        if flow._lost is not None:
            told.set_exception(ConnectionLost(flow._lost))
        elif size_bytes <= flow.sent_bytes(loop.time()):
            told.set_result(None)
        else:
            self._order += 1
            heappush(flow._waiters, (size_bytes, self._order, told))
            if size_bytes < flow._goal_bytes:
                self._plan_next(flow)
                self._set_alarm()
        return told

    def cancel(self, flow: Flow, why: str) -> None:
        if flow._lost is not None:
            return
        flow._lost = why
        now = asyncio.get_running_loop().time()
        if flow._sent_bytes < flow.written_bytes:
            flow._sent_bytes = flow.written_bytes = flow.sent_bytes(now)
            self._leave(flow, now)
        for _, _, told in flow._waiters:
            if not told.done():
                told.set_exception(ConnectionLost(why))
        flow._waiters.clear()

    # Flows come and go

    def _join(self, flow: Flow, now: float) -> None:
        self._live += 1
        flow._since_s = now
        for link in flow.links:
            if not link._flows:
                link._busy_since_s = now
            link._flows[flow] = None
        if self._is_batching:
            spare = min(link.bytes_per_s - link._used for link in flow.links)
            self._set_rate(flow, max(0.0, spare), now)  # until its turn comes
            self._set_alarm()
        self._note_change(flow.links, now)

    def _leave(self, flow: Flow, now: float) -> None:
        """`flow` has sent all it will."""
        self._live -= 1
        sent_bytes = flow._sent_bytes - flow._credited_bytes
        flow._credited_bytes = flow._sent_bytes
        for link in flow.links:
            del link._flows[flow]
            link._carried_bytes += sent_bytes
            if link._flows:
                link._used -= flow.bytes_per_s
            else:
                link._used = 0.0
                link._busy_s += now - link._busy_since_s
        if flow._bottleneck is not None:
            del flow._bottleneck._held[flow]
            flow._bottleneck = None
        flow.bytes_per_s = 0.0
        flow._plan = 0
        self._note_change([link for link in flow.links if link._flows], now)

    def _set_capacity(self, link: Link, bytes_per_s: float) -> None:
        link.bytes_per_s = bytes_per_s
        self._note_change([link] if link._flows else [], asyncio.get_running_loop().time())

    # Rates

    @property
    def _is_batching(self) -> bool:
        return self._live > self._options.exact_flows

    def _note_change(self, links: Sequence[Link], now: float) -> None:
        """All changes of one moment, or of one batch, are shared out together."""
        if not links:
            return
        self._changed.update(dict.fromkeys(links))
        if self._resharing is None:
            batch_s = self._options.batch_s
            when = math.ceil(now / batch_s) * batch_s if self._is_batching else now
            self._resharing = asyncio.get_running_loop().call_at(when, self._reshare)

    def _reshare(self) -> None:
        self._resharing = None
        changed, self._changed = self._changed, {}
        now = asyncio.get_running_loop().time()
        for flow in _share_out(changed):
            if abs(flow._next_rate - flow.bytes_per_s) > _SAME * flow._next_rate:
                self._set_rate(flow, flow._next_rate, now)
        self._set_alarm()

    def _set_rate(self, flow: Flow, bytes_per_s: float, now: float) -> None:
        flow._sent_bytes = flow.sent_bytes(now)
        flow._since_s = now
        for link in flow.links:
            link._used += bytes_per_s - flow.bytes_per_s
        flow.bytes_per_s = bytes_per_s
        self._plan_next(flow)

    # Events

    def _plan_next(self, flow: Flow) -> None:
        """Voids the flow's planned event for the one that is right now."""
        self._order += 1
        flow._plan = self._order
        flow._goal_bytes = min(flow._waiters[0][0], flow.written_bytes) if flow._waiters else flow.written_bytes
        if flow.bytes_per_s > 0:
            when = flow._since_s + (flow._goal_bytes - flow._sent_bytes) / flow.bytes_per_s
            heappush(self._events, (when, flow._plan, flow))

    def _set_alarm(self) -> None:
        events = self._events
        if len(events) > 64 + 4 * self._live:
            events[:] = [event for event in events if event[1] == event[2]._plan]
            heapify(events)
        while events and events[0][1] != events[0][2]._plan:
            heappop(events)
        when = events[0][0] if events else None
        if self._alarm is not None:
            if self._alarm.when() == when:
                return
            self._alarm.cancel()
        self._alarm = None if when is None else asyncio.get_running_loop().call_at(when, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = asyncio.get_running_loop().time()
        while self._events and self._events[0][0] <= now:
            _, plan, flow = heappop(self._events)
            if plan == flow._plan:
                self._reach_goal(flow, now)
        self._set_alarm()

    def _reach_goal(self, flow: Flow, now: float) -> None:
        flow._sent_bytes = flow._goal_bytes
        flow._since_s = now
        while flow._waiters and flow._waiters[0][0] <= flow._sent_bytes:
            told = heappop(flow._waiters)[2]
            if not told.done():
                told.set_result(None)
        if flow._sent_bytes == flow.written_bytes:
            self._leave(flow, now)
        else:
            self._plan_next(flow)


def _share_out(changed: Iterable[Link]) -> dict[Flow, None]:
    """Flows to which changes on these links matter, each with its fair rate as `_next_rate`.

    At first these are the flows on the links themselves, shared out against all others as they are; then whom that
    wrongs joins them, until nobody is wronged.
    """
    moving = {flow: None for link in changed for flow in link._flows}
    crossed = _fill(moving)
    while wronged := _find_wronged(crossed, moving):
        moving |= wronged
        crossed = _fill(moving)
    for flow in moving:
        if flow._bottleneck is not flow._next_bottleneck:
            if flow._bottleneck is not None:
                del flow._bottleneck._held[flow]
            flow._bottleneck = flow._next_bottleneck
            flow._bottleneck._held[flow] = None
    return moving


def _fill(moving: Iterable[Flow]) -> dict[Link, list[Flow]]:
    """Progressive filling of `moving` with all other flows as they are. Returns the links they cross, with who does."""
    crossed: dict[Link, list[Flow]] = {}
    for flow in moving:
        flow._next_rate = -1.0
        for link in flow.links:
            if link in crossed:
                crossed[link].append(flow)
                link._left += flow.bytes_per_s
            else:
                crossed[link] = [flow]
                link._left = link.bytes_per_s - link._used + flow.bytes_per_s
    shares = []  # heap of (what each growing flow would get, order, link); out of date, it is too low
    for order, (link, flows) in enumerate(crossed.items()):
        link._growing = len(flows)
        link._level = None
        shares.append((_share(link), order, link))
    heapify(shares)
    while shares:
        share, order, link = shares[0]
        if not link._growing:
            heappop(shares)
            continue
        now = _share(link)
        if now > share * (1 + 1e-12):
            heapreplace(shares, (now, order, link))
            continue
        heappop(shares)
        _stop(crossed[link], link, now)
    return crossed


def _share(link: Link) -> float:
    """What each growing flow would get of `link`. Crumbs that sums leave of nothing are nothing, not a rate."""
    share = link._left / link._growing
    return share if share > _SAME * link.nominal_bytes_per_s else 0.0


def _stop(flows: Iterable[Flow], bottleneck: Link, rate: float) -> None:
    """Those of `flows` that still grow stop at `rate`."""
    bottleneck._level = rate
    for flow in flows:
        if flow._next_rate < 0:
            flow._next_rate = rate
            flow._next_bottleneck = bottleneck
            for link in flow.links:
                link._left -= rate
                link._growing -= 1


def _find_wronged(crossed: dict[Link, list[Flow]], moving: dict[Flow, None]) -> dict[Flow, None]:
    """Flows that were left as they are and may not stay so, now that `moving` has new rates.

    Either their bottleneck is none any more: not full, or somebody is faster on it. Or they are faster than a flow
    that stopped on the same link.
    """
    wronged: dict[Flow, None] = {}
    for link, flows in crossed.items():
        if len(flows) == len(link._flows):
            continue
        fastest = next(iter(link._held)).bytes_per_s if link._held else math.inf  # nobody else here is faster
        if link._held and (
            link._left > _SAME * link.bytes_per_s or max(flow._next_rate for flow in flows) > fastest * (1 + _SAME)
        ):
            wronged.update((flow, None) for flow in link._held if flow not in moving)
        if link._level is not None and link._level * (1 + _SAME) < fastest:
            limit = link._level * (1 + _SAME)
            wronged.update((flow, None) for flow in link._flows if flow.bytes_per_s > limit and flow not in moving)
    return wronged
