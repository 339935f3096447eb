"""A network between this host and another, which is a network namespace: packets pass through this process.

`python -m tests.processes.wire NAMESPACE HERE THERE` makes two TUN devices, one in the namespace, with these addresses
of one /30, says "ready", and obeys lines of stdin: `delay_s 0.01`, `loss 0.02`, `up 0`. Kernels without netem have no
other way of losing packets. It needs root.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000


@dataclass
class Wire:
    delay_s: float = 0.0
    loss: float = 0.0
    up: float = 1.0
    rng: random.Random = field(default_factory=lambda: random.Random(1))


def tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


def configure(name: str, address: str, inside: tuple[str, ...]) -> None:
    ip = ("ip", "netns", "exec", *inside, "ip") if inside else ("ip",)
    for command in (
        ("addr", "add", f"{address}/30", "dev", name),
        ("link", "set", name, "mtu", str(MTU), "up"),
        ("link", "set", "lo", "up"),
    ):
        subprocess.run([*ip, *command], check=True)


def relay(ends: tuple[int, int], wire: Wire) -> None:
    """Until stdin ends."""
    on_way: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    while True:
        due = [queue[0][0] for queue in on_way if queue]
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        readable, _, _ = select.select([0, *ends], [], [], timeout)
        if 0 in readable:
            line = sys.stdin.readline().split()
            if not line:
                return
            setattr(wire, line[0], float(line[1]))
            print("done", flush=True)
        for source, queue in zip(ends, on_way, strict=True):
            if source in readable:
                packet = os.read(source, MTU)
                if wire.up and wire.rng.random() >= wire.loss:
                    queue.append((time.monotonic() + wire.delay_s, packet))
        for target, queue in zip(reversed(ends), on_way, strict=True):
            while queue and queue[0][0] <= time.monotonic():
                try:
                    os.write(target, queue.popleft()[1])
                except (BlockingIOError, OSError):
                    pass  # as a switch whose buffer is full


def main() -> None:
    namespace, here, there = sys.argv[1:]
    names = f"pk{os.getpid()}a", f"pk{os.getpid()}b"
    ends = tun(names[0]), tun(names[1])
    subprocess.run(["ip", "link", "set", names[1], "netns", namespace], check=True)
    configure(names[0], here, ())
    configure(names[1], there, (namespace,))
    print("ready", flush=True)
    relay(ends, Wire())


if __name__ == "__main__":
    main()
