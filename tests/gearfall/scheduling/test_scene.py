"""What a start would take on a node, as what is decided in a step changes it."""

import pytest

from gearfall.core.ids import NodeId
from gearfall.core.records import AssignmentRecord, NodeRecord, WorkerRecord
from gearfall.scheduling.estimates.estimator import StartPrediction
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.scene import Scene, predict
from tests.gearfall.scheduling.clusters import MIB, assignment, model, node, worker

NOW = 1_000.0
SIZE = 400 * MIB
LOAD_S = 8.0
OWN, OTHER = (model(name, nodes=("n1",), size_bytes=SIZE) for name in ("own", "other"))


def scene() -> tuple[Fleet, Scene]:
    fleet = Fleet()
    store: NodeRecord = node("n1", on_ssd=("own", "other"), ssd_bytes_per_s=SIZE / LOAD_S)
    host: WorkerRecord = worker("a", node_id="n1")
    for kind, record in (("nodes", store), ("workers", host), ("models", OWN), ("models", OTHER)):
        fleet.put(kind, record)
    return fleet, Scene(fleet, StartCosts(), SchedulerPolicy(), NOW)


def expected(now: Scene) -> StartPrediction:
    prediction = predict(now, OWN, NodeId("n1"))
    assert prediction is not None
    return prediction


def test_a_prediction_is_made_once_until_something_on_its_node_changes():
    fleet, now = scene()
    assert expected(now) is expected(now)
    assert expected(now).queued_s == 0.0
    loading: AssignmentRecord = assignment("other", "a", at=NOW)
    fleet.put("assignments", loading)
    assert expected(now).queued_s == pytest.approx(LOAD_S, rel=0.1)
    fleet.put("nodes", node("n1", resident=("own", "other")))
    assert (expected(now).queued_s, expected(now).load_s) == (0.0, 0.0)


def test_models_and_nodes_are_told_apart():
    _, now = scene()
    assert expected(now).size_bytes == SIZE
    assert predict(now, OWN, NodeId("elsewhere")) is None
    assert predict(now, OTHER, NodeId("n1")) == expected(now)
