"""Host memory for regions: files without a name (memfd), zeroed, mapped and faulted in."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from penstock.blocks import KvLayout, Region
from penstock.errors import KvError, SetupError

FAULT_IN_BYTES = 16 << 20  # per turn of the loop

_MADV_POPULATE_READ = 22  # since Linux 5.14; Python 3.11 does not name it


@asynccontextmanager
async def new_region(owner: str, epoch: int, layout: KvLayout, blocks: int) -> AsyncIterator[Region]:
    """See `transport.api.MakeRegion`. Raises KvError at the end if the region is still in use."""
    size_bytes = blocks * layout.block_bytes
    with _memory_file(size_bytes) as descriptor:
        try:
            memory = await mapped(descriptor)
        except OSError as error:
            size_gib = size_bytes / 2**30
            raise SetupError(f"no memory for {size_gib:.2f} GiB of KV ({error.strerror}): take less") from error
        try:
            with memoryview(memory) as buffer:
                yield Region(owner, epoch, layout, blocks, buffer, descriptor)
        finally:
            unmap(memory, owner)


async def mapped(descriptor: int) -> mmap.mmap:
    """Maps a memory file and touches every page of it, a part per turn of the loop. Raises OSError.

    The first touch of a page costs more than copying it, and for a page of shared memory a read is touch enough.
    """
    memory = mmap.mmap(descriptor, 0, mmap.MAP_SHARED)
    try:
        memory.madvise(mmap.MADV_DONTFORK)
        for start in range(0, len(memory), FAULT_IN_BYTES):
            _fault_in(memory, start, min(FAULT_IN_BYTES, len(memory) - start))
            await asyncio.sleep(0)
    except BaseException:
        memory.close()
        raise
    return memory


def unmap(memory: mmap.mmap, owner: str) -> None:
    """Raises KvError while somebody uses it."""
    try:
        memory.close()
    except BufferError as error:
        raise KvError(
            f"the region of {owner} is still in use in this process and stays mapped: "
            "detach the engine from it before leaving the transport's block"
        ) from error


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Closes a file descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _memory_file(size_bytes: int) -> Iterator[int]:
    """Zeroed memory that processes can share. None can shrink it, which would be a crash to the others."""
    with closing(os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as descriptor:
        os.ftruncate(descriptor, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor


def _fault_in(memory: mmap.mmap, start: int, length: int) -> None:
    try:
        memory.madvise(_MADV_POPULATE_READ, start, length)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for page in range(start, start + length, mmap.PAGESIZE):  # an older kernel
            memory[page]
