"""What answers cost, for Prometheus: device time, arithmetic and starts, by deployment and tenant.

Everything that was spent counts, whatever became of the request: rejected drafts, stages that
failed, answers whose client went away. Only time that an engine had not told before a job was
cancelled is missing. What comparisons spend counts apart (`shadow.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from gearfall.core.certainty.escalation import Degraded
from gearfall.core.ids import DeploymentName, ModelName

MAX_TENANTS = 64
"""Tenants with series of their own; those that come later share one."""
OTHERS = "other"
Shares = Mapping[tuple[DeploymentName, ModelName], float]
"""Of uncertain answers, those that may go up, by deployment and stage."""


class CostMetrics:
    """Counters of one router; `model` is what the client asked for, `stage` a model that ran."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_stage = ["model", "stage", "tenant"]
        self.device_s = Counter(
            "gearfall_device_seconds",
            "Of engines, their steps divided by the tokens that they computed",
            by_stage,
            registry=registry,
        )
        self.flops = Counter(
            "gearfall_cost_flops", "2 x parameters x tokens computed", by_stage, registry=registry
        )
        self.start_s = Counter(
            "gearfall_caused_start_seconds",
            "Expected, of starts that requests caused",
            ["model", "tenant"],
            registry=registry,
        )
        self.degraded = Counter(
            "gearfall_degraded_answers",
            "Uncertain answers that were given because they could not go up",
            ["model", "reason"],
            registry=registry,
        )
        self._share = Gauge(
            "gearfall_escalation_share",
            "Of uncertain answers, those that may go up to the stage; 1 when its queue is short",
            ["model", "stage"],
            registry=registry,
        )
        self.totals: dict[str, Costs] = {}
        """By what clients asked for."""
        self._tenants: set[str] = set()
        self._shares: Callable[[], Shares] = dict

    def for_request(self, deployment: str, tenant: str) -> "RequestCosts":
        """Return where one request's costs go."""
        if tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            tenant = OTHERS
        else:
            self._tenants.add(tenant)
        total = self.totals.setdefault(deployment, Costs())
        return TenantCosts(self, deployment, tenant, total)

    def follow(self, shares: Callable[[], Shares]) -> None:
        """Ask `shares` for what (deployment, stage) may go up, at every scrape."""
        self._shares = shares

    def refresh(self) -> None:
        """Take over what is not counted but asked for."""
        self._share.clear()
        for (deployment, stage), share in self._shares().items():
            self._share.labels(deployment, stage).set(share)


@dataclass(slots=True)
class Costs:
    """What one deployment's requests took since the router began."""

    device_s: float = 0.0
    flops: float = 0.0
    start_s: float = 0.0
    degraded_answers: int = 0


class RequestCosts(Protocol):
    """Where the costs of one request go."""

    def spent(self, stage: str, device_s: float, flops: float) -> None:
        """A stage is over, however it ended."""
        ...

    def started(self, start_s: float) -> None:
        """The request caused a start."""
        ...

    def degraded(self, reason: Degraded) -> None:
        """An uncertain answer was given."""
        ...


@dataclass(frozen=True, slots=True)
class TenantCosts:
    """A client's request: its tenant's, and the deployment's."""

    metrics: CostMetrics
    deployment: str
    tenant: str
    total: Costs

    def spent(self, stage: str, device_s: float, flops: float) -> None:
        """A stage is over, however it ended."""
        self.metrics.device_s.labels(self.deployment, stage, self.tenant).inc(device_s)
        self.metrics.flops.labels(self.deployment, stage, self.tenant).inc(flops)
        self.total.device_s += device_s
        self.total.flops += flops

    def started(self, start_s: float) -> None:
        """The request caused a start."""
        if start_s > 0:
            self.metrics.start_s.labels(self.deployment, self.tenant).inc(start_s)
            self.total.start_s += start_s

    def degraded(self, reason: Degraded) -> None:
        """An uncertain answer was given."""
        self.metrics.degraded.labels(self.deployment, reason.value).inc()
        self.total.degraded_answers += 1
