"""Room that is being made for a model: nobody else takes it, for a while.

A model may have several claims: one for a replica wanted anywhere, and one for each node where a
gear plan wants one. Where two of them name the same worker, they are for one replica.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.scheduling.due_times import DueTimes

Site = NodeId | None
"""The node where a replica is wanted; None: anywhere."""
_Key = tuple[ModelName, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim on room of some workers, for one replica."""

    bytes_by_worker: Mapping[WorkerId, int]
    since_unix_s: float
    until_unix_s: float


class Claims:
    """Owner of at most one claim for each model and site. Changes return the workers concerned."""

    def __init__(self) -> None:
        self._by_model: dict[ModelName, dict[Site, Claim]] = {}
        self._on_worker: dict[WorkerId, dict[ModelName, int]] = {}
        self._ends: DueTimes[_Key] = DueTimes()

    def put(self, model: ModelName, site: Site, claim: Claim) -> set[WorkerId]:
        """Claim room, in place of what was claimed before for the same site."""
        touched = self.drop(model, site)
        self._by_model.setdefault(model, {})[site] = claim
        self._ends.put((model, site or ""), claim.until_unix_s)
        touched.update(claim.bytes_by_worker)
        return self._recount(model, touched)

    def drop(self, model: ModelName, site: Site) -> set[WorkerId]:
        """Give a claim up, if there is one."""
        mine = self._by_model.get(model, {})
        claim = mine.pop(site, None)
        if claim is None:
            return set()
        if not mine:
            del self._by_model[model]
        self._ends.put((model, site or ""), None)
        return self._recount(model, set(claim.bytes_by_worker))

    def keep(self, model: ModelName, sites: Collection[Site]) -> set[WorkerId]:
        """Give up a model's claims for any other site than these."""
        gone = [site for site in self._by_model.get(model, ()) if site not in sites]
        return self._drop_each((model, site) for site in gone)

    def drop_at(self, model: ModelName, workers: Collection[WorkerId]) -> set[WorkerId]:
        """Give up a model's claims that name any of some workers."""
        mine = self._by_model.get(model, {})
        gone = [
            site
            for site, claim in mine.items()
            if not claim.bytes_by_worker.keys().isdisjoint(workers)
        ]
        return self._drop_each((model, site) for site in gone)

    def drop_expired(self, now_unix_s: float) -> set[WorkerId]:
        """Give up the claims whose time is over."""
        taken = sorted(self._ends.take(now_unix_s))
        return self._drop_each((model, NodeId(site) if site else None) for model, site in taken)

    def of(self, model: ModelName, site: Site) -> Claim | None:
        """Return what is claimed for a model at a site."""
        return self._by_model.get(model, {}).get(site)

    def workers_of(self, model: ModelName) -> set[WorkerId]:
        """Return the workers on which a model claims room, for whatever site."""
        return {
            each
            for claim in self._by_model.get(model, {}).values()
            for each in claim.bytes_by_worker
        }

    def on(self, worker_id: WorkerId) -> Mapping[ModelName, int]:
        """Return the claimed bytes on a worker, by the model that claims them."""
        return self._on_worker.get(worker_id, {})

    def earliest_end(self) -> float | None:
        """Return when the first claim ends."""
        return self._ends.earliest()

    def _drop_each(self, keys: Iterable[tuple[ModelName, Site]]) -> set[WorkerId]:
        return {worker_id for model, site in keys for worker_id in self.drop(model, site)}

    def _recount(self, model: ModelName, workers: set[WorkerId]) -> set[WorkerId]:
        """Have workers say what a model claims of them now; return them."""
        claims = self._by_model.get(model, {}).values()
        for worker_id in workers:
            sizes = [
                each.bytes_by_worker[worker_id]
                for each in claims
                if worker_id in each.bytes_by_worker
            ]
            there = self._on_worker.setdefault(worker_id, {})
            if sizes:
                there[model] = max(sizes)
            else:
                there.pop(model, None)
            if not there:
                del self._on_worker[worker_id]
        return workers
