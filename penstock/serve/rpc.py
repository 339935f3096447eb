"""Calls between processes: many streams of messages on one connection.

A call is opened with a method and a body; then both sides send items until the callee's handler returns (END), raises
(ERROR) or the caller leaves (CANCEL). All messages of one turn of the loop travel in one frame, so a worker's step
costs one frame per frontend, however many streams it feeds.

Frames are numbered. One that comes twice is ignored, one that comes early waits, and a gap that stays open ends the
connection: what is built on calls sees every message once and in order, or ConnectionLost. A side with open
calls that said nothing for a second beats, and a connection ends when the other side is silent for `silence_s`, so a
frozen peer is noticed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import msgspec

from penstock import clock
from penstock.errors import (
    BadRequest,
    Cancelled,
    ConnectionLost,
    PenstockError,
    Refused,
    WireError,
    from_wire,
    to_wire,
)
from penstock.wire.api import Connection, Wire

log = logging.getLogger(__name__)

CALL, UP, CANCEL, DOWN, END, ERROR = range(6)  # caller to callee: the first three; back: the others

Message = tuple[int, int, msgspec.Raw]  # kind, call, body
Frame = tuple[int, list[Message]]  # number, messages

_encode = msgspec.msgpack.Encoder().encode
_decode_frame = msgspec.msgpack.Decoder(Frame).decode
_decode_opening = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw]).decode
_decode_error = msgspec.msgpack.Decoder(tuple[str, str, str | None, float | None]).decode
_NOTHING = msgspec.Raw(_encode(None))

T = TypeVar("T")
Handler = Callable[["Call"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RpcOptions:
    """How long a peer may say nothing while calls are open, and a missing frame may stay missing."""

    beat_s: float = 1.0
    silence_s: float = 10.0
    gap_s: float = 1.0
    connect_timeout_s: float = 5.0


class Call:
    """One end of a call. The caller uses it as `async with`; leaving the block cancels what still runs."""

    __slots__ = ("_down", "_ended", "_error", "_id", "_items", "_peer", "_waiter", "body", "heard_s", "method", "task")

    def __init__(self, peer: Peer, call_id: int, method: str, body: msgspec.Raw, is_caller: bool) -> None:
        self.method = method
        self.body = body
        self.task: asyncio.Task[None] | None = None  # the handler's, on the callee's side
        self.heard_s = clock.now()  # when the other side said something last
        self._peer = peer
        self._id = call_id
        self._down = UP if is_caller else DOWN
        self._items: deque[msgspec.Raw] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: PenstockError | None = None

    @property
    def peer_name(self) -> str:
        return self._peer.name

    @property
    def is_ended(self) -> bool:
        """The other side will send nothing more; what it sent before may still be unread."""
        return self._ended

    @property
    def is_lost(self) -> bool:
        """It ended because the connection did, not because the other side was done."""
        return isinstance(self._error, ConnectionLost)

    def send(self, item: object) -> None:
        """Sends one item at the end of this turn of the loop. Lost silently once the call has ended."""
        if not self._ended:
            self._peer.post(self._down, self._id, msgspec.Raw(_encode(item)))

    async def receive(self, decode: Callable[[msgspec.Raw], T]) -> T | None:
        """The next item, or None at the end. Raises what the callee raised, or WireError: lost, or not to be read."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            await self._wait()
        return self._read(decode)

    async def receive_all(self, decode: Callable[[msgspec.Raw], T]) -> list[T]:
        """All items that have come, at least one; none at the end. Raises like `receive`."""
        first = await self.receive(decode)
        if first is None:
            return []
        found = [first]
        while self._items:
            found.append(self._read(decode))
        return found

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peer.forget(self._id)
        if not self._ended:
            self._peer.post(CANCEL, self._id, _NOTHING)
            self._ended = True

    def fail(self, error: PenstockError) -> None:
        """The caller's own side gives up: `receive` raises `error`; the callee is cancelled on leaving."""
        self._error = error
        self._wake()

    def deliver(self, item: msgspec.Raw) -> None:
        """Called by Peer."""
        self.heard_s = self._peer.heard_s
        self._items.append(item)
        self._wake()

    def end(self, error: PenstockError | None) -> None:
        """Called by Peer: nothing more will come."""
        self._ended = True
        self._error = error
        self._wake()

    def _read(self, decode: Callable[[msgspec.Raw], T]) -> T:
        try:
            return decode(self._items.popleft())
        except msgspec.DecodeError as error:
            raise WireError(f"{self.peer_name} sent what cannot be read ({error}): is it of this version?") from error

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Peer:
    """One connection, seen from one side. Made by Endpoint."""

    def __init__(
        self, endpoint: Endpoint, connection: Connection, options: RpcOptions, on_end: Callable[[Peer], None]
    ) -> None:
        self.name = connection.peer
        self.is_open = True
        self._endpoint = endpoint
        self._connection = connection
        self._options = options
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._made: dict[int, Call] = {}
        self._served: dict[int, Call] = {}
        self._last_call_id = 0
        self._outbox: list[Message] = []
        self._sent = self._sent_at_beat = 0
        self._received = 0
        self._early: dict[int, list[Message]] = {}
        self._gap: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self.heard_s = clock.now()
        connection.on_frame(self._on_frame, self._on_connection_end)

    def call(self, method: str, body: object) -> Call:
        """Opens a call; enter it at once. Raises ConnectionLost if the connection has ended."""
        if not self.is_open:
            raise ConnectionLost(f"the connection to {self.name} has ended")
        self._last_call_id += 1
        raw = msgspec.Raw(_encode(body))
        call = Call(self, self._last_call_id, method, raw, is_caller=True)
        self._made[self._last_call_id] = call
        self.post(CALL, self._last_call_id, msgspec.Raw(_encode((method, raw))))
        self._keep_beating()
        return call

    def post(self, kind: int, call_id: int, body: msgspec.Raw) -> None:
        """Queues one message for the frame of this turn of the loop."""
        if not self.is_open:
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append((kind, call_id, body))

    def forget(self, call_id: int) -> None:
        """The caller left."""
        self._made.pop(call_id, None)

    def close(self, reason: str) -> None:
        """Ends the connection and, with ConnectionLost, every call on it. Idempotent."""
        if not self.is_open:
            return
        self._flush()
        self.is_open = False
        for timer in (self._gap, self._beat):
            if timer is not None:
                timer.cancel()
        self._connection.close()
        lost = ConnectionLost(f"lost {self.name}: {reason}")
        for call in [*self._made.values(), *self._served.values()]:
            call.end(lost)
        for call in self._served.values():
            if call.task is not None:
                call.task.cancel()
        self._made.clear()
        self._on_end(self)

    def _flush(self) -> None:
        if self._outbox and self.is_open:
            self._send(self._outbox)
            self._outbox = []

    def _send(self, messages: list[Message]) -> None:
        self._sent += 1
        try:
            self._connection.send_nowait(_encode((self._sent, messages)))
        except PenstockError as error:
            self._loop.call_soon(self.close, str(error))

    def _on_connection_end(self, reason: str) -> None:
        self.close(reason)

    def _on_frame(self, data: bytes) -> None:
        if not self.is_open:
            return
        self.heard_s = clock.now()
        try:
            number, messages = _decode_frame(data)
        except msgspec.DecodeError as error:
            self.close(f"it sent a frame that is no frame ({error})")
            return
        if number != self._received + 1:
            self._keep_early(number, messages)
            return
        self._take(messages)
        while self.is_open and (waiting := self._early.pop(self._received + 1, None)) is not None:
            self._take(waiting)
        if not self._early and self._gap is not None:
            self._gap.cancel()
            self._gap = None

    def _keep_early(self, number: int, messages: list[Message]) -> None:
        if number <= self._received:
            return  # a duplicate
        self._early[number] = messages
        if self._gap is None:
            self._gap = self._loop.call_later(self._options.gap_s, self.close, "frames went missing")

    def _take(self, messages: list[Message]) -> None:
        self._received += 1
        for kind, call_id, body in messages:
            if kind == DOWN:
                if (call := self._made.get(call_id)) is not None:
                    call.deliver(body)
            elif kind == UP:
                if (call := self._served.get(call_id)) is not None:
                    call.deliver(body)
            else:
                self._control(kind, call_id, body)

    def _control(self, kind: int, call_id: int, body: msgspec.Raw) -> None:
        if kind == CALL:
            method, inner = _decode_opening(body)
            call = Call(self, call_id, method, inner, is_caller=False)
            self._served[call_id] = call
            call.task = self._endpoint.spawn(self._serve(call, call_id))
            # Not at the end of _serve: a task that is cancelled before its first turn never gets there.
            call.task.add_done_callback(lambda _: self._served.pop(call_id, None))
            self._keep_beating()
        elif kind == CANCEL:
            if (served := self._served.get(call_id)) is not None and not served.is_ended:
                served.end(Cancelled(f"{self.name} left the call"))
                if served.task is not None:
                    served.task.cancel()
        elif (made := self._made.pop(call_id, None)) is not None:
            made.end(from_wire(_decode_error(body)) if kind == ERROR else None)

    async def _serve(self, call: Call, call_id: int) -> None:
        try:
            await self._endpoint.handler(call.method)(call)
            self.post(END, call_id, _NOTHING)
        except asyncio.CancelledError:
            if not call.is_ended:  # the endpoint itself is closing, not the caller leaving
                raise
            self.post(END, call_id, _NOTHING)
        except Exception as error:
            # A handler's failure is its caller's to deal with; what is no PenstockError is a bug: it is logged too.
            if not isinstance(error, PenstockError):
                log.exception("%s failed for %s", call.method, self.name)
            self.post(ERROR, call_id, msgspec.Raw(_encode(to_wire(error))))

    def _keep_beating(self) -> None:
        if self._beat is None:
            self.heard_s = clock.now()
            self._beat = self._loop.call_later(self._options.beat_s, self._on_beat)

    def _on_beat(self) -> None:
        self._beat = None
        if not self._made and not self._served:
            return
        silent_s = clock.now() - self.heard_s
        if silent_s > self._options.silence_s:
            self.close(f"it said nothing for {silent_s:.1f} s while calls were open")
            return
        if self._sent == self._sent_at_beat and not self._outbox:
            self._send([])
        self._sent_at_beat = self._sent
        self._beat = self._loop.call_later(self._options.beat_s, self._on_beat)


class Endpoint:
    """A process's place in the web of calls: serves its methods, keeps one connection to each peer it calls.

    `wires` maps the scheme of an address to the backend that carries it. Used as `async with`, which parents all
    handlers. One handler's failure never reaches another.
    """

    def __init__(
        self,
        wires: Mapping[str, Wire],
        token: str,
        methods: Mapping[str, Handler],
        options: RpcOptions = RpcOptions(),
    ) -> None:
        self._wires = wires
        self._token = token
        self._methods = methods
        self._options = options
        self._tasks: dict[asyncio.Task[object], None] = {}
        self._peers: dict[Peer, None] = {}
        self._called: dict[tuple[str, ...], Peer] = {}  # by addresses
        self._attempts: dict[tuple[str, ...], asyncio.Task[Peer | ConnectionLost]] = {}  # likewise

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in list(self._peers):
            peer.close("this process is closing")
        # Not a TaskGroup: it would wrap whatever the block raises in an ExceptionGroup.
        while self._tasks:  # a task that ends may leave work for another one
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(list(self._tasks))

    @asynccontextmanager
    async def listen(self, address: str) -> AsyncIterator[str]:
        """Serves calls at `address` while inside the block; yields the address bound."""
        async with self._wire(address).listen(address, self._token, self._accept) as bound:
            yield bound

    async def peer(self, addresses: Sequence[str]) -> Peer:
        """The connection to whoever listens at these addresses, the first that answers. Raises ConnectionLost.

        All who ask meanwhile share one attempt, and its failure.
        """
        key = tuple(addresses)
        if (known := self._called.get(key)) is not None:
            return known
        if (attempt := self._attempts.get(key)) is None:
            attempt = self._attempts[key] = self.spawn(self._attempt(key))
        found = await asyncio.shield(attempt)
        if isinstance(found, ConnectionLost):
            raise ConnectionLost(str(found))
        return found

    def spawn(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """A task that ends with this endpoint; what it raises is a bug, and logged."""
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[object]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of this endpoint failed", exc_info=error)

    def handler(self, method: str) -> Handler:
        if (found := self._methods.get(method)) is None:
            raise BadRequest(f"no method {method!r} here; this process serves {', '.join(self._methods) or 'none'}")
        return found

    async def _attempt(self, addresses: tuple[str, ...]) -> Peer | ConnectionLost:
        """A new connection. A failure is returned, since it is no bug if nobody waits for it any more."""
        try:
            peer = self._called[addresses] = self._add(await self._connect(addresses))
            return peer
        except ConnectionLost as error:
            return error
        finally:
            del self._attempts[addresses]

    async def _connect(self, addresses: Sequence[str]) -> Connection:
        failures = []
        for address in addresses:
            try:
                timeout_s = self._options.connect_timeout_s
                return await self._wire(address).connect(address, self._token, timeout_s)
            except (ConnectionLost, Refused) as error:
                failures.append(str(error))
        peer = " or ".join(addresses) or "a peer without address"
        raise ConnectionLost(f"cannot reach {peer}: {'; '.join(failures)}")

    def _accept(self, connection: Connection) -> None:
        self._add(connection)

    def _add(self, connection: Connection) -> Peer:
        peer = Peer(self, connection, self._options, self._forget)
        self._peers[peer] = None
        return peer

    def _forget(self, peer: Peer) -> None:
        del self._peers[peer]
        self._called = {addresses: other for addresses, other in self._called.items() if other is not peer}

    def _wire(self, address: str) -> Wire:
        scheme = address.split(":", 1)[0]
        if (wire := self._wires.get(scheme)) is None:
            raise Refused(f"nobody here speaks {scheme!r}, asked for by {address}")
        return wire
