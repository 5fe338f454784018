"""The setting of ServerlessLLM's scheduler evaluation (arXiv 2401.14351, section 7), rebuilt.

docs/simulation.md says for each number here where it comes from, and what the paper reports.
"""

from dataclasses import dataclass

from gearfall.core.ids import DeploymentName, ModelName, NodeId, WorkerId
from gearfall.core.memory import estimate_replica_memory
from gearfall.core.records import DeploymentRecord, ModelRecord, Stage, WorkerRecord
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.arrivals import Bursts, Lengths, Load, bursty_requests
from gearfall.simulation.fleet.scenario import Scenario
from gearfall.simulation.site import (
    EngineSpeed,
    ModelProfile,
    NodeProfile,
    Site,
    WorkerProfile,
)

NODES = 4
ACCELERATORS_PER_NODE = 4
DEVICE_BYTES = 48 * 10**9
DRAM_BYTES = 256 * 10**9
SSD_BYTES = 2_000 * 10**9
SSD_BYTES_PER_S = 5e9
REMOTE_BYTES_PER_S = 1.25e9
DEVICE_BYTES_PER_S = 20e9
DEVICE_READ_BYTES_PER_S = 696e9 * 0.75
PREFILL_SPEED_UP = 10.0
START_S = 0.3
CV = 8.0
CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class OptSize:
    """One size of the OPT family as it is deployed."""

    name: str
    parameters: float
    layers: int
    width: int
    copies: int
    """Models of this size, each taken to be another one."""
    accelerators: int
    """That one replica needs."""

    @property
    def size_bytes(self) -> int:
        """In float16."""
        return int(self.parameters * 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in float16."""
        return 2 * 2 * self.layers * self.width


SIZES = {
    size.name: size
    for size in (
        OptSize("6.7b", 6.66e9, 32, 4096, copies=32, accelerators=1),
        OptSize("13b", 12.85e9, 40, 5120, copies=16, accelerators=1),
        OptSize("30b", 29.97e9, 48, 7168, copies=8, accelerators=2),
    )
}

LENGTHS = {
    "gsm8k": (Lengths(60, 0.4, CONTEXT_TOKENS // 2), Lengths(120, 0.5, CONTEXT_TOKENS // 2)),
    "sharegpt": (Lengths(161, 1.5, CONTEXT_TOKENS // 2), Lengths(338, 0.9, CONTEXT_TOKENS // 2)),
}
"""Prompt and answer by dataset."""


def serverlessllm(
    size: str = "6.7b",
    dataset: str = "gsm8k",
    *,
    per_s: float = 0.8,
    duration_s: float = 1200.0,
    seed: int = 0,
    slots: int = 1,
    ssd_copies: int = NODES,
    dram_copies: int = 0,
    bursts: Bursts = Bursts.FLEET,
    is_filled: bool = True,
) -> Scenario:
    """Return the paper's setting with one model size, dataset and rate.

    `slots`: requests that a replica answers at once; 0 for as many as fit, at most 16.
    `ssd_copies`: nodes whose SSD holds a model at the beginning, the others fetch it.
    `dram_copies`: of each model that fit into all nodes' memory together; 0 for 256 GB a node.
    `is_filled`: whether every node's DRAM holds what fits of its SSD at the beginning, each another
    part first, or nothing.
    """
    opt = SIZES[size]
    models = tuple(_model(opt, number) for number in range(opt.copies))
    slots = slots or most_slots(models[0].record, DEVICE_BYTES * opt.accelerators)
    names = tuple(each.record.name for each in models)
    site = Site(
        models=models,
        nodes=tuple(
            _node(index, names, ssd_copies, opt, pool_bytes(opt, dram_copies), is_filled=is_filled)
            for index in range(NODES)
        ),
        workers=_workers(opt, slots),
        deployments=_deployments(opt, names),
    )
    prompt, output = LENGTHS[dataset]
    load = Load(per_s, duration_s, CV, prompt, output, bursts=bursts)
    requests = bursty_requests(seed, names, load)
    name = f"ServerlessLLM: OPT-{size.upper()} x {opt.copies}, {dataset}, {per_s:g} requests/s"
    return Scenario(name, site, requests, SchedulerPolicy(), seed)


def _model(opt: OptSize, number: int) -> ModelProfile:
    name = ModelName(f"opt-{opt.name}-{number:02}")
    record = ModelRecord(
        name=name,
        digest=f"{number:032x}",
        architecture="OPTForCausalLM",
        parameters=int(opt.parameters),
        size_bytes=opt.size_bytes,
        context_tokens=CONTEXT_TOKENS,
        vocabulary_size=50_272,
        bos_token_id=2,
        eos_token_ids=(2,),
        source=f"s3://checkpoints/{name}",
        nodes=(),
        dtype="float16",
        layers=opt.layers,
        kv_bytes_per_token=opt.kv_bytes_per_token,
    )
    step_s = opt.size_bytes / DEVICE_READ_BYTES_PER_S
    speed = EngineSpeed(
        prefill_s_per_token=step_s / PREFILL_SPEED_UP,
        step_s=step_s,
        step_s_per_job=0.01 * step_s,
        start_s=START_S,
        device_bytes_per_s=DEVICE_BYTES_PER_S * opt.accelerators,
    )
    return ModelProfile(record, speed)


def most_slots(model: ModelRecord, device_bytes: int) -> int:
    """Return how many requests at once a replica has memory for: 16, or half until they fit."""
    slots = 16
    while slots > 1 and estimate_replica_memory(model, slots).total_bytes > device_bytes:
        slots //= 2
    return slots


def pool_bytes(opt: OptSize, dram_copies: int) -> int:
    """Return a node's share of memory for so many copies of each model; 0: what is taken to be."""
    return -(-opt.copies * dram_copies // NODES) * opt.size_bytes or DRAM_BYTES


def _node(
    index: int,
    names: tuple[ModelName, ...],
    ssd_copies: int,
    opt: OptSize,
    dram_bytes: int,
    *,
    is_filled: bool,
) -> NodeProfile:
    by_distance = sorted(enumerate(names), key=lambda each: ((index - each[0]) % NODES, each[0]))
    here = [name for number, name in by_distance if (index - number) % NODES < ssd_copies]
    fitting = dram_bytes // opt.size_bytes if is_filled else 0
    return NodeProfile(
        NodeId(f"node-{index}"),
        dram_bytes=dram_bytes,
        ssd_bytes=SSD_BYTES,
        ssd_bytes_per_s=SSD_BYTES_PER_S,
        remote_bytes_per_s=REMOTE_BYTES_PER_S,
        on_ssd=tuple(here),
        in_dram=tuple(here[:fitting]),
    )


def _workers(opt: OptSize, slots: int) -> tuple[WorkerProfile, ...]:
    """One worker for as many accelerators as a replica needs, and one replica on each."""
    per_node = ACCELERATORS_PER_NODE // opt.accelerators
    return tuple(
        WorkerProfile(
            WorkerRecord(
                WorkerId(f"node-{node}-worker-{number}"),
                NodeId(f"node-{node}"),
                address=f"10.0.{node}.{number}:1",
                device="cuda",
                memory_bytes=DEVICE_BYTES * opt.accelerators,
                max_replicas=1,
                slots=slots,
            ),
            opt.accelerators,
        )
        for node in range(NODES)
        for number in range(per_node)
    )


def _deployments(
    opt: OptSize, names: tuple[ModelName, ...]
) -> dict[DeploymentName, DeploymentRecord]:
    """Each model alone, to and from zero; idle ones stay as long as they took to load."""
    most = NODES * ACCELERATORS_PER_NODE // opt.accelerators
    keep_alive_s = opt.size_bytes / SSD_BYTES_PER_S
    return {
        DeploymentName(name): DeploymentRecord(
            DeploymentName(name), (Stage(name),), max_replicas=most, keep_alive_s=keep_alive_s
        )
        for name in names
    }
