"""What can be set of the `nixl` transport."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """`host` is where peers reach this worker; `port` 0 takes a free one. `backends` are NIXL's plugins, and
    `num_threads` the workers that UCX shares transfers out to.

    A pipe is made within `hello_s`, and given up when none of its transfers is done for `stalled_s`. What is under way
    is looked at after `poll_s`, and the longer it takes the more rarely, down to every `progress_s`. An owner looks
    after what arrives at that pace while it has writers, which only networks without RDMA need.
    """

    host: str = "127.0.0.1"
    port: int = 0
    backends: tuple[str, ...] = ("UCX",)
    num_threads: int = 0
    hello_s: float = 5.0
    stalled_s: float = 10.0
    poll_s: float = 20e-6
    progress_s: float = 1e-3
