"""Simulated clusters from a short YAML file.

    topology: {preset: hgx-h100, count: 8}    # as in a topology file, or the path of one, or the name of a preset
    model: llama-3-70b                        # or the path of a config.json
    workers:
      - {role: prefill, count: 8, gpus: 4}
      - {role: decode, count: 8, gpus: 4, max_running: 256}

Every mistake is a SetupError that names file, line and field. All fields, beside these three:

    name                what reports call it; by default the file's
    dtype               of weights and products, by default the model's own: bfloat16, fp8, float32
    block_tokens        512
    max_context_tokens  of prompt and output together, 131072, or what the smallest worker holds if that is less
    latency             roofline
                        {silicon: {engine: vllm, model: Qwen/Qwen3-32B, system: h200_sxm}}   by default the device's own
                        {prices: [2e-3, ...], free_tokens: 64}   of a StepModel, as `penstock profile` prints them
    placement           interleaved or packed, see `sim.placement`
    message, report     delay of a control message, 50 us; between reports of a worker, 500 ms
    max_queued          256: what a worker lets wait before it refuses
    in_place            false; true: workers share host memory, and KV is read where it lies

    of workers: role (prefill, decode, any), count (1), gpus (1) or CPU cores, step_tokens (8192 of a prefill worker,
    else 2048), max_running (256), kv_gib (what memory the weights leave;
    copies that GPUs have of the same KV count once), on: [names of domains], across_nodes (false)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import msgspec

from penstock.blocks import KvLayout
from penstock.cluster import Role
from penstock.config import suggestion
from penstock.errors import SetupError, UnsupportedModel
from penstock.fabric import NVLINK, Fabric
from penstock.policy.latency.device import Rank, cpu, find_rank
from penstock.policy.latency.fit import believe
from penstock.policy.latency.roofline import Roofline
from penstock.policy.latency.shape import MODELS, ModelShape, shape_of
from penstock.policy.latency.silicon import Silicon
from penstock.policy.latency.steps import StepModel
from penstock.sim.cluster import (
    MAX_QUEUED,
    MESSAGE_S,
    REPORT_S,
    ClusterSpec,
    WorkerSpec,
    kv_room_bytes,
    layout_of,
    worker_names,
)
from penstock.sim.placement import Group, Placement, place
from penstock.topology.build import PRESETS, build
from penstock.topology.document import Field, parse
from penstock.topology.document import read as read_document
from penstock.topology.file import FileTopology, Options, fabric_of

TOP = (
    *("name", "topology", "model", "dtype", "block_tokens", "max_context_tokens", "latency", "workers", "placement"),
    *("message", "report", "max_queued", "in_place"),
)
WORKER = ("role", "count", "gpus", "cores", "step_tokens", "max_running", "kv_gib", "on", "across_nodes")
LATENCY = ("silicon", "prices", "free_tokens")
SILICON = ("engine", "model", "system")
ENGINES = ("vllm", "sglang", "trtllm")
ROLES: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "any": "any"}
PLACEMENTS: dict[str, Placement] = {"interleaved": "interleaved", "packed": "packed"}
DTYPES = {"bfloat16": (2.0, 2.0), "fp8": (1.0, 2.0), "float32": (4.0, 4.0)}  # bytes of a weight, and of KV

REMEDY = "write `topology:`, `model:` and `workers:`"
BLOCK_TOKENS = 512
CONTEXT_TOKENS = 131_072
STEP_TOKENS: dict[Role, int] = {"prefill": 8192, "decode": 2048, "any": 2048}
RUNNING = 256
MOST = 1_000_000
MEASURED_DOUBT = 0.1  # of prices that somebody measured

DEFAULT = """
name: 8 x H100
topology: hgx-h100
model: llama-3-8b
workers:
  - {role: prefill, count: 4}
  - {role: decode, count: 4}
"""

Priced = Callable[[Rank, int], StepModel]  # the step times of a worker on so many such ranks


@dataclass(frozen=True, slots=True)
class _Workers:
    """One item of `workers`. `kv_bytes` 0: what memory is left."""

    field: Field
    group: Group
    cores: int
    step_tokens: int
    max_running: int
    kv_bytes: float


def read(path: Path) -> ClusterSpec:
    """The cluster that a file describes; paths in it are relative to its folder."""
    return _cluster(read_document(path, REMEDY), path.parent, path.stem)


def described(text: str, where: str) -> ClusterSpec:
    """The cluster that `text` describes as a file would; `where` is what errors call it."""
    return _cluster(parse(text, where, REMEDY), Path(), where)


def default() -> ClusterSpec:
    """What is simulated if nobody says: one server of 8 H100, each serving Llama-3-8B, half of them prefilling."""
    return described(DEFAULT, "the default cluster")


def _cluster(top: Field, folder: Path, name: str) -> ClusterSpec:
    fields = top.fields(TOP)
    for needed in ("topology", "model", "workers"):
        if needed not in fields:
            raise top.wrong(f"needs `{needed}`")
    fabric = _fabric(fields["topology"], folder)
    model, shape = _model(fields["model"], fields.get("dtype"), folder)
    layout = layout_of(shape, _whole(fields, "block_tokens", BLOCK_TOKENS))
    listed = [_workers(item, fabric) for item in fields["workers"].items()]
    if not listed:
        raise fields["workers"].wrong("needs at least one group, such as {role: any, count: 8}")
    placement = PLACEMENTS[fields["placement"].choice(PLACEMENTS)] if "placement" in fields else "interleaved"
    priced = _priced(fields.get("latency"), shape, fields["model"], folder)
    workers = _placed(fields["workers"], listed, fabric, placement, shape, layout, priced)
    return ClusterSpec(
        name=fields["name"].text() if "name" in fields else name,
        fabric=fabric,
        model=model,
        layout=layout,
        max_context_tokens=_context_tokens(fields, workers, layout),
        workers=workers,
        placement=placement,
        message_s=fields["message"].quantity("time") if "message" in fields else MESSAGE_S,
        report_s=fields["report"].positive("time") if "report" in fields else REPORT_S,
        max_queued=_whole(fields, "max_queued", MAX_QUEUED),
        in_place="in_place" in fields and fields["in_place"].flag(),
    )


def _whole(fields: Mapping[str, Field], name: str, default: int, most: int = MOST) -> int:
    return fields[name].whole(1, most) if name in fields else default


# What there is


def _fabric(field: Field, folder: Path) -> Fabric:
    if not field.is_single():
        return fabric_of(field)
    text = field.text()
    if text in PRESETS:
        return build([PRESETS[text]])
    if not text.endswith((".yaml", ".yml")):
        known = ", ".join(PRESETS)
        raise field.wrong(f"{text!r} is neither a .yaml file nor a preset{suggestion(text, PRESETS)}: there is {known}")
    return FileTopology(Options(folder / text)).load()


def _model(field: Field, dtype: Field | None, folder: Path) -> tuple[str, ModelShape]:
    """Its name and shape. Names are found whatever their case; a folder stands for the config.json in it."""
    name, shape = _named_model(field, folder)
    if dtype is None:
        return name, shape
    weight_bytes, kv_bytes = DTYPES[dtype.choice(DTYPES)]
    return name, msgspec.structs.replace(
        shape, dtype=dtype.text(), weight_bytes=weight_bytes, expert_bytes=weight_bytes, kv_bytes=kv_bytes
    )


def _named_model(field: Field, folder: Path) -> tuple[str, ModelShape]:
    text = field.text()
    names = {name.lower(): name for name in MODELS}
    if text.lower() in names:
        return names[text.lower()], MODELS[names[text.lower()]]
    config = _config_path(folder / text)
    if not config.is_file():
        known = ", ".join(names)
        raise field.wrong(
            f"{text!r} is neither a config.json nor known{suggestion(text.lower(), names)}: there is {known}"
        )
    try:
        return config.resolve().parent.name, shape_of(json.loads(config.read_text(encoding="utf-8")))
    except (UnsupportedModel, ValueError) as error:
        raise field.wrong(f"{config}: {error}") from None


def _config_path(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


# How long steps take


def _priced(field: Field | None, shape: ModelShape, model: Field, folder: Path) -> Priced:
    """How step times are found. A worker of many has those of the first on such devices."""
    if field is None or field.is_text("roofline"):
        return cache(lambda rank, gpus: Roofline(shape, rank, gpus).prior())
    if field.is_single():
        raise field.wrong(f"is `roofline`, or has one of these fields: {', '.join(LATENCY)}")
    fields = field.fields(LATENCY)
    if ("silicon" in fields) == ("prices" in fields):
        raise field.wrong("needs `silicon` or `prices`, and not both")
    if "prices" in fields:
        prices = _prices(fields, shape)
        return lambda rank, gpus: prices
    return _silicon(fields["silicon"], shape, model, folder)


def _prices(fields: Mapping[str, Field], shape: ModelShape) -> StepModel:
    prices = [item.amount() for item in fields["prices"].items()]
    parts = 6 if shape.experts else 5
    if len(prices) != parts:
        raise fields["prices"].wrong(f"has {len(prices)} prices, and a step of this model has {parts} parts")
    free_tokens = fields["free_tokens"].whole(0, MOST) if "free_tokens" in fields else 0
    line = believe(prices, MEASURED_DOUBT, [1e-12] * parts)
    return StepModel(line, free_tokens, shape.expert_share)


def _silicon(field: Field, shape: ModelShape, model: Field, folder: Path) -> Priced:
    fields = field.fields(SILICON)
    engine = fields["engine"].choice(ENGINES) if "engine" in fields else "vllm"
    named = fields.get("model", model).text()
    if "model" not in fields and named.lower() in (name.lower() for name in MODELS):
        raise field.wrong("needs `model`: a hub id that aiconfigurator-core knows, such as Qwen/Qwen3-32B")
    path = _config_path(folder / named)
    source = str(path.parent) if path.is_file() else named

    @cache
    def priced(rank: Rank, gpus: int) -> StepModel:
        system = fields["system"].text() if "system" in fields else rank.sheet.model
        return Silicon(source, system, engine, gpus).prior(expert_share=shape.expert_share)

    return priced


# Workers


def _workers(item: Field, fabric: Fabric) -> _Workers:
    fields = item.fields(WORKER)
    if "role" not in fields:
        raise item.wrong(f"needs `role`: {', '.join(ROLES)}")
    if "cores" in fields and "gpus" in fields:
        raise fields["cores"].wrong("is instead of `gpus`: a worker is on CPU cores or on GPUs")
    if "cores" in fields and "kv_gib" not in fields:
        raise item.wrong("needs `kv_gib`: nobody knows what else a CPU's memory is for")
    role = ROLES[fields["role"].choice(ROLES)]
    group = Group(
        role,
        count=_whole(fields, "count", 1),
        gpus=0 if "cores" in fields else _whole(fields, "gpus", 1),
        on=tuple(_domain(name, fabric) for name in fields["on"].items()) if "on" in fields else (),
        across_nodes="across_nodes" in fields and fields["across_nodes"].flag(),
    )
    kv_gib = fields["kv_gib"].amount() if "kv_gib" in fields else 0.0
    return _Workers(
        item,
        group,
        cores=_whole(fields, "cores", 0),
        step_tokens=_whole(fields, "step_tokens", STEP_TOKENS[role]),
        max_running=_whole(fields, "max_running", RUNNING),
        kv_bytes=kv_gib * 2**30,
    )


def _domain(field: Field, fabric: Fabric) -> str:
    name = field.text()
    if name not in fabric.vertices:
        raise field.wrong(f"there is no {name!r} in the topology{suggestion(name, fabric.vertices)}")
    return name


def _placed(
    field: Field,
    listed: list[_Workers],
    fabric: Fabric,
    placement: Placement,
    shape: ModelShape,
    layout: KvLayout,
    priced: Priced,
) -> tuple[WorkerSpec, ...]:
    try:
        placed = place(fabric, [workers.group for workers in listed], placement)
    except SetupError as error:
        raise field.wrong(str(error)) from None
    chosen = [listed[index] for index, _ in placed]
    names = worker_names([workers.group.role for workers in chosen])
    specs = []
    for name, workers, (_, devices) in zip(names, chosen, placed, strict=True):
        rank = cpu(workers.cores) if workers.cores else _rank(workers, fabric, devices)
        specs.append(
            WorkerSpec(
                name=name,
                role=workers.group.role,
                devices=devices,
                step_model=priced(rank, len(devices)),
                kv_blocks=_kv_blocks(workers, rank, shape, layout),
                step_tokens=workers.step_tokens,
                max_running=workers.max_running,
            )
        )
    return tuple(specs)


def _rank(workers: _Workers, fabric: Fabric, devices: tuple[str, ...]) -> Rank:
    """A GPU of this worker. What an all-reduce gets is known for some GPUs on NVLink, else it is the slowest link's."""
    sheets = [sheet for device in devices if (sheet := fabric.vertices[device].device) is not None]
    if len(Counter(sheets)) > 1:
        raise workers.field.wrong(f"would have one worker on GPUs of several kinds: {', '.join(devices)}")
    sheet = sheets[0]
    if not (sheet.bf16_flops_per_s and sheet.memory_bytes_per_s):
        raise workers.field.wrong(
            f"the topology does not say how fast {sheet.model} is: give its `gpu` bf16 and memory_bandwidth"
        )
    known = find_rank(sheet)
    if known is not None and len({fabric.find_domain(device, NVLINK) for device in devices} - {None}) == 1:
        return known
    paths = [fabric.path(one, other) for one, other in pairwise(devices)]
    return Rank(sheet, min((path.bytes_per_s for path in paths), default=0.0))


def _kv_blocks(workers: _Workers, rank: Rank, shape: ModelShape, layout: KvLayout) -> int:
    """Of `kv_gib`, or of what memory the weights leave; the former is checked where the memory is known."""
    gpus, sheet, wanted_bytes = workers.group.gpus, rank.sheet, workers.kv_bytes
    least_bytes = len(layout.keeps) * layout.block_bytes
    if gpus and sheet.memory_bytes:
        room_bytes = kv_room_bytes(shape, sheet.memory_bytes, gpus)
        if room_bytes < least_bytes:
            raise workers.field.wrong(
                f"weights of {shape.weights_bytes / 2**30:.0f} GiB leave no room for KV on {gpus} x {sheet.model} of "
                f"{sheet.memory_bytes / 2**30:.0f} GiB: raise `gpus`"
            )
        if wanted_bytes > room_bytes:
            raise workers.field.wrong(f"kv_gib: beside the weights there is room for {room_bytes / 2**30:.1f} GiB")
        wanted_bytes = wanted_bytes or room_bytes
    elif not wanted_bytes:
        raise workers.field.wrong(f"needs `kv_gib`: the topology does not say how much memory {sheet.model} has")
    if wanted_bytes < least_bytes:
        raise workers.field.wrong(f"kv_gib: {layout.block_tokens} tokens take {least_bytes / 2**30:.3g} GiB")
    return int(wanted_bytes // layout.block_bytes)


def _context_tokens(fields: Mapping[str, Field], workers: tuple[WorkerSpec, ...], layout: KvLayout) -> int:
    most = 100 * MOST
    room_tokens = min(layout.tokens_in(worker.kv_blocks, worker.step_tokens, most) for worker in workers)
    if "max_context_tokens" not in fields:
        return min(CONTEXT_TOKENS, room_tokens)
    tokens = fields["max_context_tokens"].whole(2, most)
    if tokens > room_tokens:
        raise fields["max_context_tokens"].wrong(
            f"{tokens} is more than the {room_tokens} that the smallest worker holds"
        )
    return tokens
