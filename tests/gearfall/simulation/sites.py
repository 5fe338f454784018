"""Small simulated fleets for tests."""

from gearfall.core.ids import DeploymentName, ModelName, NodeId, WorkerId
from gearfall.core.records import DeploymentRecord, ModelRecord, Stage, WorkerRecord
from gearfall.simulation.requests import Request, StageWork
from gearfall.simulation.site import (
    Emptying,
    EngineSpeed,
    ModelProfile,
    NodeProfile,
    Site,
    WorkerProfile,
)

GB = 10**9
SPEED = EngineSpeed(prefill_s_per_token=0.001, step_s=0.02, step_s_per_job=0.001, start_s=0.25)


def model_profile(name: str, size_bytes: int = 10 * GB, speed: EngineSpeed = SPEED) -> ModelProfile:
    record = ModelRecord(
        ModelName(name),
        digest="d",
        architecture="opt",
        parameters=size_bytes // 2,
        size_bytes=size_bytes,
        context_tokens=2048,
        vocabulary_size=50_000,
        bos_token_id=1,
        eos_token_ids=(2,),
        source=f"s3://models/{name}",
        nodes=(),
        dtype="float16",
        layers=32,
        kv_bytes_per_token=500_000,
    )
    return ModelProfile(record, speed)


def make_site(
    models: int = 4,
    nodes: int = 2,
    workers_per_node: int = 2,
    *,
    slots: int = 2,
    max_replicas: int = 1,
    dram_gb: int = 30,
    ssd_gb: int = 1000,
    on_ssd: bool = True,
    most: int = 1,
    emptying: Emptying = Emptying.MOVE,
) -> Site:
    profiles = tuple(model_profile(f"m{index}") for index in range(models))
    names = tuple(each.record.name for each in profiles)
    deployments = (
        DeploymentRecord(DeploymentName(name), (Stage(name),), max_replicas=most, keep_alive_s=5.0)
        for name in names
    )
    return Site(
        models=profiles,
        nodes=tuple(
            NodeProfile(
                NodeId(f"n{index}"),
                dram_bytes=dram_gb * GB,
                ssd_bytes=ssd_gb * GB,
                ssd_bytes_per_s=5 * GB,
                remote_bytes_per_s=GB,
                on_ssd=names if on_ssd else (),
            )
            for index in range(nodes)
        ),
        workers=tuple(
            WorkerProfile(
                WorkerRecord(
                    WorkerId(f"n{node}-w{index}"),
                    NodeId(f"n{node}"),
                    address="a",
                    device="cuda",
                    memory_bytes=48 * GB,
                    max_replicas=max_replicas,
                    slots=slots,
                )
            )
            for node in range(nodes)
            for index in range(workers_per_node)
        ),
        deployments={each.name: each for each in deployments},
        emptying=emptying,
    )


def request(number: int, at_s: float, model: str, prompt: int = 10, output: int = 20) -> Request:
    return Request(number, at_s, (StageWork(ModelName(model), prompt, output),))
