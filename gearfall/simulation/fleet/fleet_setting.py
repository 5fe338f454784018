"""A fleet of any size for replaying traces: models of mixed sizes, three SSD copies of each."""

from dataclasses import dataclass

from gearfall.core.ids import DeploymentName, ModelName, NodeId, WorkerId
from gearfall.core.records import DeploymentRecord, ModelRecord, Stage, WorkerRecord
from gearfall.simulation.site import (
    EngineSpeed,
    ModelProfile,
    NodeProfile,
    Site,
    WorkerProfile,
)

BILLIONS = (1.0, 3.0, 7.0, 8.0, 13.0)
"""Parameters of the models, in turn."""
DEVICE_READ_BYTES_PER_S = 696e9 * 0.75
DEVICE_BYTES_PER_S = 20e9
COPIES = 3


@dataclass(frozen=True, slots=True)
class FleetShape:
    """How large a fleet is."""

    nodes: int = 10
    models: int = 100
    workers_per_node: int = 4
    slots: int = 8


def fleet_site(shape: FleetShape) -> Site:
    """Return nodes like those of ServerlessLLM's setting, with models of mixed sizes."""
    models = tuple(_model(index) for index in range(shape.models))
    on_ssd: list[list[ModelName]] = [[] for _ in range(shape.nodes)]
    for index, model in enumerate(models):
        for copy in range(min(COPIES, shape.nodes)):
            # Steps that differ from model to model, so that no two nodes hold all the same.
            step = 1 + index // shape.nodes % max(1, shape.nodes // COPIES)
            on_ssd[(index + copy * step) % shape.nodes].append(model.record.name)
    return Site(
        models=models,
        nodes=tuple(
            NodeProfile(
                NodeId(f"node-{index}"),
                dram_bytes=256 * 10**9,
                ssd_bytes=4_000 * 10**9,
                ssd_bytes_per_s=5e9,
                remote_bytes_per_s=1.25e9,
                on_ssd=tuple(dict.fromkeys(names)),
            )
            for index, names in enumerate(on_ssd)
        ),
        workers=tuple(
            WorkerProfile(
                WorkerRecord(
                    WorkerId(f"node-{node}-worker-{number}"),
                    NodeId(f"node-{node}"),
                    address="10.0.0.1:1",
                    device="cuda",
                    memory_bytes=48 * 10**9,
                    max_replicas=2,
                    slots=shape.slots,
                )
            )
            for node in range(shape.nodes)
            for number in range(shape.workers_per_node)
        ),
        deployments=_deployments(models),
    )


def _model(index: int) -> ModelProfile:
    parameters = BILLIONS[index % len(BILLIONS)] * 1e9
    size_bytes = int(parameters * 2)
    name = ModelName(f"model-{index:04}")
    record = ModelRecord(
        name=name,
        digest=f"{index:032x}",
        architecture="LlamaForCausalLM",
        parameters=int(parameters),
        size_bytes=size_bytes,
        context_tokens=8192,
        vocabulary_size=128_000,
        bos_token_id=1,
        eos_token_ids=(2,),
        source=f"s3://checkpoints/{name}",
        nodes=(),
        dtype="bfloat16",
        layers=32,
        kv_bytes_per_token=65_536,
    )
    step_s = size_bytes / DEVICE_READ_BYTES_PER_S
    speed = EngineSpeed(
        prefill_s_per_token=step_s / 100.0,
        step_s=step_s,
        step_s_per_job=0.01 * step_s,
        start_s=0.3,
        device_bytes_per_s=DEVICE_BYTES_PER_S,
    )
    return ModelProfile(record, speed)


def _deployments(models: tuple[ModelProfile, ...]) -> dict[DeploymentName, DeploymentRecord]:
    found = {}
    for model in models:
        name = DeploymentName(model.record.name)
        stages = (Stage(model.record.name),)
        found[name] = DeploymentRecord(name, stages, max_replicas=4, keep_alive_s=60.0)
    return found
