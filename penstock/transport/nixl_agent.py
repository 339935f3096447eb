"""NIXL's agents, as the `nixl` transport uses them: memory that they know, agents of peers, and blocks on their way.

All of it is used on the I/O thread alone. NIXL lets the interpreter go on while it moves bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from penstock import clock
from penstock.errors import ConnectionLost, MissingExtra
from penstock.transport.nixl_options import Options
from penstock.transport.tcp_backlog import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Memory of `count` blocks, which the agent `peer` knows; "" is the agent asked."""

    peer: str
    address: int
    count: int
    block_bytes: int


class Agent:
    """One of NIXL's agents. Memory and peers are made known to it once, however many use them."""

    def __init__(self, nixl: Any) -> None:
        self._nixl = nixl
        self._memory: dict[tuple[int, int], tuple[Any, int]] = {}  # handle and users, by address and size
        self._peers: dict[bytes, tuple[str, int]] = {}  # name and users, by metadata
        self._lists: dict[Blocks, Any] = {}  # prepared

    @property
    def metadata(self) -> bytes:
        """What a peer must know to reach the memory that is registered now."""
        metadata: bytes = self._nixl.get_agent_metadata()
        return metadata

    def close(self) -> None:
        """Ends its connections: nothing that comes by them is stored any more, nor anything sent.

        That is so however the bytes travel, except that a process of this host may be copying some (CMA). Registering
        the memory anew would do nothing against UCX over TCP, which stores what arrives wherever it says, and bytes of
        a process still arrive after its death. Takes some 70 ms, in which the interpreter waits. Operations must have
        been released.
        """
        for prepared in self._lists.values():
            self._nixl.release_dlist_handle(prepared)
        for handle, _ in self._memory.values():
            self._nixl.deregister_memory(handle)
        self._lists.clear()
        self._memory.clear()
        self._peers.clear()
        self._nixl = None

    def register(self, address: int, size_bytes: int) -> None:
        handle, users = self._memory.get((address, size_bytes), (None, 0))
        if not users:
            handle = self._nixl.register_memory([(address, size_bytes, 0, "")], "DRAM")
        self._memory[(address, size_bytes)] = handle, users + 1

    def release(self, address: int, size_bytes: int) -> None:
        """Undoes one `register`. Of a closed agent nothing is left to release, nor to part from."""
        handle, users = self._memory.pop((address, size_bytes), (None, 0))
        if users > 1:
            self._memory[(address, size_bytes)] = handle, users - 1
        elif users:
            self._forget_lists(lambda blocks: not blocks.peer and blocks.address == address)
            self._nixl.deregister_memory(handle)

    def meet(self, metadata: bytes) -> str:
        """The name of the agent that this is of. Raises ConnectionLost."""
        name, users = self._peers.get(metadata, ("", 0))
        if not users:
            with _telling("reach a peer"):
                found = self._nixl.add_remote_agent(metadata)
                name = found.decode() if isinstance(found, bytes) else str(found)
                self._nixl.make_connection(name)
        self._peers[metadata] = name, users + 1
        return name

    def part(self, metadata: bytes) -> None:
        """Undoes one `meet`."""
        name, users = self._peers.pop(metadata, ("", 0))
        if users > 1:
            self._peers[metadata] = name, users - 1
        elif users:
            self._forget_lists(lambda blocks: blocks.peer == name)
            self._nixl.remove_remote_agent(name)

    def make_progress(self) -> None:
        """Over TCP it is the target's UCX that stores what has arrived, when it is called. Raises ConnectionLost."""
        with _telling("look after what arrives"):
            self._nixl.get_new_notifs()

    def start(self, is_read: bool, here: Blocks, there: Blocks, runs: Sequence[Run]) -> Operation:
        """Has bytes moved between memory here and there: single blocks by their number in prepared lists, others by
        their address. Raises ConnectionLost.
        """
        with _telling("begin a transfer"):
            kind, size = "READ" if is_read else "WRITE", here.block_bytes
            if all(run.size == size for run in runs):
                own, theirs = [run.here // size for run in runs], [run.there // size for run in runs]
                handle = self._nixl.make_prepped_xfer(kind, self._list(here), own, self._list(there), theirs, b"")
            else:
                near = [(here.address + run.here, run.size, 0) for run in runs]
                far = [(there.address + run.there, run.size, 0) for run in runs]
                handle = self._nixl.initialize_xfer(
                    kind, self._descriptors(near), self._descriptors(far), there.peer, b""
                )
        operation = Operation(self._nixl, handle)
        try:
            operation.begin()
        except BaseException:
            operation.release()
            raise
        return operation

    def _list(self, blocks: Blocks) -> Any:
        if blocks not in self._lists:
            size = blocks.block_bytes
            every = self._descriptors([(blocks.address + n * size, size, 0) for n in range(blocks.count)])
            self._lists[blocks] = self._nixl.prep_xfer_dlist(blocks.peer, every)
        return self._lists[blocks]

    def _descriptors(self, ranges: Sequence[tuple[int, int, int]]) -> Any:
        return self._nixl.get_xfer_descs(ranges, "DRAM")

    def _forget_lists(self, is_stale: Callable[[Blocks], bool]) -> None:
        for blocks in [blocks for blocks in self._lists if is_stale(blocks)]:
            self._nixl.release_dlist_handle(self._lists.pop(blocks))


class Operation:
    """Bytes on their way."""

    def __init__(self, nixl: Any, handle: Any) -> None:
        self._nixl = nixl
        self._handle = handle

    def begin(self) -> None:
        """Raises ConnectionLost. Over CMA it is done by then."""
        self._check(self._nixl.transfer)

    @property
    def is_done(self) -> bool:
        """All of it is in place. Raises ConnectionLost if it failed: nobody knows how much is."""
        return self._check(self._nixl.check_xfer_state) == "DONE"

    def release(self) -> None:
        """To be called once. NIXL stops looking after one that is not done, but bytes of it may be on their way."""
        try:
            self._nixl.release_xfer_handle(self._handle)
        except Exception as error:  # they share no class of their own
            log.info("NIXL keeps a transfer until its agent is closed: %r", error)
        self._handle = self._nixl = None

    def _check(self, ask: Callable[[Any], str]) -> str:
        with _telling("finish a transfer"):
            state = ask(self._handle)
        if state not in ("DONE", "PROC"):
            raise ConnectionLost(f"NIXL cannot finish a transfer: it says {state}")
        return state


def new_agent(options: Options) -> Agent:
    """The first one of a process takes some 0.4 s, in which the interpreter goes on. Raises MissingExtra."""
    nixl = _library()
    # Its own progress thread spins, which starves the workers of a small host.
    config = nixl.nixl_agent_config(
        backends=list(options.backends), enable_prog_thread=False, num_threads=options.num_threads
    )
    return Agent(nixl.nixl_agent(f"penstock-{clock.nonce(8).hex()}", config))


def _library() -> Any:
    raises = logging.raiseExceptions
    try:
        nixl = import_module("nixl._api")
    except ImportError as error:
        raise MissingExtra(
            f"the nixl transport needs NIXL ({error}): pip install 'penstock[nixl]', or, beside torch and for one "
            "version of CUDA alone, pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1"
        ) from error
    logging.raiseExceptions = raises  # it sets this, and logs to standard output, which scripts read
    own_log = logging.getLogger("nixl")
    own_log.handlers = [handler for handler in own_log.handlers if type(handler) is not logging.StreamHandler]
    own_log.propagate = True
    return nixl


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Tells NIXL's errors, which share no class of their own, as what they mean."""
    try:
        yield
    except Exception as error:
        raise ConnectionLost(f"NIXL cannot {what}: {error!r}") from error
