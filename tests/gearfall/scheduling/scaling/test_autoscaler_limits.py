import pytest

from gearfall.core.ids import ModelName
from gearfall.scheduling.scaling.autoscaler_limits import (
    ModelLimits,
    SchedulerPolicy,
    limits_by_model,
)
from tests.gearfall.scheduling.clusters import by_name, deployment

POLICY = SchedulerPolicy(keep_alive_s=300.0)


def test_limits_are_the_largest_over_deployments():
    found = limits_by_model(
        [ModelName(name) for name in ("small", "large", "plain")],
        by_name(
            deployment("small", "large", name="x", max_replicas=2, keep_alive_s=10.0),
            deployment("small", name="y", min_replicas=1, keep_alive_s=50.0),
        ),
        POLICY,
    )
    assert found[ModelName("small")] == ModelLimits(1, 2, 50.0)
    assert found[ModelName("large")] == ModelLimits(0, 2, 10.0)
    assert found[ModelName("plain")] == ModelLimits(0, 1, 300.0)


@pytest.mark.parametrize(("one", "other", "both"), [(0, 0, 0), (4, 0, 4), (0, 4, 4), (4, 2, 2)])
def test_targets_are_the_strictest_that_is_set(one, other, both):
    deployments = by_name(
        deployment("small", name="x", target_jobs=one, target_queued_tokens=100 * other),
        deployment("small", name="y", target_jobs=other, target_queued_tokens=100 * one),
    )
    found = limits_by_model([ModelName("small")], deployments, POLICY)[ModelName("small")]
    assert (found.target_jobs, found.target_queued_tokens) == (both, 100 * both)
