"""Tenants of the cost metrics: as many series as are bounded, and nothing lost beyond."""

from prometheus_client import CollectorRegistry, generate_latest

from services.router.cost_metrics import MAX_TENANTS, OTHERS, CostMetrics
from tests.gearfall.infra.metric_samples import samples_of


def test_tenants_beyond_the_bound_share_a_series():
    registry = CollectorRegistry()
    costs = CostMetrics(registry)
    for round_ in range(2):
        for number in range(MAX_TENANTS + 10):
            costs.for_request("both", f"tenant-{number}").spent("small", 1.0, 2.0 + round_)
    now = samples_of(generate_latest(registry).decode())
    name = "gearfall_device_seconds_total"
    assert now[name, "both", "small", "tenant-0"] == 2.0
    assert now[name, "both", "small", OTHERS] == 20.0
    tenants = [key for key in now if key[0] == name]
    assert len(tenants) == MAX_TENANTS + 1
    assert sum(now[key] for key in tenants) == 2.0 * (MAX_TENANTS + 10)
