"""Small clusters as records, for the tests of the scheduler."""

from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.records import (
    AssignmentRecord,
    DemandRecord,
    DeploymentRecord,
    ModelRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    Stage,
    WorkerRecord,
)
from gearfall.core.start_timeline import StartTimeline

NODE = NodeId("node-a")
WORKER = WorkerId("worker-a")
MIB = 1024 * 1024


def model(
    name="small", *, size_bytes=10 * MIB, nodes=(NODE,), context_tokens=128, source="/models/small"
) -> ModelRecord:
    return ModelRecord(
        name=ModelName(name),
        digest="d" * 32,
        architecture="LlamaForCausalLM",
        parameters=size_bytes // 2,
        size_bytes=size_bytes,
        context_tokens=context_tokens,
        vocabulary_size=17,
        bos_token_id=None,
        eos_token_ids=(2,),
        source=source,
        nodes=tuple(NodeId(n) for n in nodes),
        dtype="bfloat16",
        kv_bytes_per_token=1024,
    )


def node(
    name=NODE,
    *,
    resident=(),
    on_ssd=None,
    ssd_bytes_per_s=0.0,
    remote_bytes_per_s=0.0,
    dram_bytes=1 << 30,
) -> NodeRecord:
    return NodeRecord(
        node_id=NodeId(name),
        address="127.0.0.1:1",
        attach_socket="/run/store.sock",
        dram_capacity_bytes=dram_bytes,
        dram_used_bytes=0,
        ssd_bytes_per_s=ssd_bytes_per_s,
        resident=tuple(ModelName(m) for m in resident),
        remote_bytes_per_s=remote_bytes_per_s,
        on_ssd=None if on_ssd is None else tuple(ModelName(m) for m in on_ssd),
    )


def worker(name=WORKER, *, node_id=NODE, memory_bytes=1 << 30, max_replicas=4) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(name),
        node_id=NodeId(node_id),
        address="127.0.0.1:2",
        device="cpu",
        memory_bytes=memory_bytes,
        max_replicas=max_replicas,
    )


def assignment(
    model_name="small", worker_id=WORKER, *, memory_bytes=100 * MIB, at=0.0
) -> AssignmentRecord:
    return AssignmentRecord(WorkerId(worker_id), ModelName(model_name), memory_bytes, "test", at)


def replica(
    model_name="small",
    worker_id=WORKER,
    *,
    state=ReplicaState.READY,
    idle_since=0.0,
    memory_bytes=100 * MIB,
    slots=16,
    total_s=0.0,
    error="",
    failures=0,
) -> ReplicaRecord:
    return ReplicaRecord(
        worker_id=WorkerId(worker_id),
        node_id=NODE,
        model=ModelName(model_name),
        state=state,
        slots=slots,
        running_jobs=0 if idle_since else 1,
        pid=1,
        memory_bytes=memory_bytes,
        idle_since_unix_s=idle_since,
        timeline=StartTimeline(total_s=total_s),
        error=error,
        failures=failures,
    )


def demand(model_name="small", *, jobs=1, since=0.0, router="router-a") -> DemandRecord:
    return DemandRecord(ModelName(model_name), RouterId(router), jobs, since)


def deployment(
    *models, name="answers", min_replicas=0, max_replicas=1, keep_alive_s=300.0, **fields
) -> DeploymentRecord:
    return DeploymentRecord(
        DeploymentName(name),
        tuple(Stage(ModelName(m)) for m in models),
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        keep_alive_s=keep_alive_s,
        **fields,
    )


def by_name(*records):
    return {record.name: record for record in records}


def by_node(*records):
    return {record.node_id: record for record in records}


def by_worker(*records):
    return {record.worker_id: record for record in records}


def by_key(*records):
    return {(record.worker_id, record.model): record for record in records}
