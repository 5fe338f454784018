"""Tells the scheduler that jobs wait, again when it changes by much; takes it back when none does.

A model's record is written again at most every REWRITE_S, and all records together at most every
PACE_S on average: with n models waiting each is written again at most every n x PACE_S.

Beside the jobs that wait there are two reasons for a record. A model that is *wanted*: an answer
was given without it, for it was not ready; it counts as one waiting job until it is ready or nobody
has wanted it for WANTED_S, so that it is there for those who come after. One that a request named
is wanted *early*, until its job waits: what lies between may take seconds. And *hints*: drafts on
their way whose certainty falls; they are no waiting jobs, but its bytes are worth bringing close. A
hint holds for HINTED_S, so that drafts that come and go write nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import DemandRecord
from services.router.jobs.backlog import Backlog, has_changed_much

_log = logging.getLogger(__name__)

OVERDUE_S = 0.2
"""A job that waits this long unclaimed is demand, whatever the view says about ready replicas."""
REWRITE_S = 0.1
PACE_S = 0.005
MOST_AT_ONCE = 16
"""Records on their way: whoever comes at once does not wait for each other's round trip."""
WANTED_S = 30.0
HINTED_S = 3.0
_RETRY_S = 0.5
_NONE = Backlog()


class DemandWriter(Protocol):
    """The part of the cluster that demand needs."""

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        """Write the record under the router's lease."""
        ...

    async def delete_demand(self, model: ModelName, router_id: RouterId) -> object:
        """Delete the record."""
        ...


@dataclass(frozen=True, slots=True)
class _Said:
    """What the scheduler was told last, and when on the loop's clock."""

    demand: "_Demand"
    at_s: float


@dataclass(frozen=True, slots=True)
class _Demand:
    """What there is to say about a model."""

    backlog: Backlog
    hinted_jobs: int

    def differs_much(self, said: "_Demand") -> bool:
        """Whether the scheduler has to be told anew."""
        is_new = (self.hinted_jobs == 0) != (said.hinted_jobs == 0)
        return is_new or has_changed_much(said.backlog, self.backlog)


@dataclass(frozen=True, slots=True)
class _Wanted:
    backlog: Backlog
    """As of the first answer that was given without the model."""
    forget: asyncio.TimerHandle


@dataclass(frozen=True, slots=True)
class _Hinted:
    jobs: int
    forget: asyncio.TimerHandle


class DemandBoard:
    """Keeps the demand records of this router true to what waits here. A WaitingRoom."""

    def __init__(
        self,
        writer: DemandWriter,
        router_id: RouterId,
        is_ready: Callable[[ModelName], bool],
    ) -> None:
        """`is_ready`: whether a ready replica of the model is known."""
        self._writer = writer
        self._router_id = router_id
        self._is_ready = is_ready
        self._lease: Lease | None = None
        self._waiting: dict[ModelName, Backlog] = {}
        self._wanted: dict[ModelName, _Wanted] = {}
        self._early: set[ModelName] = set()
        """Of the wanted, those for which a job is about to wait."""
        self._hinted: dict[ModelName, _Hinted] = {}
        self._overdue: set[ModelName] = set()
        self._said: dict[ModelName, _Said] = {}
        self._timers: dict[ModelName, asyncio.TimerHandle] = {}
        """One a model: to its being overdue before it was said, to its being said again after."""
        self._dirty: set[ModelName] = set()
        self._writing: set[ModelName] = set()
        """Models whose record is on its way."""
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> Mapping[ModelName, int]:
        """Unclaimed jobs of this router by model."""
        return {model: backlog.jobs for model, backlog in self._waiting.items()}

    @property
    def backlogs(self) -> Mapping[ModelName, Backlog]:
        """What waits unclaimed at this router, by model."""
        return self._waiting

    @property
    def wanted(self) -> frozenset[ModelName]:
        """Models that are to be there though no job waits for them."""
        return frozenset(self._wanted)

    def oldest_wait_s(self, model: ModelName, *, is_batch: bool) -> float:
        """How long the oldest unclaimed job has waited that such a job waits behind; 0 for none.

        Interactive jobs never wait behind batch jobs.
        """
        waiting = self._waiting.get(model, _NONE)
        since_unix_s = waiting.since_unix_s if is_batch else waiting.interactive_since_unix_s
        return max(0.0, time.time() - since_unix_s) if since_unix_s else 0.0

    def set_waiting(self, model: ModelName, backlog: Backlog) -> None:
        """Take note of what waits for `model` now."""
        if backlog.jobs == 0:
            self._waiting.pop(model, None)
            self._overdue.discard(model)
            self._cancel_timer(model)
            if model in self._said:
                self._touch(model)
            return
        self._waiting[model] = backlog
        if model in self._early:
            self._early.discard(model)
            self._wanted.pop(model).forget.cancel()
        if model in self._timers:
            return
        if model in self._said:
            self._plan_rewrite(model)
            return
        loop = asyncio.get_running_loop()
        self._timers[model] = loop.call_later(OVERDUE_S, self._become_overdue, model)
        if not self._is_ready(model):
            self._touch(model)

    def want(self, model: ModelName, prompt_tokens: int, output_tokens: int) -> None:
        """An answer is given without `model`, which is not ready: have it started all the same."""
        loop = asyncio.get_running_loop()
        self._early.discard(model)
        known = self._wanted.get(model)
        if known is not None:
            known.forget.cancel()
        # One job, however many answers: the model is to be there, not to be there many times.
        backlog = known.backlog if known else Backlog(1, time.time(), prompt_tokens, output_tokens)
        forget = loop.call_later(WANTED_S, self._forget, self._wanted, model)
        self._wanted[model] = _Wanted(backlog, forget)
        if known is None:
            self._touch(model)

    def want_early(self, model: ModelName, output_tokens: int) -> None:
        """A job for `model`, which is not ready, is on its way here: have it started by then."""
        if model not in self._waiting and model not in self._wanted:
            self.want(model, 0, output_tokens)
            self._early.add(model)

    def hint(self, model: ModelName) -> None:
        """A draft is likely to ask for `model`."""
        known = self._hinted.get(model)
        if known is not None:
            known.forget.cancel()
        forget = asyncio.get_running_loop().call_later(HINTED_S, self._forget, self._hinted, model)
        self._hinted[model] = _Hinted(known.jobs + 1 if known else 1, forget)
        if known is None:
            self._touch(model)

    def replicas_changed(self) -> None:
        """What is ready now is not wanted any more."""
        for kind in (self._wanted, self._hinted):
            for model in [each for each in kind if self._is_ready(each)]:
                self._forget(kind, model)

    def set_lease(self, lease: Lease) -> None:
        """The router has a new lease: what stood under the old one is written again."""
        self._lease = lease
        self._overdue |= self._said.keys() & self._waiting.keys()
        self._said.clear()
        self._dirty |= {*self._waiting, *self._wanted, *self._hinted}
        self._wake.set()

    async def run(self) -> None:
        """Write what changed, for ever. A model's writes come one by one; failed ones again."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                self._wake.clear()
                free = MOST_AT_ONCE - len(self._writing)
                for model in tuple(self._dirty - self._writing)[:free]:
                    self._dirty.discard(model)
                    self._writing.add(model)
                    group.create_task(self._write(model))

    async def _write(self, model: ModelName) -> None:
        await self._reconcile(model)
        self._writing.discard(model)
        if self._dirty:
            self._wake.set()

    def _demand(self, model: ModelName) -> _Demand | None:
        """Return what there is to say about a model, None for nothing."""
        waiting, wanted = self._waiting.get(model), self._wanted.get(model)
        hinted = self._hinted.get(model)
        if waiting is None and wanted is None and hinted is None:
            return None
        backlog = waiting or (wanted.backlog if wanted else Backlog())
        return _Demand(backlog, hinted.jobs if hinted else 0)

    def _forget(
        self, kind: dict[ModelName, _Wanted] | dict[ModelName, _Hinted], model: ModelName
    ) -> None:
        kind.pop(model).forget.cancel()
        if model not in self._wanted:
            self._early.discard(model)
        self._touch(model)

    def _become_overdue(self, model: ModelName) -> None:
        self._timers.pop(model, None)
        if model in self._waiting:
            self._overdue.add(model)
            self._touch(model)

    def _plan_rewrite(self, model: ModelName) -> None:
        """Have the record written again once it may be, if it has changed by much."""
        said, demand = self._said.get(model), self._demand(model)
        if said is None or demand is None or not demand.differs_much(said.demand):
            return
        if model in self._timers:
            return
        loop = asyncio.get_running_loop()
        pause_s = max(REWRITE_S, PACE_S * len(self._said))
        self._timers[model] = loop.call_at(said.at_s + pause_s, self._rewrite, model)

    def _rewrite(self, model: ModelName) -> None:
        self._timers.pop(model, None)
        self._touch(model)

    def _cancel_timer(self, model: ModelName) -> None:
        timer = self._timers.pop(model, None)
        if timer is not None:
            timer.cancel()

    def _touch(self, model: ModelName) -> None:
        self._dirty.add(model)
        self._wake.set()

    async def _reconcile(self, model: ModelName) -> None:
        demand, said = self._demand(model), self._said.get(model)
        try:
            if demand is None and said is not None:
                del self._said[model]
                await self._writer.delete_demand(model, self._router_id)
            elif demand is not None and self._lease is not None and self._has_to_say(model, demand):
                await self._publish(model, demand, self._lease)
        except GearfallError as error:
            _log.warning("could not write demand", extra={"model": model, "error": error.message})
            self._try_again(model, said)
        except Exception:
            # One model's record that can't be written must not end the writing of the others'.
            _log.exception("writing demand failed", extra={"model": model})
            self._try_again(model, said)

    def _try_again(self, model: ModelName, said: _Said | None) -> None:
        self._unsay(model, said)
        asyncio.get_running_loop().call_later(_RETRY_S, self._touch, model)

    def _unsay(self, model: ModelName, said: _Said | None) -> None:
        """Take back that something was written; what waits is overdue by the next attempt."""
        if said is None:
            self._said.pop(model, None)
        else:
            self._said[model] = said
        if self._demand(model) is not None:
            self._overdue.add(model)

    def _has_to_say(self, model: ModelName, demand: _Demand) -> bool:
        said = self._said.get(model)
        if said is not None:
            return demand.differs_much(said.demand)
        return model in self._overdue or not self._is_ready(model)

    async def _publish(self, model: ModelName, demand: _Demand, lease: Lease) -> None:
        self._said[model] = _Said(demand, asyncio.get_running_loop().time())
        self._cancel_timer(model)
        waiting = demand.backlog
        record = DemandRecord(
            model,
            self._router_id,
            waiting.jobs,
            waiting.since_unix_s,
            waiting.prompt_tokens,
            waiting.output_tokens,
            waiting.batch_jobs,
            demand.hinted_jobs,
        )
        await self._writer.put_demand(record, lease=lease)
        if self._demand(model) is None:
            self._touch(model)
        else:
            self._plan_rewrite(model)
