"""Expected start times and broken models, from records."""

from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import AssignmentRecord, NodeRecord, ReplicaRecord, ReplicaState
from gearfall.core.start_timeline import StartTimeline
from services.router.jobs.starts import StartHistory, expected_start_s
from tests.services.router.char_models import NODE, model_record

SMALL = ModelName("small")
MODEL = replace(model_record("small"), size_bytes=2_000_000_000)
STORE = NodeRecord(NODE, "127.0.0.1:1", "/socket", 10, 0, 1e9)
READY = ReplicaRecord(
    WorkerId("w"),
    NODE,
    SMALL,
    ReplicaState.READY,
    8,
    0,
    1,
    0,
    0.0,
    StartTimeline(process_s=0.1, build_s=0.2, first_token_s=0.1),
)


def expect(nodes=(STORE,), assignments=(), history=None) -> float:
    return expected_start_s(
        MODEL,
        nodes=nodes,
        assignments=assignments,
        history=history or StartHistory(),
        now_unix_s=100.0,
    )


def measured() -> StartHistory:
    history = StartHistory()
    history.observe([READY])
    return history


def test_bytes_over_bandwidth_plus_process():
    assert expect(history=measured()) == pytest.approx(2.0 + 0.4)


def test_resident_bytes_cost_nothing():
    resident = replace(STORE, resident=(SMALL,))
    assert expect((STORE, resident), history=measured()) == pytest.approx(0.4)


def test_a_node_that_fetches_it_faster_than_another_reads_it_counts():
    far = replace(STORE, node_id=NodeId("far"), on_ssd=(), remote_bytes_per_s=4e9)
    assert expect((STORE, far), history=measured()) == pytest.approx(0.5 + 0.4)
    slow = replace(far, remote_bytes_per_s=1e8)
    assert expect((STORE, slow), history=measured()) == pytest.approx(2.0 + 0.4)


def test_nodes_with_other_bytes_do_not_count():
    other = replace(STORE, node_id=NodeId("other"), resident=(SMALL,))
    assert expect((STORE, other), history=measured()) == pytest.approx(2.4)


def test_a_start_under_way_is_what_is_left_of_it():
    wish = AssignmentRecord(WorkerId("w"), SMALL, 1, "", 98.0, predicted_start_s=5.0)
    assert expect(assignments=[wish]) == pytest.approx(3.0)
    late = replace(wish, assigned_unix_s=10.0)
    assert 0 < expect(assignments=[late]) < 0.1


def test_another_model_tells_of_the_process():
    other = replace(READY, model=ModelName("other"))
    history = StartHistory()
    history.observe([other])
    assert expect(history=history) == pytest.approx(2.4)


def test_three_failures_in_a_row_break_a_model():
    history, failed = StartHistory(), replace(READY, state=ReplicaState.FAILED, error="bad")
    loading = replace(READY, state=ReplicaState.LOADING)
    for became in (frozenset(), frozenset(), frozenset({SMALL})):
        history.observe([loading])
        assert history.observe([failed]) == became
        assert history.observe([failed]) == frozenset()
    assert history.error_of(SMALL) == "bad"
    history.observe([READY])
    assert history.error_of(SMALL) is None


def test_a_kill_now_and_then_breaks_nothing():
    history, failed = StartHistory(), replace(READY, state=ReplicaState.FAILED)
    for _ in range(20):
        assert history.observe([failed]) == frozenset()
        history.observe([READY])
    assert history.error_of(SMALL) is None


def test_replicas_that_are_gone_give_a_new_chance():
    history, failed = StartHistory(), replace(READY, state=ReplicaState.FAILED)
    for _ in range(3):
        history.observe([replace(READY, state=ReplicaState.LOADING)])
        history.observe([failed])
    assert history.error_of(SMALL) is not None
    history.observe([])
    assert history.error_of(SMALL) is None


def test_a_model_is_not_broken_while_another_worker_tries_it_for_the_first_time():
    history = StartHistory()
    failed = replace(READY, state=ReplicaState.FAILED, error="canary differs")
    retried = replace(failed, state=ReplicaState.STARTING)
    other = replace(READY, worker_id=WorkerId("other"), state=ReplicaState.LOADING)
    for _ in range(3):
        assert history.observe([failed, other]) == frozenset()
        assert history.observe([retried, other]) == frozenset()
    assert history.error_of(SMALL) is None
    other_failed = replace(other, state=ReplicaState.FAILED, error="canary differs too")
    assert history.observe([retried, other_failed]) == {SMALL}
    assert history.error_of(SMALL) == "canary differs too"
    assert history.observe([failed, other_failed]) == frozenset()
