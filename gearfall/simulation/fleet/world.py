"""A simulated cluster: cluster state's records, and everybody who writes and follows them.

A change of a record causes a decision a moment later; the decision's actions are written at once
and followed a moment later, as over etcd. Same site, requests and controller: same events.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import AssignmentRecord, ModelRecord
from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Undecide,
    Unwish,
    Wish,
)
from gearfall.simulation.agenda import EPOCH_S, Agenda
from gearfall.simulation.fleet.accelerator_clock import AcceleratorClock
from gearfall.simulation.fleet.controller import Controller
from gearfall.simulation.fleet.node import SimNode
from gearfall.simulation.fleet.replica import SimReplica
from gearfall.simulation.fleet.router import ROUTER, SimRouter
from gearfall.simulation.fleet.tally import Tally
from gearfall.simulation.fleet.transfers import SharedLink
from gearfall.simulation.fleet.worker import ReplicaKey, SimWorkers
from gearfall.simulation.requests import Job, Request, StageOutcome, outcome_of
from gearfall.simulation.site import Site

PATIENCE_S = 3600.0
"""After the last arrival: what has not ended by then is counted as unfinished."""


class World:
    """Owner of a simulation. `run` it once."""

    def __init__(
        self,
        site: Site,
        requests: Iterable[Request],
        controller: Controller,
        *,
        standing: Iterable[AssignmentRecord] = (),
    ) -> None:
        """`standing`: replicas that are ready from the beginning."""
        self.agenda = Agenda()
        self._site = site
        self._controller = controller
        self._requests = tuple(requests)
        self._standing = tuple(standing)
        self.outcomes: list[StageOutcome] = []
        self._unfinished: dict[str, Job] = {}
        self._arrived_jobs = 0
        self._counts: Counter[str] = Counter()
        self._models: dict[ModelName, ModelRecord] = {}
        self._holders: dict[ModelName, list[NodeId]] = {}
        self._ssd_of: dict[NodeId, frozenset[ModelName]] = {}
        self._assignments: dict[ReplicaKey, AssignmentRecord] = {}
        self._published: set[ReplicaKey] = set()
        self._accelerators = AcceleratorClock(
            {w.record.worker_id: w.accelerators for w in site.workers}
        )
        self._is_decision_planned = False
        self._due_s = float("inf")
        remote = SharedLink(self.agenda, site.remote_bytes_per_s)
        sizes = {each.record.name: each.record.size_bytes for each in site.models}
        self.nodes = {
            each.node_id: SimNode(
                each,
                sizes,
                self.agenda,
                (remote, SharedLink(self.agenda, each.ssd_bytes_per_s)),
                self._node_changed,
            )
            for each in site.nodes
        }
        self.router = SimRouter(self.agenda, site.timing, self._put, self._remove_demand)
        self.workers = SimWorkers(
            site,
            self.nodes,
            self.agenda,
            router=self.router,
            publisher=self,
            on_finished=self._job_finished,
        )

    def run(self, *, until_s: float | None = None) -> Tally:
        """Let everything happen until all requests are answered, or `until_s` has come."""
        self._begin()
        last_s = max((each.at_s for each in self._requests), default=0.0)
        end_s = EPOCH_S + (last_s + PATIENCE_S if until_s is None else until_s)
        left = len(self._requests)
        while (left > self._counts["arrived"] or self._unfinished) and self._is_before(end_s):
            self.agenda.step()
        return self._tally()

    def check(self) -> None:
        """Invariant: nobody holds more than there is, and every job is somewhere."""
        for node in self.nodes.values():
            node.check()
        self.workers.check()
        running = sum(len(replica.jobs) for replica in self.workers.replicas.values())
        between = len(self._unfinished) - running - self.router.waiting_jobs
        assert between >= 0, "a job is in two places"
        assert between <= sum(len(r.incoming) for r in self.workers.replicas.values())
        assert self._arrived_jobs == len(self.outcomes) + len(self._unfinished)

    def put_replica(self, replica: SimReplica) -> None:
        """Publish a replica's record."""
        if replica.key not in self._published:
            self._published.add(replica.key)
            self._accelerators.hosts_more(replica.key[0], self.agenda.now_s)
        self._put("replicas", replica.record(self.agenda.now_s, self._site.timing))

    def remove_replica(self, key: ReplicaKey) -> None:
        """A replica is gone; its worker looks whether it is assigned again."""
        self._published.discard(key)
        self._accelerators.hosts_less(key[0], self.agenda.now_s)
        self._controller.remove("replicas", key)
        assignment = self._assignments.get(key)
        if assignment is not None:
            self._follow_soon(assignment)
        self._changed()

    def _begin(self) -> None:
        for model in self._site.models:
            self._models[model.record.name] = model.record
            self._holders[model.record.name] = []
        for node in self.nodes.values():
            for name in node.profile.on_ssd:
                self._holders[name].append(node.node_id)
            self._ssd_of[node.node_id] = frozenset(node.profile.on_ssd)
        for name in self._models:
            self._publish_model(name)
        for deployment in self._site.deployments.values():
            self._put("deployments", deployment)
        for node in self.nodes.values():
            self._put("nodes", node.record())
        for worker in self._site.workers:
            self._put("workers", worker.record)
        for assignment in self._standing:
            self._assignments[assignment.worker_id, assignment.model] = assignment
            self._put("assignments", assignment)
            self.workers.stand(assignment)
        for request in self._requests:
            self.agenda.at(EPOCH_S + request.at_s, partial(self._arrive, request))

    def _is_before(self, end_s: float) -> bool:
        next_s = self.agenda.next_s
        return next_s is not None and next_s <= end_s

    def _arrive(self, request: Request) -> None:
        self._counts["arrived"] += 1
        self._submit(request, 0)

    def _submit(self, request: Request, stage: int) -> None:
        now_s = self.agenda.now_s
        job = Job(request, stage, arrived_s=now_s, waits_since_s=now_s)
        self._arrived_jobs += 1
        self._unfinished[job.job_id] = job
        self.router.submit(job)

    def _job_finished(self, job: Job) -> None:
        del self._unfinished[job.job_id]
        self.router.finished(job)
        self.outcomes.append(outcome_of(job, EPOCH_S))
        if job.work.goes_up and job.stage + 1 < len(job.request.stages):
            self._submit(job.request, job.stage + 1)

    def _put(self, kind: str, record: Any) -> None:
        self._controller.put(kind, record)
        self._changed()

    def _remove_demand(self, model: ModelName) -> None:
        self._controller.remove("demand", (model, ROUTER))
        self._changed()

    def _node_changed(self, node: SimNode) -> None:
        """Publish a node, and the models that it holds now or no longer."""
        record = node.record()
        now, before = frozenset(record.on_ssd or ()), self._ssd_of[node.node_id]
        self._ssd_of[node.node_id] = now
        for name in sorted(now ^ before):
            holders = self._holders[name]
            if name in now:
                holders.append(node.node_id)
            else:
                holders.remove(node.node_id)
            self._publish_model(name)
        self._put("nodes", record)

    def _publish_model(self, name: ModelName) -> None:
        self._models[name] = replace(self._models[name], nodes=tuple(self._holders[name]))
        self._put("models", self._models[name])

    def _changed(self) -> None:
        if not self._is_decision_planned:
            self._is_decision_planned = True
            self.agenda.after(self._site.timing.decide_s, self._decide)

    def _decide(self) -> None:
        self._is_decision_planned = False
        self._counts["decisions"] += 1
        now_s = self.agenda.now_s
        plan = self._controller.decide(now_s)
        for action in plan.actions:
            self._perform(action)
        due_s = plan.next_due_unix_s
        if due_s is not None and not now_s < self._due_s <= due_s:
            self._due_s = max(due_s, now_s)
            self.agenda.at(self._due_s, self._changed)

    def _perform(self, action: Action) -> None:
        follow_s = self._site.timing.follow_s
        match action:
            case Assign(assignment):
                key = (assignment.worker_id, assignment.model)
                assert key not in self._assignments, f"{key} is assigned twice"
                self._assignments[key] = assignment
                self._counts["starts"] += 1
                self._put("assignments", assignment)
                self._follow_soon(assignment)
            case Unassign(key, _):
                self._assignments.pop(key, None)
                self._controller.remove("assignments", key)
                self.agenda.after(follow_s, partial(self._take_back, key))
                self._changed()
            case BeginMove(move):
                self._counts["moves"] += 1
                self._put("moves", move)
            case EndMove(key, _):
                self._controller.remove("moves", key)
                self._changed()
            case Wish(wish):
                self._put("prefetch", wish)
                node = self.nodes[wish.node_id]
                self.agenda.after(follow_s, partial(node.prefetch, wish.model, wish.tier))
            case Unwish((node_id, model) as wish_key, _):
                self._controller.remove("prefetch", wish_key)
                node = self.nodes[node_id]
                self.agenda.after(follow_s, partial(node.cancel_prefetch, model))
                self._changed()
            case Decide(decision):
                self._controller.put("decisions", decision)
            case Undecide(model):
                self._controller.remove("decisions", model)

    def _follow_soon(self, assignment: AssignmentRecord) -> None:
        self.agenda.after(self._site.timing.follow_s, partial(self._follow, assignment))

    def _follow(self, assignment: AssignmentRecord) -> None:
        key = (assignment.worker_id, assignment.model)
        if self._assignments.get(key) is assignment:
            self.workers.follow(assignment)

    def _take_back(self, key: ReplicaKey) -> None:
        if key not in self._assignments:
            self.workers.take_back(key)

    def _tally(self) -> Tally:
        self.check()
        moved = [node.moved for node in self.nodes.values()]
        return Tally(
            arrived=self._arrived_jobs,
            finished=len(self.outcomes),
            waiting=self.router.waiting_jobs,
            running=len(self._unfinished) - self.router.waiting_jobs,
            events=self.agenda.events,
            decisions=self._counts["decisions"],
            starts=self._counts["starts"],
            moves=self._counts["moves"],
            remote_bytes=sum(each.remote for each in moved),
            ssd_bytes=sum(each.ssd for each in moved),
            prefetched_bytes=sum(each.for_prefetch for each in moved),
            device_bytes=self.workers.device_bytes,
            accelerator_s=self._accelerators.used_s(self.agenda.now_s),
            ended_s=self.agenda.now_s - EPOCH_S,
        )
