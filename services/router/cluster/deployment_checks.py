"""Whether a deployment can ever run in this cluster: refused with what to change, never ignored.

Only live workers count. While none is up nothing is known about what fits: then only names are
checked.
"""

from collections import Counter
from collections.abc import Mapping

from gearfall.core.deployment import check_deployment_shape, check_stream_mode
from gearfall.core.errors import Conflict, InvalidRequest, NotFound
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ModelRecord, WorkerRecord
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.scheduling.fleet.wants import replica_bytes

_SHOWN = 8


def check_deployment(record: DeploymentRecord, view: ClusterView) -> None:
    """Raise InvalidRequest, NotFound or Conflict when `record` can't be deployed in `view`."""
    check_deployment_shape(record)
    if ModelName(record.name) in view.models:
        raise Conflict(
            f"a model has the name {record.name}: give the deployment another", param="name"
        )
    models = [_model(position, record, view) for position in range(len(record.stages))]
    workers = [each for each in view.workers.values() if each.max_replicas > 0]
    if not workers:
        return
    chosen = _with_labels(record.labels, workers)
    _check_accelerators(record.accelerators, chosen)
    for position, model in enumerate(models):
        param = f"stages[{position}].model"
        large_enough = _that_fit(model, record.accelerators, chosen, param)
        _check_pools(model, large_enough, view, param)


def _model(position: int, record: DeploymentRecord, view: ClusterView) -> ModelRecord:
    """Return what a stage runs on: of a LoRA adapter the base."""
    name, param = record.stages[position].model, f"stages[{position}].model"
    if DeploymentName(name) in view.deployments:
        inner = ", ".join(each.model for each in view.deployments[DeploymentName(name)].stages)
        raise InvalidRequest(
            f"{name} is a deployment, and a cascade's stages are models: name {inner} instead",
            param=param,
        )
    model = view.models.get(name)
    if model is None:
        raise NotFound(f"model {name!r} is not registered: {_known(view)}", param=param)
    if model.is_removing:
        raise Conflict(f"model {name} is being removed: register it again", param=param)
    return view.models.get(ModelName(model.base), model) if model.base else model


def _known(view: ClusterView) -> str:
    names = sorted(view.models)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"registered are {', '.join(names[:_SHOWN])}{more}" if names else "no model is"


def _with_labels(labels: dict[str, str], workers: list[WorkerRecord]) -> list[WorkerRecord]:
    """Return the workers that bear all labels; InvalidRequest when none does."""
    chosen = [each for each in workers if labels.items() <= each.labels.items()]
    if chosen:
        return chosen
    there = sorted({f"{key}={value}" for each in workers for key, value in each.labels.items()})
    unknown = [each for each in _pairs(labels) if each not in there]
    if unknown:
        problem = f"no live worker has label {', '.join(unknown)}"
    else:
        problem = f"no live worker has {', '.join(_pairs(labels))} together"
    existing = f"labels there are: {', '.join(there)}" if there else "none has any label"
    raise InvalidRequest(f"{problem}; {existing}", param="labels")


def _pairs(labels: dict[str, str]) -> list[str]:
    return sorted(f"{key}={value}" for key, value in labels.items())


def _check_accelerators(wanted: int, workers: list[WorkerRecord]) -> None:
    per_node = Counter(each.node_id for each in workers)
    node_id, most = max(per_node.items(), key=lambda item: (item[1], item[0]))
    if wanted > most:
        raise InvalidRequest(
            f"accelerators {wanted}: no node has as many workers that may host it, node {node_id} "
            f"has the most with {most}",
            param="accelerators",
        )


def _that_fit(
    model: ModelRecord, accelerators: int, workers: list[WorkerRecord], param: str
) -> list[WorkerRecord]:
    """Return the workers with the memory for it; InvalidRequest when there is none."""

    def need(worker: WorkerRecord) -> int:
        """Return its share of what the model reserves."""
        return replica_bytes(model, worker.slots, accelerators)

    fitting = [each for each in workers if need(each) <= each.memory_bytes]
    if fitting:
        return fitting
    largest = max(workers, key=lambda each: (each.memory_bytes, each.worker_id))
    raise InvalidRequest(
        f"model {model.name} needs {need(largest)} bytes on each of {accelerators} worker(s), and "
        f"the largest that may host it, {largest.worker_id}, has {largest.memory_bytes}: give "
        "workers more memory or fewer slots, or deploy a smaller model",
        param=param,
    )


def _check_pools(
    model: ModelRecord, workers: list[WorkerRecord], view: ClusterView, param: str
) -> None:
    """Raise InvalidRequest unless one of the workers' nodes can have the model in memory."""
    ids = {each.node_id for each in workers}
    pools = {name: view.nodes[name].dram_capacity_bytes for name in ids if name in view.nodes}
    if not pools or any(size_bytes >= model.size_bytes for size_bytes in pools.values()):
        return
    node_id = max(pools, key=lambda name: (pools[name], name))
    raise InvalidRequest(
        f"model {model.name} has {model.size_bytes} bytes and the largest pool of a node that may "
        f"host it, {node_id}'s, takes {pools[node_id]}: give a store more memory",
        param=param,
    )


def check_is_compared(record: DeploymentRecord, *, has_plan: bool) -> None:
    """Raise InvalidRequest for a shadow share of answers that there is nothing to compare with."""
    if record.shadow_share and len(record.stages) == 1 and not has_plan:
        raise InvalidRequest(
            f"shadow_share {record.shadow_share:g}: {record.name} has one stage, and no other "
            "answer to compare with; leave it out, or deploy a cascade",
            param="shadow_share",
        )


def promised_p95_s(plan: GearPlan) -> list[float]:
    """Return what each gear promises that may come into force, those for a lost node too."""
    ladders = (plan.gears, *(variant.gears for variant in plan.variants))
    return [gear.promise.p95_s for gears in ladders for gear in gears]


def check_plan_fits(
    plan: GearPlan, record: DeploymentRecord, models: Mapping[ModelName, ModelRecord]
) -> None:
    """Raise InvalidRequest for a plan of another deployment, about other checkpoints, or whose
    stages can't be decided as the deployment streams."""
    for gear in (*plan.gears, *(gear for each in plan.variants for gear in each.gears)):
        check_stream_mode(gear.stages, record.streaming.mode, "streaming.mode")
    if plan.name != record.name:
        raise InvalidRequest(
            f"the gear plan is for {plan.name}, the deployment is {record.name}: plan with "
            f"--name {record.name}",
            param="gear_plan",
        )
    for name, digest in plan.models.items():
        known = models.get(ModelName(name))
        if known is None or known.is_removing:
            raise InvalidRequest(
                f"the gear plan needs {name}, which is not registered", param="gear_plan"
            )
        if digest and known.digest != digest:
            raise InvalidRequest(
                f"the gear plan was made for {name} with digest {digest}; the registered one has "
                f"{known.digest}: profile and plan anew",
                param="gear_plan",
            )
