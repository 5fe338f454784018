"""What is remembered of decisions, whichever scheduler is asked."""

from dataclasses import replace

from gearfall.core.ids import ModelName
from gearfall.core.records import DecisionRecord, ReplicaState
from gearfall.infra.state.change_feed import Change, Changes
from gearfall.infra.state.cluster_view import ClusterView
from services.scheduler.decision_log import KEPT_DECISIONS, DecisionLog
from tests.gearfall.scheduling.clusters import WORKER, by_key, replica

SMALL = ModelName("small")


def decided(at_unix_s: float, decision: str = "start", model: str = SMALL) -> DecisionRecord:
    return DecisionRecord(ModelName(model), at_unix_s, decision, "because", WORKER, 0.5)


def told(log: DecisionLog, *records) -> None:
    changes = [Change(type(each).__name__, "id", each) for each in records]
    log.take_in(Changes(None, tuple(changes), 0))


def test_decisions_come_newest_first_each_start_with_its_time():
    log = DecisionLog()
    told(log, decided(1.0), replica(total_s=0.7), decided(2.0, "stop"), decided(3.0))
    told(log, replace(replica(total_s=0.4), state=ReplicaState.STARTING))
    found = [(each.decision.at_unix_s, each.measured_s) for each in log.of(SMALL)]
    assert found == [(3.0, 0.0), (2.0, 0.0), (1.0, 0.7)]
    told(log, replica(total_s=0.4))
    assert [each.measured_s for each in log.of(SMALL)] == [0.4, 0.0, 0.7]


def test_what_stands_when_it_begins_is_known_and_a_new_listing_repeats_nothing():
    log = DecisionLog()
    view = ClusterView(decisions={SMALL: decided(1.0)}, replicas=by_key(replica(total_s=0.7)))
    for _ in range(2):
        log.take_in(Changes(view, (), 0))
    assert [each.measured_s for each in log.of(SMALL)] == [0.7]
    assert log.of(ModelName("nobody")) == ()


def test_it_does_not_grow_without_bound():
    log = DecisionLog(kept_models=2)
    for number in range(KEPT_DECISIONS + 5):
        told(log, decided(float(number)))
    assert len(log.of(SMALL)) == KEPT_DECISIONS
    told(log, decided(100.0, model="b"), decided(101.0, model="c"))
    assert (log.of(SMALL), len(log.of(ModelName("c")))) == ((), 1)
