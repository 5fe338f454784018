"""What cluster state holds: one frozen record a key, written as JSON, validated when read."""

from dataclasses import dataclass, field
from enum import Enum

from gearfall.core.certainty.escalation import EscalationPolicy
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.generation.job import Priority
from gearfall.core.generation.streaming import Streaming
from gearfall.core.ids import DeploymentName, JobId, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier


class ReplicaState(Enum):
    """Life of a replica."""

    LOADING = "loading"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A registered model; key `models/<name>`, no lease."""

    name: ModelName
    digest: str
    """xxh3_128 hex of the manifest's bytes; names the checkpoint's content."""
    architecture: str
    parameters: int
    size_bytes: int
    context_tokens: int
    vocabulary_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    source: str
    """Directory or URL it was registered from."""
    nodes: tuple[NodeId, ...]
    """Nodes whose store can load it: from its SSD or, if `source` is a URL, from there."""
    dtype: str
    """Of most of its bytes, as torch writes it: bfloat16."""
    layers: int = 0
    kv_bytes_per_token: int = 0
    has_chat_template: bool = False
    files: tuple[str, ...] = ()
    """Small files kept with the checkpoint: config.json, tokenizer.json."""
    is_removing: bool = False
    """Takes no new request and no replica; stores drop it once its replicas are gone."""
    base: str = ""
    """Of a LoRA adapter: the model that it belongs to, whose facts the others repeat, but for
    `parameters`, `size_bytes` and `dtype`. Empty for a model."""
    base_digest: str = ""
    """Of a LoRA adapter: the base's bytes that it fits, and no others."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a cascade; `threshold` is None on the last."""

    model: ModelName
    threshold: float | None = None
    """Certainty in [0, 1] below which the answer goes up."""
    self_consistency: SelfConsistency | None = None
    """The threshold is about how many of several answers are the same; None: about the certainty
    of one answer."""

    @property
    def asked(self) -> "AskedModel":
        """The model and how it is asked."""
        return self.model, self.self_consistency

    def __str__(self) -> str:
        """Return model and number of answers: `small`, `small*3`."""
        several = self.self_consistency
        return f"{self.model}*{several.samples}" if several else str(self.model)


AskedModel = tuple[ModelName, SelfConsistency | None]
"""A model as a stage asks it."""


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A named model or cascade and how it is kept; key `deployments/<name>`, no lease."""

    name: DeploymentName
    stages: tuple[Stage, ...]
    certainty: str = "sequence_probability"
    min_replicas: int = 0
    max_replicas: int = 1
    keep_alive_s: float = 300.0
    target_jobs: int = 0
    """Jobs that one replica should run at once; 0: as many as it has slots."""
    target_queued_tokens: int = 0
    """Tokens to compute, prompt and answer, that may wait for one replica; 0: no such target."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the workers that may host it: every one of these must be there and equal."""
    spread: bool = False
    """Replicas go to different nodes as far as there are any."""
    accelerators: int = 1
    """Workers of one node that a replica of a model needs together, placed whole or not at all."""
    shadow_share: float | None = None
    """Of the requests that a lower stage answered, those asked of the last stage too, to measure
    how often they agree; None: 0.01 with a gear plan, 0 without."""
    cache_bytes: int = 0
    """Memory in each router for whole answers to requests that come again; 0: none are kept."""
    escalation: EscalationPolicy = field(default_factory=EscalationPolicy)
    """What becomes of an uncertain answer that can't go up as the cascade means it."""
    streaming: Streaming = field(default_factory=Streaming)
    """What of an undecided stage's answer a client sees that does not say."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A live store; key `nodes/<node_id>`, under the store's lease."""

    node_id: NodeId
    address: str
    """host:port of the store's gRPC service."""
    attach_socket: str
    """Unix socket path on that node that hands out leases on resident models."""
    dram_capacity_bytes: int
    dram_used_bytes: int
    ssd_bytes_per_s: float
    """Measured by real loads; 0 while unknown."""
    resident: tuple[ModelName, ...] = ()
    """Models in the DRAM pool."""
    remote_bytes_per_s: float = 0.0
    """From elsewhere to SSD, and to DRAM in the same pass; 0 while unknown."""
    ssd_capacity_bytes: int = 0
    ssd_used_bytes: int = 0
    on_ssd: tuple[ModelName, ...] | None = None
    """Models whose bytes are on SSD; those else listed for this node come from elsewhere. None from
    a store that does not say."""
    preparing: tuple[ModelName, ...] = ()
    """Models here whose canary is being computed: their first start waits for it."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A live worker; key `workers/<worker_id>`, under the worker's lease."""

    worker_id: WorkerId
    node_id: NodeId
    address: str
    device: str
    memory_bytes: int
    """Capacity for weights, KV cache and process overhead of all its replicas."""
    max_replicas: int
    labels: dict[str, str] = field(default_factory=dict)
    slots: int = 16
    """Most jobs that one replica here runs at once."""


@dataclass(frozen=True, slots=True)
class AssignmentRecord:
    """The leader's wish that a worker hosts a model; key `assignments/<worker_id>/<model>`.

    Written and deleted by the leader only, fenced by its election revision. The worker reconciles.
    """

    worker_id: WorkerId
    model: ModelName
    memory_bytes: int
    """Reserved on the worker: weights + KV + overhead."""
    reason: str
    assigned_unix_s: float
    predicted_start_s: float = 0.0
    group: tuple[WorkerId, ...] = ()
    """Of a replica on several accelerators: its workers, the one that runs the engine first."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job on a replica, as far as the scheduler has to know it."""

    job_id: JobId
    prompt_tokens: int
    output_tokens: int
    """Produced until `ReplicaRecord.seen_unix_s`."""
    max_tokens: int
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """What a worker really hosts; key `replicas/<worker_id>/<model>`, under the worker's lease."""

    worker_id: WorkerId
    node_id: NodeId
    model: ModelName
    state: ReplicaState
    slots: int
    running_jobs: int
    pid: int
    memory_bytes: int
    idle_since_unix_s: float
    """When it last became idle; 0 while it runs jobs."""
    timeline: StartTimeline = field(default_factory=StartTimeline)
    error: str = ""
    failures: int = 0
    """How often in a row it failed without a token between; 0 since it last served one."""
    adapters: tuple[ModelName, ...] = ()
    """LoRA adapters that it holds beside the model."""
    jobs: tuple[RunningJob, ...] = ()
    """What runs; written when jobs begin or end, and at most once a second while they run."""
    seen_unix_s: float = 0.0
    """When `jobs` was true; 0 from a worker that does not say."""
    step_s: float = 0.0
    """Of one decode step lately; 0 while unknown."""
    slowdown: float = 0.0
    """How much longer its steps took lately than at their best; 0 while unknown."""
    move_fixed_s: float = 0.0
    """Fitted over migrations out of here: seconds a job takes to move whatever its length (`b`)."""
    move_s_per_token: float = 0.0
    """And for each of its tokens, prompt and answer (`a`); both 0 while unknown."""
    is_adrift: bool = False
    """Its assignment went with a cluster state that lost its memory: it serves on, until the leader
    has assigned it anew."""
    kv_share: float = 0.0
    """Of its memory for keys and values, what jobs have; told again when it changed by a tenth."""


@dataclass(frozen=True, slots=True)
class DemandRecord:
    """Jobs that wait at one router for one model; key `demand/<model>/<router_id>`, router's lease.

    Present only while jobs wait without a ready replica (or wait too long): the scheduler is told
    once, not once a request.
    """

    model: ModelName
    router_id: RouterId
    waiting_jobs: int
    since_unix_s: float
    """When the oldest of them began to wait."""
    prompt_tokens: int = 0
    """To prefill for all of them."""
    output_tokens: int = 0
    """That they may produce at most."""
    batch_jobs: int = 0
    """Of the waiting jobs, those of batch priority: they take idle capacity only."""
    hinted_jobs: int = 0
    """None of the waiting jobs: drafts of lower stages whose certainty says that they will ask for
    this model. Its checkpoint is worth bringing close; it starts only where room is free."""


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """What came to one router for one model; key `load/<model>/<router_id>`, router's lease.

    Written at most once a second while it changes. Totals count since the router began.
    """

    model: ModelName
    router_id: RouterId
    at_unix_s: float
    arrived_jobs: int
    """Total."""
    arrived_prompt_tokens: int
    """Total."""
    produced_tokens: int
    """Total."""
    unfinished_jobs: int
    """Waiting or running now."""


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A live router; key `routers/<router_id>`, under the router's lease."""

    router_id: RouterId
    grpc_address: str
    rest_address: str


@dataclass(frozen=True, slots=True)
class SchedulerRecord:
    """Value of the leader key `leader`, and of `schedulers/<id>`; under the scheduler's lease."""

    scheduler_id: str
    address: str


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """A replica under way to another worker, so that a model can start where it is.

    Key `moves/<worker_id>/<model>`, fenced. Written before its first step and deleted after the
    last: a new leader goes on from it or takes it back.
    """

    worker_id: WorkerId
    """That the replica leaves."""
    model: ModelName
    target: WorkerId
    """Where it serves on; its jobs move there alive."""
    for_model: ModelName
    """That starts in its place."""
    reason: str
    began_unix_s: float
    predicted_s: float = 0.0
    """Until the room is free."""


@dataclass(frozen=True, slots=True)
class PrefetchRecord:
    """The leader's wish that a node's store has a model near.

    Key `prefetch/<node_id>/<model>`, fenced. The store reconciles: it brings what is wished for and
    gives up what no longer is.
    """

    node_id: NodeId
    model: ModelName
    tier: Tier
    """SSD or DRAM."""
    reason: str
    wished_unix_s: float


@dataclass(frozen=True, slots=True)
class LearnedRecord:
    """What the leader has learned from starts; key `learned/<subject>`, fenced.

    For the next leader: a cluster's estimates outlive each of its schedulers.
    """

    subject: str
    """What it is about: `starts`, `arrivals`."""
    at_unix_s: float
    content: str
    """JSON of the module that learns it, checked when read."""


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """The leader's last decision about a model; key `decisions/<model>`, fenced."""

    model: ModelName
    at_unix_s: float
    decision: str
    """start, keep, stop or wait."""
    reason: str
    worker_id: str = ""
    predicted_start_s: float = 0.0
    rejected: tuple[tuple[str, str], ...] = ()
    """(alternative, why not), best first, at most 16."""
