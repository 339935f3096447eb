"""Who takes part: workers, what they are, how loaded they say they are."""

from __future__ import annotations

from typing import Literal

import msgspec

from penstock.blocks import KvLayout
from penstock.request import Hop

Role = Literal["prefill", "decode", "any"]  # a preference: any worker can do either phase
ROLES: tuple[Role, ...] = ("prefill", "decode", "any")


class StepPrices(msgspec.Struct, frozen=True, array_like=True):
    """What a worker has learned of its steps' times: `prices` of the parts that `policy.latency.steps` lists."""

    prices: tuple[float, ...]
    free_tokens: int = 0
    expert_share: float = 0.0


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's own report. Counters grow from its start; `at_s` is its own clock, good for intervals only."""

    at_s: float = 0.0
    steps: int = 0  # progress: an engine that computes and whose steps stand still is stalled
    step_s: float = 0.0  # what the engine's call in progress should take, all steps of it together; 0: there is none
    busy_s: float = 0.0  # in these steps
    waiting: int = 0  # sequences queued for blocks, and prefills for others until they are done
    running: int = 0  # sequences that hold blocks here: being prefilled here, or decoding
    queued_tokens: int = 0  # prompt tokens waiting to be computed here
    blocks: int = 0
    free_blocks: int = 0  # free or evictable
    leased_blocks: int = 0
    quarantined_blocks: int = 0
    prefill_tokens_per_s: float = 0.0  # 0: not measured yet
    decode_step_s: float = 0.0
    step_prices: StepPrices | None = None
    computed_tokens: int = 0  # of prompts, by this engine, for whomever
    prefills: int = 0  # prompts whose last token was among them
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    handoffs: int = 0  # hand-overs received
    handoff_failures: int = 0
    in_place_bytes: int = 0  # KV handed over without a copy
    copied_bytes: int = 0
    loop_delay_p99_s: float = 0.0  # how late the event loop runs timers


class Member(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker as it announces itself. `epoch` differs between incarnations of one name.

    Workers with equal, non-empty `memory` can map each other's host memory; those with equal, non-empty `domain` can
    write into each other's over links. `device` is the vertex of the topology where its engine is. `kv_events` says
    where it tells what its cache holds: "call" is a call to its addresses, else it is a ZMQ endpoint; empty: nowhere.
    """

    worker: str
    epoch: int
    role: Role
    model: str
    addresses: tuple[str, ...]
    layout: KvLayout
    blocks: int
    max_context_tokens: int  # what its model and its blocks allow
    memory: str = ""
    domain: str = ""
    device: str = ""
    pid: int = 0
    engine: str = ""
    supports: tuple[str, ...] = ()  # optional request features, see engine.api.FEATURES
    labels: dict[str, str] = {}  # such as its zone or rack: requests may require or prefer them
    adapters: tuple[str, ...] = ()  # that it has loaded beside the model
    chunk_tokens: int = 0  # of a prompt that it computes in one step, at most; 0: whole prompts
    kv_events: str = ""
    kv_replay: str = ""  # the ZMQ endpoint that repeats events, if there is one

    @property
    def hop(self) -> Hop:
        return Hop(self.worker, self.epoch, self.addresses)


class Standing(msgspec.Struct, frozen=True):
    """A member with its last report, as discovery hands it to a router."""

    member: Member
    load: Load = Load()
    draining: bool = False


class ModelCard(msgspec.Struct, frozen=True):
    """A model that live workers serve: what a frontend must know to check a request that any of them may get."""

    name: str
    max_context_tokens: int  # prompt and output share it; the least of the workers that serve the model
    supports: tuple[str, ...] = ()
    base: str = ""  # of an adapter: the model that it adapts
