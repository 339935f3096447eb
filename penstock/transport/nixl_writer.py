"""The writer's side of the `nixl` transport: pipes whose blocks an agent of this process moves.

    transfer    a pipe: blocks asked for, cut into operations as there is room for one
    mover       the agent, and one task that takes the transfers in turn

All of it lives on the I/O thread.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import msgspec

from penstock import auth, clock
from penstock.blocks import BlockId
from penstock.errors import ConnectionLost, PenstockError, from_wire
from penstock.transport.api import Moved, Offer
from penstock.transport.nixl_agent import Agent, Blocks, Operation, new_agent
from penstock.transport.nixl_options import Options
from penstock.transport.nixl_owner import LEFT, LOST, PURPOSE, Answer, Hello, Welcome, encode
from penstock.transport.sockets import dial, read_message, send_message
from penstock.transport.tcp_backlog import Backlog

UNDER_WAY = 2  # operations of one transfer, so that the next one is there when the first is done
CHUNK_S = 0.005  # that an operation should take
MIN_CHUNK_BYTES = 256 << 10
MAX_CHUNK_BYTES = 8 << 20  # over CMA the thread does nothing else meanwhile
FIRST_CHUNK_BYTES = 1 << 20
MAX_RUNS = 1024
REST_SHARE = 0.1  # of the time that nothing has changed for, until it is looked at again
LOOP_TICK_S = 1e-3  # a loop sleeps no shorter

_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Mover:
    """Takes the transfers in turn. It has one agent for all."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._agent: Agent | None = None
        self._transfers: list[Transfer] = []
        self._asked = asyncio.Event()
        self._changed_s = 0.0
        self._running: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises MissingExtra."""
        self._agent = new_agent(self.options)
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """All transfers were left."""
        if self._running is not None:
            self._running.cancel()
        if self._agent is not None:
            self._agent.close()

    def add(self, transfer: Transfer) -> Agent:
        """The agent that is to move its blocks, once it was asked to."""
        self._transfers.append(transfer)
        if self._agent is None:
            self._agent = new_agent(self.options)
        return self._agent

    def remove(self, transfer: Transfer) -> None:
        """Idempotent."""
        if transfer in self._transfers:
            self._transfers.remove(transfer)

    def wake(self) -> None:
        """A transfer has something to move."""
        if not self._asked.is_set():
            self._asked.set()
            self._changed_s = clock.now()

    async def _run(self) -> None:
        while True:
            await self._asked.wait()
            if any(transfer.is_stalled for transfer in self._transfers):
                self._abandon()
            if any([transfer.turn() for transfer in list(self._transfers)]):
                self._changed_s = clock.now()
                await asyncio.sleep(0)
            elif any(transfer.is_busy for transfer in self._transfers):
                await self._rest()
            else:
                self._asked.clear()

    async def _rest(self) -> None:
        """What is short is noticed at once, and what takes long costs little."""
        waited_s = clock.now() - self._changed_s
        rest_s = min(max(waited_s * REST_SHARE, self.options.poll_s), self.options.progress_s)
        if rest_s < LOOP_TICK_S:
            select.select((), (), (), rest_s)
            rest_s = 0
        await asyncio.sleep(rest_s)

    def _abandon(self) -> None:
        """Closes the agent: NIXL has no other way to stop a transfer that may still read or write this memory."""
        error = ConnectionLost(f"a transfer came to a halt for {self.options.stalled_s:g} s, and the others with it")
        agent, self._agent = self._agent, None
        for transfer in self._transfers:
            transfer.drop()
        if agent is not None:
            agent.close()
        for transfer in list(self._transfers):
            transfer.lose(error)


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a transfer's blocks, on its way. It ends so many pairs that are written."""

    operation: Operation
    size_bytes: int
    pieces: int
    written_pairs: int
    began_s: float


class Transfer:
    """new -> open (`move`, `flush`) -> over: left, or lost at any time; then what is under way comes to its end."""

    def __init__(
        self, mover: Mover, offer: Offer, address: int, source_blocks: int, on_moved: Callable[[], None]
    ) -> None:
        self.moved = Moved()
        self._mover = mover
        self._offer = offer
        self._here = Blocks("", address, source_blocks, offer.layout.block_bytes)
        self._there = self._here  # known once it is open
        self._on_moved = on_moved
        self._agent: Agent | None = None
        self._sock: socket.socket | None = None  # once the owner may know of this
        self._asked: deque[Backlog] = deque()  # in order; each is for another direction than the one before
        self._parts: deque[_Part] = deque()  # under way, in order
        self._chunk_bytes = FIRST_CHUNK_BYTES
        self._began_s = 0.0  # when there was something to do, after there was nothing
        self._changed_s = 0.0
        self._error: PenstockError | None = None
        self._is_over = False
        self._is_clean = True  # all that was moved is in place
        self._settled = asyncio.Event()  # everything is in place, or nothing more will be
        self._settled.set()
        self._ended = asyncio.Event()  # it is over, nothing is under way, and the owner was told
        self._stack = AsyncExitStack()

    # For the pipe

    async def open(self, hello: Hello, token: str) -> None:
        """Raises Refused, StaleEpoch or ConnectionLost."""
        owner = self._offer.owner
        try:
            async with asyncio.timeout(self._mover.options.hello_s):
                sock = self._stack.enter_context(await dial(self._offer.address))
                await auth.join(sock, token, PURPOSE, owner)
                self._sock = sock
                await send_message(sock, encode(hello))
                refusal, welcome = _decode_answer(await read_message(sock))
        except TimeoutError:
            limit_s = self._mover.options.hello_s
            raise ConnectionLost(f"{owner} gave no answer within {limit_s:g} s when dialled") from None
        except OSError as error:
            raise ConnectionLost(f"lost {owner} at {self._offer.address} when dialling: {error}") from error
        if refusal is not None:
            raise from_wire(refusal)
        if welcome is None:
            raise ConnectionLost(f"{owner} said nothing of its memory")
        self._join(welcome)
        watching = asyncio.create_task(self._watch(sock))
        self._stack.push_async_callback(_cancelled, watching)

    def move(self, pairs: Sequence[tuple[BlockId, BlockId]], is_read: bool) -> None:
        if self._is_over or not pairs:
            return  # `flush` says so
        if self._settled.is_set():
            self._settled.clear()
            self._began_s = self._changed_s = clock.now()
        if not self._asked or self._asked[-1].is_read != is_read:
            self._asked.append(Backlog(self._offer.layout.block_bytes, is_read))
        self._asked[-1].add(pairs)
        self._mover.wake()

    async def flush(self) -> None:
        """Raises ConnectionLost."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    async def leave(self) -> None:
        """Nothing is moved any more, and the owner knows. What is under way is waited for."""
        self._stop()
        await self._ended.wait()
        self._mover.remove(self)
        await self._stack.aclose()

    # For the mover

    @property
    def is_busy(self) -> bool:
        return bool(self._asked or self._parts)

    @property
    def is_stalled(self) -> bool:
        """Nothing of it was done for too long."""
        return bool(self._parts) and clock.now() - self._changed_s > self._mover.options.stalled_s

    def turn(self) -> bool:
        """Starts what there is room for and looks at what is under way. Whether anything changed."""
        try:
            changed = self._start_next()
            return self._finish_first() or changed
        except ConnectionLost as error:
            self.lose(ConnectionLost(f"moving blocks of {self._offer.owner}: {error}"), is_clean=False)
            return True

    def drop(self) -> None:
        """Nobody looks after what is under way any more: its agent is about to be closed."""
        self._is_clean = self._is_clean and not self._parts
        while self._parts:
            self._parts.popleft().operation.release()

    def lose(self, error: PenstockError, is_clean: bool = True) -> None:
        """Idempotent."""
        self._is_clean = self._is_clean and is_clean
        if self._error is None:
            self._error = error
            self._settled.set()
            self._on_moved()
        self._stop()

    def _join(self, welcome: Welcome) -> None:
        """Raises ConnectionLost."""
        agent, memory = self._mover.add(self), (self._here.address, self._here.count * self._here.block_bytes)
        agent.register(*memory)
        self._stack.callback(agent.release, *memory)
        peer = agent.meet(welcome.metadata)
        self._stack.callback(agent.part, welcome.metadata)
        self._there = Blocks(peer, welcome.address, self._offer.blocks, self._offer.layout.block_bytes)
        self._agent = agent

    async def _watch(self, sock: socket.socket) -> None:
        """The owner says nothing, but hangs up."""
        try:
            await asyncio.get_running_loop().sock_recv(sock, 1)
        except OSError:
            pass  # an end, too
        self.lose(ConnectionLost(f"{self._offer.owner} withdrew its region, took it back, or is gone"))

    def _start_next(self) -> bool:
        """Raises ConnectionLost."""
        if self._agent is None or not self._asked or len(self._parts) == UNDER_WAY:
            return False
        backlog = self._asked[0]
        before = backlog.taken_pairs
        runs = backlog.take(self._chunk_bytes, MAX_RUNS)
        if not backlog:
            self._asked.popleft()
        written_pairs = 0 if backlog.is_read else backlog.taken_pairs - before
        size_bytes, now = sum(run.size for run in runs), clock.now()
        operation = self._agent.start(backlog.is_read, self._here, self._there, runs)
        self._parts.append(_Part(operation, size_bytes, len(runs), written_pairs, now))
        return True

    def _finish_first(self) -> bool:
        """Raises ConnectionLost."""
        if not self._parts:
            return False
        first = self._parts[0]
        try:
            if not first.operation.is_done:
                return False
        except ConnectionLost:
            self._parts.popleft().operation.release()
            raise
        self._parts.popleft().operation.release()
        self._note(first)
        return True

    def _note(self, done: _Part) -> None:
        now = self._changed_s = clock.now()
        rate = done.size_bytes / max(now - done.began_s, 1e-6)
        self._chunk_bytes = min(max(int(rate * CHUNK_S), MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
        is_all = not self.is_busy
        self.moved = Moved(
            self.moved.blocks + done.written_pairs,
            self.moved.size_bytes + done.size_bytes,
            self.moved.seconds + (now - self._began_s if is_all else 0.0),
            self.moved.descriptors + done.pieces,
        )
        self._on_moved()
        if is_all:
            self._settled.set()
        if self._is_over:
            self._end_if_quiet()

    def _stop(self) -> None:
        """Starts nothing more."""
        self._is_over = True
        self._asked.clear()
        self._end_if_quiet()

    def _end_if_quiet(self) -> None:
        if self._parts or self._ended.is_set():
            return
        self._ended.set()
        if self._sock is not None:
            try:
                self._sock.send(LEFT if self._is_clean else LOST)
            except OSError:
                pass  # the owner is gone, and with it the need to know


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))
