"""A simulated store: one load however many ask, tiers, eviction, demand before prefetch."""

import pytest

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.tiers import Tier
from gearfall.simulation.agenda import EPOCH_S, Agenda
from gearfall.simulation.fleet.node import SimNode
from gearfall.simulation.fleet.transfers import SharedLink
from gearfall.simulation.site import NodeProfile

A, B, C = map(ModelName, "abc")
SIZES = {A: 10, B: 10, C: 10}


class Store:
    """Bandwidths: 10 bytes a second from SSD, 1 from elsewhere."""

    def __init__(self, *, dram: int = 20, on_ssd=(A, B, C), ssd: int = 30) -> None:
        self.agenda = Agenda()
        self.changes = 0
        profile = NodeProfile(NodeId("n"), dram, ssd, 10.0, 1.0, tuple(on_ssd))
        self.remote = SharedLink(self.agenda, 100.0)
        links = (self.remote, SharedLink(self.agenda, 10.0))
        self.node = SimNode(profile, SIZES, self.agenda, links, self._changed)
        self.loaded: list[tuple[str, float]] = []

    def _changed(self, node: SimNode) -> None:
        self.changes += 1

    def take(self, model: ModelName) -> None:
        self.node.take(model, lambda _: self.loaded.append((model, self.now)))

    @property
    def now(self) -> float:
        return round(self.agenda.now_s - EPOCH_S, 6)

    def run(self) -> None:
        while self.agenda.step():
            self.node.check()


def test_a_load_is_made_once_and_held_for_all_who_asked():
    store = Store()
    store.take(A)
    store.take(A)
    store.run()
    assert store.loaded == [(A, 1.0), (A, 1.0)]
    assert store.node.moved.ssd == 10
    store.take(A)
    assert store.loaded[-1] == (A, 1.0)


def test_near_loads_wait_for_each_other_and_far_ones_run_beside_them():
    store = Store(on_ssd=(A, B), dram=30)
    for model in (A, B, C):
        store.take(model)
    store.run()
    assert store.loaded == [(A, 1.0), (B, 2.0), (C, 10.0)]
    assert C in (store.node.record().on_ssd or ())


def test_what_is_held_stays_and_the_next_waits_until_it_is_given_back():
    store = Store(dram=20)
    for model in (A, B, C):
        store.take(model)
    store.run()
    assert [model for model, _ in store.loaded] == [A, B]
    store.node.give_back(A)
    store.run()
    assert [model for model, _ in store.loaded] == [A, B, C]
    assert set(store.node.record().resident) == {B, C}


def test_a_prefetch_gives_way_and_starts_over():
    store = Store(dram=30)
    store.node.prefetch(A, Tier.DRAM)
    store.agenda.at(EPOCH_S + 0.5, lambda: store.take(B))
    store.run()
    assert store.loaded == [(B, 1.5)]
    assert store.now == 2.5
    assert set(store.node.record().resident) == {A, B}


@pytest.mark.parametrize(("held", "left"), [((), {B, C}), ((A,), {A, C}), ((A, B), {A, B})])
def test_a_prefetch_evicts_what_costs_least_and_nothing_that_is_held(held, left):
    store = Store(dram=20)
    for model in (A, B, B):
        store.take(model)
    store.run()
    for model in {A, B} - set(held):
        store.node.give_back(model)
        if model is B:
            store.node.give_back(B)
    store.node.prefetch(C, Tier.DRAM)
    store.run()
    assert set(store.node.record().resident) == left


def test_far_loads_of_two_nodes_share_what_comes_from_elsewhere():
    agenda = Agenda()
    remote, done = SharedLink(agenda, 1.5), []
    for name in "nm":
        profile = NodeProfile(NodeId(name), 20, 30, 10.0, 1.0)
        links = (remote, SharedLink(agenda, 10.0))
        node = SimNode(profile, SIZES, agenda, links, lambda _: None)
        node.take(A, lambda _: done.append(agenda.now_s - EPOCH_S))
    while agenda.step():
        pass
    assert done == [pytest.approx(10 / 0.75)] * 2
