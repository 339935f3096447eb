"""A process that attaches to a region and then does as it is told, a line of stdin at a time.

`python -m tests.transport.peer OFFER TOKEN WRITER`, the offer as msgpack in hexadecimal. It answers each line with one.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import msgspec

from penstock.transport.api import Offer
from penstock.transport.shm import ShmTransport, _Attachment


def say(answer: object) -> None:
    print(answer, flush=True)


def touch_all(buffer: memoryview) -> int:
    """Minor page faults that writing to every page costs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer[::4096] = bytes(len(buffer[::4096]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def maps_of_a_child() -> int:
    """How many mappings of regions a forked child has."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, b"%d" % Path("/proc/self/maps").read_text().count("penstock-kv"))
        os._exit(0)
    os.wait()
    return int(os.read(reader, 100))


def obey(command: str, attached: _Attachment) -> object:
    buffer = attached.region.buffer
    assert buffer is not None
    match command.split():
        case ["write", at, byte]:
            buffer[int(at)] = int(byte)
            return "wrote"
        case ["read", at]:
            return buffer[int(at)]
        case ["faults"]:
            return touch_all(buffer)
        case ["maps"]:
            return Path("/proc/self/maps").read_text().count("penstock-kv")
        case ["maps-of-a-child"]:
            return maps_of_a_child()
        case ["descriptors"]:
            links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            return sum("penstock-kv" in link.name for link in links)
        case ["close-socket"]:
            attached._sock.shutdown(socket.SHUT_RDWR)
            return "closed"
        case ["stop"]:
            say("stopping")
            os.kill(os.getpid(), signal.SIGSTOP)
            return "continued"
        case _:
            raise ValueError(command)


async def main(offer_hex: str, token: str, writer: str) -> None:
    offer = msgspec.msgpack.decode(bytes.fromhex(offer_hex), type=Offer)
    async with ShmTransport(token).attach(offer, writer) as attached:
        assert isinstance(attached, _Attachment)
        say("attached")
        while (command := sys.stdin.readline().strip()) != "detach":
            say(obey(command, attached))
    say("detached")
    sys.stdin.readline()


asyncio.run(main(*sys.argv[1:]))
