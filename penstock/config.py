"""Settings, as the commands take them: parsed once, at the edge, and handed down in small pieces.

Field names are the flags of `penstock` and field docstrings their help. What an engine can be told is its own
`Options`; the common ones have flags here, and a key that the engine does not know stops the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from penstock.cluster import Role
from penstock.errors import SetupError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine computes, and what it is told. What is not set is the engine's choice."""

    engine: str = "embedded"
    """embedded: the model itself, on torch. simulated: modelled time and made-up tokens, no torch."""

    device: str | None = None
    """cpu, cuda, cuda:1, ...; CUDA is used where there is one."""

    dtype: str | None = None
    """float32, bfloat16, ...; by default float32 on the CPU, elsewhere the model's own."""

    threads: int | None = None
    """CPU threads of one worker's steps; by default the workers of `serve` share the cores."""

    block_tokens: int | None = None
    """Tokens in one KV block."""

    max_context_tokens: int | None = None
    """The longest prompt and output together; by default what the model was made for."""

    engine_option: dict[str, str] = field(default_factory=dict)
    """Anything else the engine can be told, as --engine-option.NAME VALUE."""

    def values(self) -> dict[str, str]:
        """What was set, by the names of the engine's options."""
        named = {name: getattr(self, name) for name in _ENGINE_FLAGS}
        return self.engine_option | {name: str(value) for name, value in named.items() if value is not None}


_ENGINE_FLAGS = ("device", "dtype", "threads", "block_tokens", "max_context_tokens")


@dataclass(frozen=True, slots=True)
class KvSettings:
    """A worker's KV cache."""

    kv_gib: float = 0.0
    """GiB of KV cache for each worker; 0 is room for 16 full contexts, but at most a tenth of the free memory."""

    lease_s: float = 5.0
    """Seconds of silence after which a prefill worker loses the blocks it was lent."""

    transport: tuple[str, ...] = ()
    """Ways to the KV of other workers: shm, tcp, nixl; by default shm and tcp for KV in host memory. Settings go with
    the name, as tcp:connections=8,has_checksums=true. The flag may come several times."""

    domain: str = ""
    """Workers of one domain reach each other's KV over links; by default all that are not offered on loopback."""

    @property
    def kv_bytes(self) -> int:
        return int(self.kv_gib * (1 << 30))


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """How many workers of which role; a role is a preference, any worker can do both."""

    prefill: int | None = None
    """Workers that prefer to prefill; 1 by default."""

    decode: int | None = None
    """Workers that prefer to decode; 1 by default."""

    workers: int | None = None
    """Instead of the two: workers that do both."""

    def roles(self) -> dict[str, Role]:
        """Role by worker name. Raises SetupError for counts that contradict each other."""
        if self.workers is not None and (self.prefill is not None or self.decode is not None):
            raise SetupError("--workers K replaces --prefill and --decode: give one or the others")
        either = 0 if self.workers is None else self.workers
        each = 1 if self.workers is None else 0
        counts: list[tuple[str, Role, int]] = [
            ("prefill", "prefill", each if self.prefill is None else self.prefill),
            ("decode", "decode", each if self.decode is None else self.decode),
            ("worker", "any", either),
        ]
        if any(count < 0 for _, _, count in counts) or not any(count for _, _, count in counts):
            raise SetupError("a server needs at least one worker: check --prefill, --decode and --workers")
        return {f"{name}-{index}": role for name, role, count in counts for index in range(count)}


@dataclass(frozen=True, slots=True)
class ListenSettings:
    """Where clients and workers connect. Anything beyond loopback needs a key."""

    host: str = "127.0.0.1"
    """Address for clients."""

    port: int = 8000
    """Port for clients; 0 takes a free one."""

    api_key: str = field(default="", repr=False)
    """What clients must send as their key. Better set PENSTOCK_API_KEY: command lines can be seen by others."""

    join_host: str = "127.0.0.1"
    """Address for workers that join; they need PENSTOCK_TOKEN. KV crosses hosts if it is one that they can dial."""

    join_port: int | None = None
    """Port for workers that join; by default the next after --port."""

    def join_port_after(self, http_port: int) -> int:
        if self.join_port is not None:
            return self.join_port
        return http_port + 1 if self.port else 0


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What requests are admitted for, and who shares the server."""

    ttft_slo: float | None = None
    """Seconds to the first token that are promised: requests that no worker could serve in time wait in a queue that is
    fair to tenants, and are refused where even that will not do; by default all go straight to the workers."""

    ttft_patience: float = 1.0
    """How many times --ttft-slo a request may be expected to take before it is refused."""

    max_queued: int = 256
    """Requests that may wait for their turn. Beyond it whose tenant has most there gets a 429, who is alone a 503."""

    affinity_s: float = 0.25
    """Seconds by which a worker that is preferred, or had the request's session last, may be the slower one."""

    tenants: Path | None = None
    """Who shares the server, as a JSON file: {"NAME": {"key": "API KEY", "weight": 2}, ...}."""

    def __post_init__(self) -> None:
        if self.ttft_slo is not None and not self.ttft_slo > 0:
            raise SetupError(f"--ttft-slo {self.ttft_slo:g} cannot be kept: give seconds above 0")
        if not self.ttft_patience >= 1:
            raise SetupError(
                f"--ttft-patience {self.ttft_patience:g} would refuse what is served in time: give 1 or more"
            )
        if self.max_queued < 0 or not self.affinity_s >= 0:
            raise SetupError("--max-queued and --affinity-s cannot be negative")


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How the model's answers are made and read."""

    generation_config: bool = True
    """Sample as the model's generation_config.json says where a client says nothing."""

    tool_parser: str | None = None
    """How calls of tools are found in answers: hermes, llama3_json, mistral, ... as docs/tools.md lists them, or none;
    by default as the model's chat template suggests."""

    reasoning_parser: str | None = None
    """The same for reasoning: deepseek_r1, qwen3, ... or none."""


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who shares the server. Without a key its requests are those of others that say so in a header."""

    key: Annotated[str, msgspec.Meta(min_length=8)] | None = None
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0

    def __repr__(self) -> str:
        return f"Tenant(weight={self.weight})"


def read_tenants(path: Path | None) -> dict[str, Tenant]:
    """Of such a file, by name. Raises SetupError for one that cannot be read, and for a key that two have."""
    if path is None:
        return {}
    try:
        tenants = msgspec.json.decode(path.read_bytes(), type=dict[str, Tenant])
    except (OSError, msgspec.DecodeError) as error:
        raise SetupError(f"--tenants {path} cannot be read: {error}") from error
    keys = [tenant.key for tenant in tenants.values() if tenant.key is not None]
    if len(set(keys)) < len(keys):
        raise SetupError(f"--tenants {path}: two tenants have the same key, so their requests could not be told apart")
    return tenants


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """What is simulated: every policy at every rate with every split."""

    cluster: Path | None = None
    """A cluster file; by default a small cluster that comes with penstock."""

    trace: Path | None = None
    """Requests from a file: Mooncake's JSONL, or Azure's CSV."""

    workload: str = ""
    """Instead of a file: a kind of workload and its settings, such as chat:rate=4; by default mooncake-like."""

    requests: int | None = None
    """Play only the first so many requests; by default 500 of a workload that was not named, else all."""

    policy: tuple[str, ...] = ("pairs",)
    """Routing policies to compare: names with commas between, or the flag several times."""

    rate: tuple[str, ...] = ("1",)
    """How many times as fast sessions start as the workload has it: 1,2,4."""

    split: tuple[str, ...] = ()
    """Prefill and decode workers, as 8:8,6:10; by default those of the cluster file."""

    fault: tuple[str, ...] = ()
    """What goes wrong, and when in seconds: 60:crash:decode-0 or 90:start:decode-0; also freeze, thaw and drain of
    workers, and cut, slow and restore of links. The flag may come several times."""

    seed: int = 0
    """Another seed, another history; the same seed, the same numbers."""

    jobs: int = 1
    """Simulations at a time, each on a core."""


@dataclass(frozen=True, slots=True)
class TargetSettings:
    """What a request should keep to, for attainment and goodput."""

    slo_ttft: float = 2.0
    """Seconds to the first token."""

    slo_itl: float = 0.05
    """Seconds between the tokens of a request, in its mean."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What is sent, how much, and for how long: every rate, concurrency or speed in turn."""

    rate: tuple[str, ...] = ()
    """Sessions that start per second, whatever the server does: 1,2,4."""

    concurrency: tuple[str, ...] = ()
    """Instead: sessions at a time, each beginning when another one ends: 1,8,64; by default 8."""

    speed: tuple[str, ...] = ()
    """Instead, of a trace or workload: how many times as fast its sessions start, 1,2,4; by default 1."""

    arrivals: Literal["poisson", "constant"] = "poisson"
    """Times between the sessions of --rate."""

    burstiness: float = 1.0
    """Of --rate: below 1 arrivals cluster, above 1 they keep their distance (gamma distributed, as in vLLM)."""

    requests: int | None = None
    """Send so many requests each time; by default all of a trace or workload."""

    duration_s: float | None = None
    """Send for so many seconds each time; by default 20 if nothing else ends it."""

    warmup: int = 4
    """Requests that are sent before and not counted."""

    seed: int | None = None
    """The same seed, the same requests, text included, which a server may still have in its cache; by default a new
    one."""


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """What requests are like: of these lengths, or of a trace or workload as `penstock simulate` takes it."""

    isl: float = 512.0
    """Prompt tokens of a session's first request, in the mean."""

    osl: float = 128.0
    """Output tokens of a request, in the mean."""

    isl_cv: float = 0.0
    """Coefficient of variation of prompt tokens (log-normal); 0: all alike."""

    osl_cv: float = 0.0
    """The same of output tokens."""

    turns: float = 1.0
    """Requests in a session, in the mean (cv 0.5): each has all that was said and answered before."""

    turn_tokens: float = 100.0
    """What a later turn adds, in the mean."""

    pause_s: float = 0.0
    """Between an answer and the next turn, in the mean (cv 1)."""

    prefix_tokens: int = 0
    """Before every prompt, shared with others; of chats the system's message."""

    prefixes: int = 1
    """So many different ones, which sessions take in turn."""

    trace: Path | None = None
    """Requests from a file: Mooncake's JSONL, whose equal hash_ids become equal text, or Azure's CSV."""

    workload: str = ""
    """Instead of a file: a kind of workload and its settings, such as chat:rate=4."""

    max_isl: int | None = None
    """Cut prompts of a trace or workload to so many tokens; a session ends where a later turn would not fit."""

    max_osl: int | None = None
    """Cut its answers to so many."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Whom to ask, and how."""

    model: str = ""
    """By default the one that the server lists."""

    endpoint: Literal["chat", "completions"] = "completions"
    """/v1/chat/completions or /v1/completions."""

    tokenizer: Path | None = None
    """The model's folder: prompts are then words of one token each. Without it, completions get token ids (their number
    is exact) and chats words whose tokens the server is asked for."""

    api_key: str = field(default="", repr=False)
    """The server's key. Better set PENSTOCK_API_KEY: command lines can be seen by others."""

    timeout_s: float = 600.0
    """How long an answer may take."""

    ignore_eos: bool = True
    """Have every answer run to its full length; a field that vLLM, SGLang and penstock know."""

    body: str = ""
    """More fields of every request, as a JSON object; null leaves a field out, such as {"temperature": null}."""


@dataclass(frozen=True, slots=True)
class LoadTargetSettings(TargetSettings):
    """What a request should keep to, for attainment and goodput."""

    slo_e2e: float | None = None
    """Seconds to the end of the answer; by default any."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this disk, and what clients call it. `arguments` make another command find the same one."""

    folder: Path
    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Secrets:
    """`token` opens every plane between processes, `api_key` the HTTP API; an empty key lets everybody in."""

    token: str = field(repr=False)
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All that a server on this machine is told. `leases` is the folder of a file discovery, if one is wanted.

    `policy` is the name of a routing policy, a file of `penstock/policy/routing`; `topology` a topology file.
    """

    model: Model
    secrets: Secrets
    fleet: FleetSettings
    listen: ListenSettings
    engine: EngineSettings
    kv: KvSettings
    leases: Path | None
    policy: str
    topology: Path | None
    answers: AnswerSettings
    service: ServiceSettings
    frontends: int
    ask: bool
    log_level: str


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """All that the process of a worker is told. Exactly one of `join` and `leases` is set.

    `join` is the HOST:PORT of a frontend's registry, `leases` the folder of a file discovery; `host` is the address
    at which other processes reach this worker; requests may ask for its `labels`. `device` is where its engine is in
    the routers' topology file, empty if that is not known. `kv_events` is
    where other routers hear of its prefix cache, as ENDPOINT or ENDPOINT,replay=ENDPOINT.
    """

    name: str
    role: Role
    model: Model
    secrets: Secrets
    join: str
    leases: Path | None
    host: str
    engine: EngineSettings
    kv: KvSettings
    device: str
    labels: dict[str, str]
    kv_events: str = ""


@dataclass(frozen=True, slots=True)
class SharedPort:
    """One of several frontend processes that share a port, the `index`th; they find each other by `mesh`."""

    mesh: str
    index: int
    processes: int

    @classmethod
    def parse(cls, text: str) -> SharedPort:
        """Of MESH:INDEX:PROCESSES, as `str` writes it. Raises SetupError."""
        mesh, index, processes = [*text.split(":"), "", ""][:3]
        if not (mesh and index.isdecimal() and processes.isdecimal() and int(index) < int(processes)):
            raise SetupError(f"{text!r} is no process of several: write MESH:INDEX:PROCESSES")
        return cls(mesh, int(index), int(processes))

    def __str__(self) -> str:
        return f"{self.mesh}:{self.index}:{self.processes}"

    @property
    def name(self) -> str:
        return _name(self.index)

    @property
    def address(self) -> str:
        """At which the other processes find this one."""
        return self._address(self.index)

    def others(self) -> dict[str, str]:
        """Their addresses by name."""
        return {_name(one): self._address(one) for one in range(self.processes) if one != self.index}

    def _address(self, index: int) -> str:
        return f"unix:@penstock-{self.mesh}-{_name(index)}"


def _name(index: int) -> str:
    return f"frontend-{index}"


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """All that the process of a frontend is told, beside the two sockets it is given.

    Workers that join its registry are announced in the folder `leases`, if there is one, and read from there.
    `policy` is the name of a routing policy, `topology` a file that says how workers' devices are wired. `process` says
    which of several processes this is.
    """

    model: Model
    secrets: Secrets
    leases: Path | None
    policy: str
    topology: Path | None
    answers: AnswerSettings
    service: ServiceSettings
    process: SharedPort | None = None


@dataclass(frozen=True, slots=True)
class AttachSettings:
    """Existing servers. Each flag can come several times, or name several servers."""

    attach: tuple[str, ...] = ()
    """OpenAI-compatible servers that do everything, as http://HOST:PORT; where their KV events are, if they do not say
    so themselves, as http://HOST:PORT,events=tcp://HOST:PORT,replay=tcp://HOST:PORT; one of several data-parallel
    engines as http://HOST:PORT,rank=0."""

    prefill: tuple[str, ...] = ()
    """Instead: servers that compute prompts for those of --decode. SGLang's bootstrap port, if it is not 8998, as
    http://HOST:PORT,bootstrap=9000."""

    decode: tuple[str, ...] = ()
    """Servers that take over from those of --prefill, and answer."""

    tokenizer: Path | None = None
    """The model's folder, for its tokenizer and chat template; by default the servers are asked to tokenize (vLLM),
    and where they cannot, prompts are told apart by their text alone."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """All that a router of existing servers is told, beside its socket. `upstream_key` is the key of the servers."""

    servers: AttachSettings
    policy: str
    api_key: str = field(default="", repr=False)
    upstream_key: str = field(default="", repr=False)


def parse(kind: type[T], values: Mapping[str, object], what: str) -> T:
    """The frozen options `kind` from `values`, texts read as numbers where numbers are wanted.

    `what` names their owner to people. Raises SetupError for an unknown key or a value that does not fit.
    """
    known = [option.name for option in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise SetupError(f"{what} has no option {key!r}{suggestion(key, known)}: it has {', '.join(known)}")
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as error:
        raise SetupError(f"an option of {what} does not fit: {error}") from error


def settings(spec: str, what: str) -> dict[str, str]:
    """Those of `name:key=value,key=value`, where `what` is the kind of thing named. Raises SetupError."""
    name, _, listed = spec.partition(":")
    found: dict[str, str] = {}
    for part in listed.split(",") if listed else ():
        key, equals, value = (text.strip() for text in part.partition("="))
        if not (key and equals and value):
            raise SetupError(f"{what} {name!r}: {part!r} is no setting; write them as {name}:key=value,key=value")
        if key in found:
            raise SetupError(f"{what} {name!r}: {key!r} is set twice")
        found[key] = value
    return found


def suggestion(misspelt: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` if something known looks like it, else nothing."""
    from difflib import get_close_matches

    close = get_close_matches(misspelt, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
