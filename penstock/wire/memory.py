"""Frames between endpoints of one process, on any event loop, through weather that tests choose.

Nothing here waits, so on a virtual loop the same inputs give the same run. What an endpoint sends passes its gate,
then the weather, then the gate of the receiver; a frozen endpoint's gate keeps both directions until it thaws.
Setting up and ending a connection take no weather.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count

from penstock.errors import AddressInUse, ConnectionLost, FrameTooLarge, Refused, SetupError
from penstock.wire.api import MAX_BACKLOG_BYTES, MAX_FRAME_BYTES, Accept, Connection
from penstock.wire.inbox import Inbox

Weather = Callable[[str, str, bytes], Sequence[float]]  # source, destination, frame -> delay of each copy, in s
Act = Callable[[], None]


def calm(source: str, destination: str, frame: bytes) -> Sequence[float]:
    """Every frame arrives once and at once."""
    return (0.0,)


class MemoryNetwork:
    """Joins the named endpoints of one process, and is where a test breaks them.

    `weather` may be replaced at any time: no delays drop a frame, two duplicate it, unequal ones reorder.
    """

    def __init__(self, weather: Weather = calm) -> None:
        self.weather = weather
        self.flights = _Flights()
        self._listeners: dict[str, _Listener] = {}
        self._hosts: dict[str, _Host] = {}

    def wire(self, name: str) -> MemoryWire:
        """The wire of endpoint `name`; after a crash, of its next incarnation."""
        return MemoryWire(self, self._host(name))

    def cut(self, name: str) -> None:
        """Ends all connections of `name`, for both sides; it lives on. What was on its way is lost."""
        for end in list(self._host(name).ends):
            for side in (end, end.other):
                side.host.hear(partial(side.over, f"the network cut {side.host.name} off {side.peer}"))

    def crash(self, name: str) -> None:
        """`name` dies: its peers are told the end, after what it had sent; it is told nothing any more."""
        host = self._hosts.pop(name, None)
        if host is None:
            return
        host.die()
        self._listeners = {at: listener for at, listener in self._listeners.items() if listener.host is not host}
        for end in list(host.ends):
            end.die()

    def freeze(self, name: str) -> None:
        """What comes to `name`, and what it sends, waits until `thaw`."""
        self._host(name).freeze()

    def thaw(self, name: str) -> None:
        self._host(name).thaw()

    def listener_at(self, address: str) -> _Listener | None:
        """For MemoryWire, like the next two."""
        return self._listeners.get(address)

    def add_listener(self, address: str, listener: _Listener) -> None:
        if address in self._listeners:
            raise AddressInUse(f"{address} is in use by {self._listeners[address].host.name}: choose another")
        self._listeners[address] = listener

    def remove_listener(self, address: str, listener: _Listener) -> None:
        if self._listeners.get(address) is listener:  # not if this endpoint crashed and another took its place
            del self._listeners[address]

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(name)
        return self._hosts[name]


class MemoryWire:
    """See `wire.api.Wire`: what one endpoint of a MemoryNetwork reaches others by. Addresses are `memory:NAME`."""

    def __init__(self, network: MemoryNetwork, host: _Host) -> None:
        self._network = network
        self._host = host

    @asynccontextmanager
    async def listen(self, address: str, token: str, accept: Accept) -> AsyncIterator[str]:
        """See `wire.api.Wire`."""
        if not address.startswith("memory:"):
            raise SetupError(f"{address!r} is no address here: write memory:NAME")
        listener = _Listener(self._host, token, accept)
        self._network.add_listener(address, listener)
        try:
            yield address
        finally:
            self._network.remove_listener(address, listener)
            for end in [end for end in self._host.ends if end.listener is listener]:
                end.close()

    async def connect(self, address: str, token: str, timeout_s: float = 5.0) -> Connection:
        """See `wire.api.Wire`."""
        answer: asyncio.Future[_End] = asyncio.get_running_loop().create_future()
        knock = _Knock(self._network, self._host, address, token, answer)
        self._host.act(knock.leave)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise ConnectionLost(f"{address} gave no answer within {timeout_s:g} s") from None


@dataclass(frozen=True, slots=True, eq=False)
class _Listener:
    host: _Host
    token: str
    accept: Accept


class _Flights:
    """What is on its way. Lands in order of time and, where times tie, of departure: loops may not keep ties."""

    def __init__(self) -> None:
        self._acts: list[tuple[float, int, Act]] = []
        self._order = count()
        self._timer_s = -1.0  # for when the last timer was set, if that is still to come

    def depart(self, land_s: float, act: Act) -> None:
        heappush(self._acts, (land_s, next(self._order), act))
        if land_s != self._timer_s:  # what departs together lands together
            self._timer_s = land_s
            asyncio.get_running_loop().call_at(land_s, self._land, land_s)

    def _land(self, until_s: float) -> None:
        if until_s == self._timer_s:
            self._timer_s = -1.0
        due = []
        while self._acts and self._acts[0][0] <= until_s:
            due.append(heappop(self._acts)[2])
        for act in due:
            act()


class _Host:
    """An endpoint: its connections, and the gate that all it sends and receives passes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ends: dict[_End, None] = {}
        self.is_dead = False
        self._is_frozen = False
        self._waiting: deque[Act] = deque()
        self._context = copy_context()

    def act(self, act: Act) -> None:
        """Does it now, after the thaw, or never if this endpoint is dead."""
        if self.is_dead:
            return
        if self._is_frozen or self._waiting:
            self._waiting.append(act)
        else:
            act()

    def hear(self, act: Act) -> None:
        """The same for what others have this endpoint do: in its own context, not in theirs."""
        self.act(partial(self._context.copy().run, act))  # a copy, since a context cannot be entered twice

    def freeze(self) -> None:
        self._is_frozen = True

    def thaw(self) -> None:
        self._is_frozen = False
        asyncio.get_running_loop().call_soon(self._catch_up)

    def die(self) -> None:
        self.is_dead = True
        self._waiting.clear()

    def _catch_up(self) -> None:
        while self._waiting and not self._is_frozen:
            self._waiting.popleft()()


class _End:
    """One end of a connection. See `wire.api.Connection`."""

    other: _End  # set by _pair

    def __init__(self, network: MemoryNetwork, host: _Host, peer: str, listener: _Listener | None) -> None:
        self.peer = peer
        self.host = host
        self.listener = listener
        self.inbox = Inbox(self._fail)
        self._network = network
        self._reason: str | None = None  # why it is not open any more
        self._unheard_bytes = 0  # sent and not yet arrived
        self._last_landing_s = 0.0
        host.ends[self] = None

    def send_nowait(self, frame: bytes) -> None:
        if self._reason is not None:
            raise ConnectionLost(f"the connection to {self.peer} has ended: {self._reason}")
        if len(frame) > MAX_FRAME_BYTES:
            raise FrameTooLarge(f"{len(frame)} bytes for {self.peer}; the limit is {MAX_FRAME_BYTES}")
        if (waiting := self._unheard_bytes + self.other.inbox.held_bytes) > MAX_BACKLOG_BYTES:
            self._fail(f"cut, as {waiting} bytes waited for {self.peer} to read")
            raise ConnectionLost(f"the connection to {self.peer} has ended: {self._reason}")
        self._unheard_bytes += len(frame)
        self.host.act(partial(self._depart, frame))

    def on_frame(self, receive: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        self.inbox.on_frame(receive, ended)

    def close(self) -> None:
        self._end_both("closed here", f"{self.host.name} closed")

    def enter(self, listener: _Listener) -> None:
        """Hands the connection to who listens."""
        try:
            listener.accept(self)
        except Exception as error:
            message = f"{listener.host.name} could not take a connection of {self.peer}"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
            self._fail(f"the listener could not take the connection: {error!r}")

    def over(self, reason: str) -> None:
        """The connection has ended; whoever receives is told so in the loop's next turn."""
        if self._reason is None:
            self._reason = reason
            self.host.ends.pop(self, None)
            asyncio.get_running_loop().call_soon(self.inbox.end, reason)

    def die(self) -> None:
        """Its endpoint crashed: here nothing is told any more, there the end."""
        self._reason = "crashed"
        self.inbox.stop()
        self._depart_end(f"{self.host.name} died")

    def _fail(self, reason: str) -> None:
        self._end_both(reason, f"{self.host.name} ended it: {reason}")

    def _end_both(self, reason: str, reason_there: str) -> None:
        if self._reason is None:
            self.inbox.stop()
            self.over(reason)
            self.host.act(partial(self._depart_end, reason_there))

    def _depart(self, frame: bytes) -> None:
        self._unheard_bytes -= len(frame)
        for delay_s in self._network.weather(self.host.name, self.other.host.name, frame):
            self._unheard_bytes += len(frame)
            land_s = asyncio.get_running_loop().time() + delay_s
            self._last_landing_s = max(self._last_landing_s, land_s)
            self._network.flights.depart(land_s, partial(self.other.host.hear, partial(self._arrive, frame)))

    def _arrive(self, frame: bytes) -> None:
        self._unheard_bytes -= len(frame)
        if self.other._reason is None:
            self.other.inbox.put(frame)

    def _depart_end(self, reason: str) -> None:
        land_s = max(asyncio.get_running_loop().time(), self._last_landing_s)  # no earlier than the last frame
        self._network.flights.depart(land_s, partial(self.other.host.hear, partial(self.other.over, reason)))


def _pair(network: MemoryNetwork, caller: _Host, address: str, listener: _Listener) -> tuple[_End, _End]:
    near = _End(network, caller, address, None)
    far = _End(network, listener.host, f"memory:{caller.name}", listener)
    near.other, far.other = far, near
    return near, far


@dataclass(frozen=True, slots=True, eq=False)
class _Knock:
    """An attempt to connect, on its way there and back."""

    network: MemoryNetwork
    caller: _Host
    address: str
    token: str
    answer: asyncio.Future[_End]

    def leave(self) -> None:
        self.network.flights.depart(asyncio.get_running_loop().time(), self._come)

    def _come(self) -> None:
        listener = self.network.listener_at(self.address)
        if listener is None:
            self._reply(Refused(f"nobody listens at {self.address}: is the address right, does it run?"))
        else:
            listener.host.hear(partial(self._enter, listener))

    def _enter(self, listener: _Listener) -> None:
        if self.caller.is_dead:
            return
        if self.network.listener_at(self.address) is not listener:
            self._reply(Refused(f"{self.address} stopped listening"))
        elif self.token != listener.token:
            hint = "set PENSTOCK_TOKEN to the same value on both sides"
            self._reply(Refused(f"{self.address} has another token than this endpoint: {hint}"))
        else:
            near, far = _pair(self.network, self.caller, self.address, listener)
            self._reply(near)
            far.enter(listener)

    def _reply(self, answer: _End | Refused) -> None:
        settle = partial(self._settle, answer)
        self.network.flights.depart(asyncio.get_running_loop().time(), partial(self.caller.hear, settle))

    def _settle(self, answer: _End | Refused) -> None:
        if isinstance(answer, Refused):
            if not self.answer.done():
                self.answer.set_exception(answer)
        elif self.answer.done():  # the caller gave up meanwhile
            answer.close()
        else:
            self.answer.set_result(answer)
