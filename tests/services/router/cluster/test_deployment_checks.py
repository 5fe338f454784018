from dataclasses import replace

import pytest

from gearfall.core.errors import Conflict, GearfallError, InvalidRequest, NotFound
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.state.cluster_view import ClusterView
from services.router.cluster.deployment_checks import check_deployment
from tests.gearfall.scheduling.clusters import MIB, by_name, by_node, by_worker, model, node, worker

GIB = 1024 * MIB


def deployment(*models, name="both", **fields) -> DeploymentRecord:
    *below, last = models or ("small",)
    stages = (*(Stage(ModelName(each), 0.5) for each in below), Stage(ModelName(last)))
    return DeploymentRecord(DeploymentName(name), stages, **fields)


def labelled(name, node_id, memory_bytes=GIB, max_replicas=4, **labels):
    made = worker(name, node_id=node_id, memory_bytes=memory_bytes, max_replicas=max_replicas)
    return replace(made, labels=labels)


VIEW = ClusterView(
    models=by_name(
        model("small"),
        replace(model("tuned"), base="small"),
        model("wide", size_bytes=1500 * MIB),
        model("huge", size_bytes=3 * GIB),
        replace(model("lora"), base="huge"),
        replace(model("leaving"), is_removing=True),
    ),
    deployments=by_name(deployment("small", "wide", name="pair")),
    nodes=by_node(node("a", dram_bytes=2 * GIB), node("b", dram_bytes=GIB)),
    workers=by_worker(
        labelled("a1", "a", GIB, zone="x", kind="cpu"),
        labelled("a2", "a", GIB, zone="x"),
        labelled("b1", "b", 4 * GIB, zone="y"),
        labelled("drained", "b", 64 * GIB, 0, zone="z"),
    ),
)


@pytest.mark.parametrize(
    "wanted",
    [
        deployment(),
        deployment("small", "tuned"),
        deployment(labels={"zone": "x", "kind": "cpu"}),
        deployment("wide", accelerators=2, labels={"zone": "x"}),
        deployment(accelerators=2),
        deployment(name="pair"),
    ],
)
def test_what_fits_is_taken(wanted):
    check_deployment(wanted, VIEW)


@pytest.mark.parametrize(
    ("wanted", "error", "param", "says"),
    [
        (deployment("small", "nobody"), NotFound, "stages[1].model", "registered are huge, leav"),
        (deployment("leaving"), Conflict, "stages[0].model", "register it again"),
        (deployment("pair"), InvalidRequest, "stages[0].model", "name small, wide instead"),
        (deployment("pair", name="pair"), InvalidRequest, "stages[0].model", "itself"),
        (deployment("wide", name="small"), Conflict, "name", "another"),
        (deployment(labels={"zone": "q"}), InvalidRequest, "labels", "zone=x, zone=y"),
        (deployment(labels={"zone": "z"}), InvalidRequest, "labels", "no live worker has label"),
        (
            deployment(labels={"zone": "y", "kind": "cpu"}),
            InvalidRequest,
            "labels",
            "kind=cpu, zone=y together",
        ),
        (deployment(accelerators=3), InvalidRequest, "accelerators", "node a has the most with 2"),
        (
            deployment(accelerators=2, labels={"zone": "y"}),
            InvalidRequest,
            "accelerators",
            "node b has the most with 1",
        ),
        (deployment("small", "huge"), InvalidRequest, "stages[1].model", "pool"),
        (deployment("wide"), InvalidRequest, "stages[0].model", f"b's, takes {GIB}"),
        (deployment("lora"), InvalidRequest, "stages[0].model", "model huge"),
        (
            deployment("wide", labels={"zone": "x"}),
            InvalidRequest,
            "stages[0].model",
            f"a2, has {GIB}: give workers more memory",
        ),
        (deployment(min_replicas=2), InvalidRequest, "max_replicas", "raise"),
    ],
)
def test_what_does_not_is_refused_with_what_to_change(wanted, error, param, says):
    with pytest.raises(GearfallError) as refused:
        check_deployment(wanted, VIEW)
    assert type(refused.value) is error
    assert refused.value.param == param
    assert says in refused.value.message


def test_while_no_worker_is_up_only_names_are_checked():
    view = replace(VIEW, workers={})
    check_deployment(deployment("huge", accelerators=8, labels={"zone": "q"}), view)
    with pytest.raises(NotFound):
        check_deployment(deployment("nobody"), view)


def test_the_need_is_said_in_bytes():
    view = replace(VIEW, workers=by_worker(labelled("a1", "a", 100 * MIB)))
    with pytest.raises(InvalidRequest, match=r"needs \d{9} bytes on each of 1 worker"):
        check_deployment(deployment(), view)
