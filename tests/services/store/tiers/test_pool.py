"""The pool's books: room, eviction and leases, against arbitrary sequences of calls."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gearfall.core.errors import Conflict, InvalidRequest, NotFound, Overloaded, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.tiers import HALF_LIFE_S
from services.store.tiers.pool import Pool, Resident

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")


def resident(model: ModelName, size_bytes: int) -> Resident:
    return Resident(model, f"digest-{model}", b"{}", (), (size_bytes,))


def put(pool: Pool, model: ModelName, size_bytes: int) -> None:
    pool.reserve(model, size_bytes)
    pool.commit(resident(model, size_bytes))


def names(pool: Pool) -> list[ModelName]:
    return [resident.model for resident in pool.residents]


def test_the_least_recently_used_makes_room():
    pool = Pool(100)
    for model in (A, B):
        put(pool, model, 50)
    pool.get(A)
    put(pool, C, 50)
    assert names(pool) == [A, C]


def test_the_cheapest_to_bring_back_makes_room():
    now_s = [0.0]
    pool = Pool(100, bandwidth_below={A: 1e8, B: 1e9}.__getitem__, clock=lambda: now_s[0])
    for model in (A, B):
        put(pool, model, 50)
    pool.get(B)
    put(pool, C, 50)
    assert names(pool) == [A, C]


def test_old_uses_count_for_less():
    now_s = [0.0]
    pool = Pool(100, clock=lambda: now_s[0])
    put(pool, A, 50)
    for _ in range(5):
        pool.get(A)
    now_s[0] = 10 * HALF_LIFE_S
    put(pool, B, 50)
    put(pool, C, 50)
    assert names(pool) == [B, C]
    assert pool.expected_use(A) < 0.01
    pool.forget(A)
    assert pool.expected_use(A) == 0


def test_what_is_leased_stays():
    pool = Pool(100)
    for model in (A, B):
        put(pool, model, 50)
    pool.lease(A, "digest-a", "worker")
    put(pool, C, 50)
    assert names(pool) == [A, C]
    pool.lease(C, "digest-c", "worker")
    with pytest.raises(Overloaded) as refused:
        pool.reserve(B, 50)
    assert refused.value.retry_after_s
    pool.release(A, "worker")
    put(pool, B, 50)
    assert names(pool) == [C, B]


def test_nothing_is_evicted_in_vain():
    pool = Pool(100)
    for model in (A, B):
        put(pool, model, 50)
    pool.lease(B, "digest-b", "worker")
    with pytest.raises(Overloaded):
        pool.reserve(C, 100)
    assert set(names(pool)) == {A, B}


def test_a_model_larger_than_the_pool_is_the_callers_to_change():
    with pytest.raises(InvalidRequest, match="--dram-bytes"):
        Pool(100).reserve(A, 101)


def test_room_of_a_failed_load_comes_back():
    pool = Pool(100)
    pool.reserve(A, 100)
    with pytest.raises(Overloaded):
        pool.reserve(B, 1)
    pool.cancel(A)
    put(pool, B, 100)


def test_leases_are_of_the_bytes_that_are_there():
    pool = Pool(100)
    with pytest.raises(Unavailable):
        pool.lease(A, "digest-a", "worker")
    put(pool, A, 10)
    with pytest.raises(Conflict):
        pool.lease(A, "digest-b", "worker")
    pool.lease(A, "digest-a", "worker")
    pool.lease(A, "digest-a", "worker")
    pool.release(A, "worker")
    with pytest.raises(Conflict, match="worker"):
        pool.drop(A)
    pool.release(A, "worker")
    assert pool.drop(A) == 10
    with pytest.raises(NotFound):
        pool.drop(A)


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls keeps the invariant and never loses what is leased."""

    models = st.sampled_from([ModelName(name) for name in "abcd"])

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(100)
        self.loading: dict[ModelName, int] = {}
        self.leased: list[ModelName] = []

    @rule(model=models, size_bytes=st.integers(1, 110))
    def begin(self, model: ModelName, size_bytes: int) -> None:
        if model in self.loading or model in names(self.pool):
            return
        try:
            self.pool.reserve(model, size_bytes)
        except (InvalidRequest, Overloaded):
            return
        self.loading[model] = size_bytes

    @rule(model=models, works=st.booleans())
    def end(self, model: ModelName, works: bool) -> None:
        if model in self.loading:
            size_bytes = self.loading.pop(model)
            if works:
                self.pool.commit(resident(model, size_bytes))
            else:
                self.pool.cancel(model)

    @rule(model=models)
    def lease(self, model: ModelName) -> None:
        if model in names(self.pool):
            self.pool.lease(model, f"digest-{model}", "worker")
            self.leased.append(model)

    @rule(model=models)
    def release(self, model: ModelName) -> None:
        if model in self.leased:
            self.leased.remove(model)
            self.pool.release(model, "worker")

    @rule(model=models)
    def drop(self, model: ModelName) -> None:
        try:
            self.pool.drop(model)
        except Conflict:
            assert model in self.leased
        except NotFound:
            assert model not in self.leased

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        assert set(self.leased) <= set(names(self.pool))


TestPoolMachine = PoolMachine.TestCase
