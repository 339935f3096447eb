"""What a simulated cluster is: devices and their links, a model, and the workers that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.blocks import Keeps, KvLayout, deal_layers
from penstock.cluster import Role
from penstock.errors import SetupError
from penstock.fabric import Fabric
from penstock.policy.latency.shape import ModelShape
from penstock.policy.latency.steps import StepModel
from penstock.sim.placement import Placement, order

USABLE = 0.9  # of a GPU's memory, as engines are usually told
RESERVE_BYTES = 2 << 30  # of each GPU: context, graphs and activations
MESSAGE_S = 50e-6
REPORT_S = 0.5
MAX_QUEUED = 256
KV_DTYPES = {1.0: "float8_e4m3fn", 2.0: "bfloat16", 4.0: "float32"}  # by bytes of an element


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. `devices` are vertices of the fabric: GPUs that share each layer, or a CPU.

    `step_model` has the true times of its steps; `step_tokens` and `max_running` bound one.
    """

    name: str
    role: Role
    devices: tuple[str, ...]
    step_model: StepModel
    kv_blocks: int
    step_tokens: int
    max_running: int

    @property
    def gpus(self) -> int:
        """A CPU counts as one."""
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """All workers serve `model`; `layout` is that of a whole worker's KV, all its devices together.

    `workers` are in the order in which they were placed. A control message takes `message_s` from any process to any
    other. With `in_place` workers read each other's KV where it lies, as those that share host memory do.
    """

    name: str
    fabric: Fabric
    model: str
    layout: KvLayout
    max_context_tokens: int
    workers: tuple[WorkerSpec, ...]
    placement: Placement = "interleaved"
    message_s: float = MESSAGE_S
    report_s: float = REPORT_S
    max_queued: int = MAX_QUEUED
    in_place: bool = False

    @property
    def gpus(self) -> int:
        """Devices that workers are on, each as often as one has it."""
        return sum(worker.gpus for worker in self.workers)

    def with_split(self, prefill: int, decode: int) -> ClusterSpec:
        """The same devices, dealt to so many prefill and decode workers in the order of `placement`.

        Limits of steps go with the role, step times and room for KV with the devices. Where the cluster has no worker
        of a role, its limits are those of the first worker. Raises SetupError for another number of workers than
        there is, or for workers of unequal size, which cannot change places.
        """
        if prefill < 0 or decode < 0 or prefill + decode != len(self.workers):
            raise SetupError(
                f"split {prefill}:{decode} is not the {len(self.workers)} workers of {self.name}: "
                f"choose two numbers with this sum"
            )
        if len(sizes := sorted({worker.gpus for worker in self.workers})) > 1:
            raise SetupError(
                f"workers of {self.name} have {' or '.join(map(str, sizes))} GPUs, so roles cannot change places: "
                "write a cluster file for each split"
            )
        roles: tuple[Role, Role] = ("prefill", "decode")
        limits = {role: next((w for w in self.workers if w.role == role), self.workers[0]) for role in roles}
        dealt = [roles[index] for index in order((prefill, decode), self.placement)]
        workers = [
            replace(
                worker,
                name=name,
                role=role,
                step_tokens=limits[role].step_tokens,
                max_running=limits[role].max_running,
            )
            for worker, role, name in zip(self.workers, dealt, worker_names(dealt), strict=True)
        ]
        return replace(self, workers=tuple(workers))


def worker_names(roles: Sequence[Role]) -> list[str]:
    """prefill-0, decode-0, prefill-1, ...: numbered by role."""
    seen: dict[Role, int] = {}
    names = []
    for role in roles:
        seen[role] = seen.get(role, -1) + 1
        names.append(f"{role}-{seen[role]}")
    return names


def layout_of(shape: ModelShape, block_tokens: int) -> KvLayout:
    """KV of a whole worker, what several GPUs hold copies of counted once. A latent is one head, half of it keys."""
    dtype = KV_DTYPES[shape.kv_bytes]
    whole: list[Keeps] = ["all"] * (shape.layers - shape.windowed_layers)
    layers, keeps, _ = deal_layers([*whole, *[shape.window - 1] * shape.windowed_layers])
    if (mla := shape.latents) is not None:
        return KvLayout(layers, 1, (mla.kv_rank + mla.rope_dim) // 2, block_tokens, dtype, keeps=keeps)
    return KvLayout(layers, shape.kv_heads, shape.head_dim, block_tokens, dtype, keeps=keeps)


def kv_room_bytes(shape: ModelShape, memory_bytes: float, gpus: int) -> float:
    """What `gpus` of so much memory each can hold of KV beside the weights, copies counted once; negative: too small.

    A GPU has its share of the weights, and of the KV unless it is a latent or has fewer heads than there are GPUs.
    """
    room = gpus * (USABLE * memory_bytes - RESERVE_BYTES) - shape.weights_bytes
    return room / shape.kv_copies(gpus)
