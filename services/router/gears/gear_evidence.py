"""What speaks against the promises of one cascade of a plan, answer by answer, without any I/O.

| promise    | seen on                     | watched               | an alarm means                |
| ---------- | --------------------------- | --------------------- | ----------------------------- |
| escalation | every answer of a stage     | share that goes up,   | requests are not as planned   |
|            | with the planned thresholds | from both sides       | for: so are cost and latency  |
| agreement  | answers that were compared  | share that is not     | lower stages let pass what    |
|            | with the last stage's       | the last stage's      | the last one would not say    |

Rates of false alarms: on average at most one in ESCALATION_ARL answers of a stage, and one in
AGREEMENT_ARL compared ones, at each router. An alarm is raised once; after thresholds were raised
the watch on agreement begins anew.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.gears.drift import (
    Compared,
    ShareWatch,
    seen,
    since_change,
    tightened,
    tolerance,
    watch_share,
)
from gearfall.core.gears.gear_plan import Promise
from gearfall.core.records import Stage

ESCALATION, AGREEMENT = "escalation", "agreement"
ESCALATION_ARL = 1_000_000
AGREEMENT_ARL = 10_000
_KEPT = 256
"""Compared answers that thresholds are chosen on, at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that no longer holds."""

    promise: str
    stage: int
    reason: str
    threshold: float | None = None
    """That the stage should have from now on; None where none would help."""


class GearEvidence:
    """Owner of the evidence against one cascade with the thresholds that are in force."""

    def __init__(
        self, promise: Promise, planned: Sequence[Stage], thresholds: Sequence[float]
    ) -> None:
        """`thresholds` of all stages but the last: those planned, or raised ones."""
        self.thresholds = tuple(thresholds)
        self._promise = promise
        self._planned = tuple(planned)
        below = range(len(planned) - 1)
        self._is_planned = self.thresholds == tuple(each.threshold for each in planned[:-1])
        self._rising = [self._escalation_watch(stage, is_rising=True) for stage in below]
        self._falling = [self._escalation_watch(stage, is_rising=False) for stage in below]
        self._disagreeing = [self._agreement_watch(stage) for stage in below]
        self._compared = [deque[Compared](maxlen=_KEPT) for _ in below]
        self._found: set[tuple[str, int]] = set()

    def decided(self, stage: int, certainty: float) -> Finding | None:
        """A stage's answer was decided on. Nothing is promised about raised thresholds."""
        rising, falling = self._rising[stage], self._falling[stage]
        if rising is None or falling is None or not self._is_planned:
            return None
        goes_up = certainty < self.thresholds[stage]
        rising = self._rising[stage] = seen(rising, goes_up)
        self._falling[stage] = falling = seen(falling, not goes_up)
        if max(rising.evidence, falling.evidence) < 2 * ESCALATION_ARL:
            return None
        promised, off = self._escalation(stage)
        return self._find(
            ESCALATION,
            stage,
            f"{rising.share:.1%} of {rising.answers} answers of {self._planned[stage].model} went "
            f"up, promised were {promised:.1%}, give or take {off:.1%}",
        )

    def compared(self, stage: int, answer: Compared) -> Finding | None:
        """An accepted answer of a stage was compared with the last stage's."""
        watch = self._disagreeing[stage]
        self._compared[stage].append(answer)
        if watch is None:
            return None
        watch = self._disagreeing[stage] = seen(watch, not answer.agreed)
        if watch.evidence < AGREEMENT_ARL or (AGREEMENT, stage) in self._found:
            return None
        recent = since_change(tuple(self._compared[stage]), watch.most)
        raised = tightened(recent, self.thresholds[stage], watch.most)
        agreed = sum(each.agreed for each in recent) / len(recent)
        return self._find(
            AGREEMENT,
            stage,
            f"{agreed:.1%} of the last {len(recent)} compared answers of "
            f"{self._planned[stage].model} agreed with {self._planned[-1].model}, promised were at "
            f"least {1 - watch.most:.1%}",
            raised if raised > self.thresholds[stage] else None,
        )

    def evidence(self, stage: int) -> dict[str, float]:
        """Return what speaks against each promise about a stage: 1 false alarm in so many."""
        rising, falling = self._rising[stage], self._falling[stage]
        found = {}
        if rising is not None and falling is not None and self._is_planned:
            found[ESCALATION] = max(rising.evidence, falling.evidence) / 2
        if (watch := self._disagreeing[stage]) is not None:
            found[AGREEMENT] = watch.evidence
        return found

    def in_words(self, stage: int) -> str:
        """Say what was promised and what is seen."""
        name, parts = self._planned[stage].model, []
        rising, watch = self._rising[stage], self._disagreeing[stage]
        if rising is not None and self._is_planned:
            promised, off = self._escalation(stage)
            parts.append(
                f"{rising.share:.1%} of {rising.answers} answers went up, promised {promised:.1%} "
                f"give or take {off:.1%}"
            )
        if watch is not None:
            parts.append(
                f"{1 - watch.share:.1%} of {watch.answers} compared agreed with "
                f"{self._planned[-1].model}, promised at least {1 - watch.most:.1%}"
            )
        return f"{name}: {'; '.join(parts) or 'nothing is promised'}"

    def _find(
        self, promise: str, stage: int, reason: str, threshold: float | None = None
    ) -> Finding | None:
        if (promise, stage) in self._found:
            return None
        self._found.add((promise, stage))
        return Finding(promise, stage, reason, threshold)

    def _escalation(self, stage: int) -> tuple[float, float]:
        """Return the promised share that goes up from a stage, and how far it may be off."""
        reached, above = self._promise.escalated[stage : stage + 2]
        return above / reached, tolerance(self._promise.queries * reached)

    def _escalation_watch(self, stage: int, *, is_rising: bool) -> ShareWatch | None:
        if self._promise.escalated[stage] <= 0:
            return None
        promised, off = self._escalation(stage)
        return watch_share((promised if is_rising else 1.0 - promised) + off)

    def _agreement_watch(self, stage: int) -> ShareWatch | None:
        if not self._promise.agreement or (share := self._promise.agreement[stage]) is None:
            return None
        return watch_share(1.0 - share + tolerance(self._promise.accepted[stage]))
