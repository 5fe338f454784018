"""Holds what a plan promises against what its gears do; raises thresholds that let too much pass.

The evidence is each router's own (`gear_evidence.py`). What follows from it stands in cluster state
(`drift/<deployment>/<cascade>`): all routers heed it for new requests and a new router finds it.
Gears with the same cascade are one. Thresholds are only ever raised; deploying a plan forgets all.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from gearfall.core.errors import GearfallError
from gearfall.core.gears.drift import Compared, cascade_name, deployment_of, joined
from gearfall.core.gears.gear_records import DriftAlarm, DriftRecord, GearPlanRecord
from gearfall.core.ids import DeploymentName
from gearfall.core.records import Stage
from gearfall.infra.state.cluster import Cluster
from services.router.background import Background
from services.router.gears.gear_board import PinnedGear
from services.router.gears.gear_evidence import Finding, GearEvidence
from services.router.gears.quality_metrics import QualityMetrics
from services.router.generation import ChoiceEnd

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
_Key = tuple[DeploymentName, str]
_named = lru_cache(maxsize=1024)(cascade_name)


class QualityWatch:
    """Owner of this router's evidence, and of the gears as they are after all alarms."""

    def __init__(
        self,
        cluster: Cluster,
        planned_gear: Callable[[DeploymentName], PinnedGear | None],
        background: Background,
        metrics: QualityMetrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`planned_gear`: the gear in force as the plan has it. `clock`: seconds of Unix time."""
        self._cluster = cluster
        self._planned_gear = planned_gear
        self._background = background
        self._metrics = metrics
        self._clock = clock
        self._evidence: dict[_Key, tuple[GearPlanRecord, GearEvidence]] = {}
        """With the plan, as it was deployed."""
        self._own: dict[_Key, DriftRecord] = {}
        """Found here by the evidence under the same key, and not seen in cluster state yet."""
        self._shown: set[_Key] = set()
        """Seen in cluster state."""

    def pin(self, name: DeploymentName) -> PinnedGear | None:
        """Return the gear in force with its thresholds as raised; None without a plan."""
        gear = self._planned_gear(name)
        record = (
            None if gear is None else self._record((name, _named(gear.stages)), gear.deployment)
        )
        if gear is None or record is None or record.thresholds == _thresholds(gear.planned):
            return gear
        stages = _raised(gear.planned, record.thresholds)
        return replace(gear, stages=stages, tightened=record.times)

    def answered(self, name: DeploymentName, gear: PinnedGear, end: ChoiceEnd) -> None:
        """A choice ended that was admitted with `gear`."""
        places = {str(stage.model): place for place, stage in enumerate(gear.planned[:-1])}
        for report in end.stages:
            stage = places.get(report.model)
            if stage is None or report.certainty is None:
                continue
            outcome = "up" if report.certainty < (report.threshold or 0.0) else "accepted"
            labels = (name, _named(gear.planned), report.model)
            self._metrics.decisions.labels(*labels, outcome).inc()
            evidence = self._evidence_of(name, gear)
            if evidence is not None:
                self._take(name, gear, stage, evidence.decided(stage, report.certainty))

    def compared(
        self, name: DeploymentName, gear: PinnedGear, stage: int, answer: Compared
    ) -> None:
        """An answer that a stage of `gear` gave was compared with the last stage's."""
        evidence = self._evidence_of(name, gear)
        if evidence is not None:
            self._take(name, gear, stage, evidence.compared(stage, answer))

    def alarms(self) -> list[str]:
        """Say which promises of the plans in force do not hold any more, all routers' findings."""
        return [
            f"{name}, {record.cascade}: {alarm.reason}{_followed(record, alarm)}"
            for name, record in self._in_force()
            for alarm in record.alarms
        ]

    def explain(self, name: str) -> list[tuple[float, str, str]]:
        """Return (Unix time, what, why) about a deployment's promises, newest first."""
        found = [
            (alarm.at_unix_s, f"{alarm.promise} alarm", alarm.reason + _followed(record, alarm))
            for other, record in self._in_force()
            if other == name
            for alarm in record.alarms
        ]
        for (other, cascade), (plan, evidence) in self._evidence.items():
            if other == name:
                words = [evidence.in_words(stage) for stage in range(len(evidence.thresholds))]
                told = f"plan {plan.version}, {cascade}: {'; '.join(words)}"
                found.append((self._clock(), "watched", told))
        if not found:
            record = self._cluster.view.gear_plans.get(DeploymentName(name))
            why = f"plan {record.version}, not yet used" if record else "it follows no gear plan"
            found.append((self._clock(), "nothing measured", why))
        return sorted(found, reverse=True)

    async def run(self) -> None:
        """Notice what other routers found, and plans that are deployed anew, for ever."""
        async for kinds in self._cluster.changes():
            if kinds & {"drift", "gear_plans"}:
                self._follow()

    def _follow(self) -> None:
        view = self._cluster.view
        for key in self._shown - view.drift.keys():
            self._forget(key)
        for key, (watched, _) in tuple(self._evidence.items()):
            if view.gear_plans.get(key[0]) != watched:
                self._forget(key)
        self._shown = set(view.drift)
        for key, record in view.drift.items():
            plan = view.gear_plans.get(key[0])
            if plan and deployment_of(record) == _deployment(plan):
                self._show(record)
            if (own := self._own.get(key)) is not None and _covers(record, own):
                del self._own[key]

    def _forget(self, key: _Key) -> None:
        self._evidence.pop(key, None)
        self._own.pop(key, None)
        self._metrics.forget(key[0])

    def _record(self, key: _Key, deployment: tuple[float, int]) -> DriftRecord | None:
        """Return what became of a deployed plan's cascade, as far as it is known here."""
        view, lower = self._cluster.view, key[1].count(",")
        known = [
            each
            for each in (view.drift.get(key), self._own.get(key))
            if each and deployment_of(each) == deployment and len(each.thresholds) == lower
        ]
        if len(known) < 2:
            return known[0] if known else None
        return joined(*known)

    def _in_force(self) -> Iterator[tuple[DeploymentName, DriftRecord]]:
        view = self._cluster.view
        for key in sorted({*view.drift, *self._own}):
            plan = view.gear_plans.get(key[0])
            record = None if plan is None else self._record(key, _deployment(plan))
            if record is not None:
                yield key[0], record

    def _evidence_of(self, name: DeploymentName, gear: PinnedGear) -> GearEvidence | None:
        """Return the evidence about a gear's cascade.

        None for thresholds, and for a deployment of the plan, that are no longer in force.
        """
        key = (name, _named(gear.planned))
        plan = self._cluster.view.gear_plans.get(name)
        if plan is None or _deployment(plan) != gear.deployment:
            return None
        if key in self._evidence and self._evidence[key][0] != plan:
            self._forget(key)
        record, thresholds = self._record(key, gear.deployment), _thresholds(gear.planned)
        now = thresholds if record is None else record.thresholds
        if now != _thresholds(gear.stages):
            return None
        held = self._evidence.get(key)
        if held is None or held[1].thresholds != now:
            held = (plan, GearEvidence(gear.promise, gear.planned, now))
            self._evidence[key] = held
            self._show_promise(name, gear)
        return held[1]

    def _take(
        self, name: DeploymentName, gear: PinnedGear, stage: int, finding: Finding | None
    ) -> None:
        cascade, model = _named(gear.planned), gear.planned[stage].model
        evidence = self._evidence[name, cascade][1]
        for promise, value in evidence.evidence(stage).items():
            self._metrics.evidence.labels(name, cascade, model, promise).set(value)
        if finding is None or self._is_known(name, gear, finding):
            return
        self._metrics.alarms.labels(name, cascade, model, finding.promise).inc()
        record = self._changed(name, gear, finding)
        _log.warning(
            "a promise does not hold",
            extra={
                "deployment": name,
                "gear": gear.label,
                "promise": finding.promise,
                "reason": finding.reason,
                "thresholds": record.thresholds,
            },
        )
        self._own[name, cascade] = record
        self._show(record)
        self._background.spawn(self._tell((name, cascade)), "drift")

    def _is_known(self, name: DeploymentName, gear: PinnedGear, finding: Finding) -> bool:
        """Whether some router has said so, and nothing new follows."""
        record = self._record((name, _named(gear.planned)), gear.deployment)
        said = {(each.promise, each.stage) for each in record.alarms} if record else set()
        return finding.threshold is None and (finding.promise, finding.stage) in said

    def _changed(self, name: DeploymentName, gear: PinnedGear, finding: Finding) -> DriftRecord:
        cascade = _named(gear.planned)
        record = self._record((name, cascade), gear.deployment) or DriftRecord(
            name,
            cascade,
            gear.version,
            _thresholds(gear.planned),
            deployed_unix_s=gear.deployed_unix_s,
        )
        alarm = DriftAlarm(finding.promise, finding.stage, finding.reason, self._clock())
        changed = joined(record, replace(record, alarms=(alarm,)))
        if finding.threshold is None:
            return changed
        raised = list(record.thresholds)
        raised[finding.stage] = max(raised[finding.stage], finding.threshold)
        return replace(changed, thresholds=tuple(raised), times=record.times + 1)

    async def _tell(self, key: _Key) -> None:
        """Write what was found here until cluster state has it, or a new plan made it void."""
        while (own := self._own.get(key)) is not None:
            try:
                await self._cluster.put_drift(own)
            except GearfallError as error:
                _log.warning("could not write an alarm", extra={"error": error.message})
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _show(self, record: DriftRecord) -> None:
        if record.times:
            names = [part.partition(":")[0] for part in record.cascade.split(",")]
            models = [name.partition("*")[0] for name in names]
            for model, threshold in zip(models, record.thresholds, strict=False):
                labels = (record.name, record.cascade, model)
                self._metrics.tightened.labels(*labels).set(threshold)

    def _show_promise(self, name: DeploymentName, gear: PinnedGear) -> None:
        cascade, promise = _named(gear.planned), gear.promise
        for place, stage in enumerate(gear.planned[:-1]):
            labels = (name, cascade, stage.model)
            reached, above = promise.escalated[place : place + 2]
            shares = {
                "escalation": above / reached if reached > 0 else None,
                "agreement": promise.agreement[place] if promise.agreement else None,
            }
            for kind, share in shares.items():
                if share is not None:
                    self._metrics.promised.labels(*labels, kind).set(share)
                    # An alert on an increase wants a 0 before the 1.
                    self._metrics.alarms.labels(*labels, kind)


def _deployment(plan: GearPlanRecord) -> tuple[float, int]:
    return plan.deployed_unix_s, plan.version


@lru_cache(maxsize=1024)
def _raised(planned: tuple[Stage, ...], thresholds: tuple[float, ...]) -> tuple[Stage, ...]:
    pairs = zip(planned, (*thresholds, None), strict=True)
    return tuple(replace(stage, threshold=threshold) for stage, threshold in pairs)


def _thresholds(stages: tuple[Stage, ...]) -> tuple[float, ...]:
    return tuple(each.threshold or 0.0 for each in stages[:-1])


def _covers(record: DriftRecord, own: DriftRecord) -> bool:
    """Whether cluster state says at least what was found here."""
    return deployment_of(record) == deployment_of(own) and joined(record, own) == record


def _followed(record: DriftRecord, alarm: DriftAlarm) -> str:
    """Say what is done about an alarm."""
    if alarm.promise != "agreement":
        return ""
    planned = record.cascade.split(",")[alarm.stage].partition(":")[2]
    raised = record.thresholds[alarm.stage]
    if planned and raised > float(planned):
        return f"; threshold raised from {float(planned):.4g} to {raised:.4g}"
    return "; no threshold helps: profile and plan anew"
