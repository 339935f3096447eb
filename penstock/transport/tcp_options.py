"""What can be set of the `tcp` transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """`host` is where this worker's region is offered, as an address that peers can dial; `port` 0 takes a free one.

    As a writer: `connections` to each peer, over which at most `max_outstanding_bytes` are unacknowledged. A link is
    dialled within `dial_s`, and given up when not a byte moves for `stalled_s`. `has_checksums` None means: unless
    peers are on this host.

    As an owner: how many peers, and of each how many connections and pipes, may be there at one time. A connection
    says whose it is within `hello_s`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    connections: int = 4
    max_outstanding_bytes: int = 64 << 20
    dial_s: float = 5.0
    stalled_s: float = 10.0
    has_checksums: bool | None = None
    hello_s: float = 5.0
    max_peers: int = 256
    max_connections: int = 16
    max_pipes: int = 1024
