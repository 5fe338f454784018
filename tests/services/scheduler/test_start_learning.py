from dataclasses import replace

import pytest

from gearfall.core.records import ReplicaState
from gearfall.scheduling.estimates.start_costs import StartOutcome
from services.scheduler.start_learning import StartLearning
from tests.gearfall.scheduling.clusters import assignment, model, replica


@pytest.fixture
def outcomes() -> list[StartOutcome]:
    return []


@pytest.fixture
def learning(outcomes: list[StartOutcome]) -> StartLearning:
    return StartLearning(outcomes.append)


def test_each_start_is_learned_once(learning, outcomes):
    wish = replace(assignment(), predicted_start_s=0.5)
    for record in (replica(state=ReplicaState.STARTING, total_s=0.7), replica(total_s=0.7)) * 2:
        learning.take(record, wish, model())
    assert [(o.predicted_s, o.measured_s) for o in outcomes] == [(0.5, 0.7)]


def test_a_restart_teaches_and_is_compared_with_no_prediction(learning, outcomes):
    wish = replace(assignment(), predicted_start_s=0.5)
    learning.take(replica(total_s=0.7), wish, model())
    learning.take(replace(replica(total_s=0.2), pid=2), wish, model())
    assert len(outcomes) == 1
    assert [o.measured_s for o in learning.costs.outcomes] == [0.7, 0.2]


def test_a_new_assignment_is_a_new_prediction(learning, outcomes):
    wish = replace(assignment(), predicted_start_s=0.5)
    learning.take(replica(total_s=0.7), wish, model())
    learning.forget_absent([])
    again = replace(wish, assigned_unix_s=wish.assigned_unix_s + 9.0)
    learning.take(replica(total_s=0.7), again, model())
    assert len(outcomes) == 2


def test_what_another_learned_is_gone_on_from_and_not_learned_again(learning, outcomes):
    wish = replace(assignment(), predicted_start_s=0.5)
    learning.take(replica(total_s=0.7), wish, model())
    next_one = StartLearning(outcomes.append)
    next_one.restore(learning.costs)
    next_one.skip(replica(total_s=0.7), wish)
    next_one.take(replica(total_s=0.7), wish, model())
    assert next_one.costs == learning.costs
    next_one.take(replace(replica(total_s=0.2), pid=2), wish, model())
    assert [o.measured_s for o in next_one.costs.outcomes] == [0.7, 0.2]
    assert len(outcomes) == 1


def test_replicas_of_models_that_are_gone_teach_nothing(learning, outcomes):
    learning.take(replica(total_s=0.7), assignment(), None)
    assert not outcomes
    assert not learning.costs.outcomes
