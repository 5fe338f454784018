"""Memory kept ready: real files and the real thread; who needs the room has it at once."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from gearfall.core.ids import ModelName
from gearfall.infra.memory.native import PoolFile, StopSign
from services.store.tiers.spare_memory import KEEP_FREE_BYTES, SpareMemory
from services.store.tiers.spare_plan import plan_spares

A, B = ModelName("a"), ModelName("b")
MIB = 2**20
TIMEOUT_S = 20.0


def spare_memory(limit_bytes: int = 64 * MIB, **changed: object) -> SpareMemory:
    changed = {"least_bytes": 1, "rest_s": 0.0, **changed}
    return SpareMemory(limit_bytes, **changed)  # type: ignore[arg-type]


@pytest.fixture
def spare() -> Iterator[SpareMemory]:
    memory = spare_memory()
    yield memory
    memory.close()


def settle(memory: SpareMemory) -> None:
    assert memory.wait_settled(TIMEOUT_S)


def spare_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spare-memory"]


def test_a_load_finds_its_memory_faulted_in(spare):
    spare.fit(32 * MIB)
    spare.want([(5 * MIB,)])
    settle(spare)
    assert spare.held_bytes == 5 * MIB
    spare.begin(A, 5 * MIB, 27 * MIB)
    with spare.allocate(A, 5 * MIB) as file, file.memory() as memory:
        assert file.faulted_bytes == file.size_bytes == 5 * MIB
        assert os.fstat(file.fileno()).st_blocks * 512 == 5 * MIB
        assert memory == bytes(5 * MIB)
    assert spare.held_bytes == 0


@pytest.mark.parametrize(
    ("size_bytes", "faulted_bytes"), [(3 * MIB + 1, 3 * MIB + 1), (9 * MIB, 5 * MIB)]
)
def test_it_is_cut_or_lengthened_to_the_loads_size(spare, size_bytes, faulted_bytes):
    spare.fit(32 * MIB)
    spare.want([(5 * MIB,)])
    settle(spare)
    spare.begin(A, size_bytes, 23 * MIB)
    with spare.allocate(A, size_bytes) as file:
        assert (file.size_bytes, file.faulted_bytes) == (size_bytes, faulted_bytes)


def test_after_a_load_it_is_refilled_with_other_pages(spare):
    spare.fit(32 * MIB)
    spare.want([(4 * MIB,)])
    settle(spare)
    spare.begin(A, 4 * MIB, 28 * MIB)
    with spare.allocate(A, 4 * MIB) as file:
        with file.memory() as memory:
            memory[:] = b"secret!!" * (MIB // 2)
        os.close(file.seal())
    spare.end(A, 28 * MIB)
    settle(spare)
    spare.begin(B, 4 * MIB, 24 * MIB)
    with spare.allocate(B, 4 * MIB) as again, again.memory() as memory:
        assert again.faulted_bytes == 4 * MIB
        assert memory == bytes(4 * MIB)


def test_nothing_is_faulted_in_while_anything_loads(spare):
    spare.begin(A, MIB, 32 * MIB)
    spare.want([(4 * MIB,)])
    spare.begin(B, 4 * MIB, 28 * MIB)
    spare.end(A, 28 * MIB)
    with spare.allocate(B, 4 * MIB) as file:
        assert file.faulted_bytes == 0
    assert not spare.wait_settled(0.0)
    spare.end(B, 28 * MIB)
    settle(spare)
    assert spare.held_bytes == 4 * MIB


def test_a_load_that_comes_while_it_is_faulted_in_ends_that():
    started, may_go_on = threading.Event(), threading.Event()

    class Halting(PoolFile):
        def fault_in(self, step_bytes: int, stop: StopSign | None = None) -> None:
            started.set()
            assert may_go_on.wait(TIMEOUT_S)
            super().fault_in(step_bytes, stop)

    spare = spare_memory(make=Halting)
    spare.fit(32 * MIB)
    spare.want([(4 * MIB,)])
    assert started.wait(TIMEOUT_S)
    spare.begin(A, 4 * MIB, 28 * MIB)
    may_go_on.set()
    with spare.allocate(A, 4 * MIB) as file:
        assert file.faulted_bytes == 0
    spare.close()


def test_it_fits_into_the_free_room_and_below_the_limit():
    spare = spare_memory(6 * MIB)
    for free_bytes, held_bytes in ((4 * MIB, 4 * MIB), (32 * MIB, 6 * MIB), (MIB, MIB), (0, 0)):
        spare.fit(free_bytes)
        spare.want([(8 * MIB,)])
        settle(spare)
        assert spare.held_bytes == held_bytes
    spare.close()


def test_room_that_a_load_takes_is_given_up_before_it_allocates(spare):
    spare.fit(10 * MIB)
    spare.want([(6 * MIB, 4 * MIB)])
    settle(spare)
    assert spare.held_bytes == 10 * MIB
    spare.begin(A, 9 * MIB, MIB)
    with spare.allocate(A, 9 * MIB) as file:
        assert file.faulted_bytes == 6 * MIB
        assert spare.held_bytes <= MIB


def test_small_files_are_not_worth_it():
    spare = spare_memory(least_bytes=2 * MIB)
    spare.fit(32 * MIB)
    spare.want([(MIB,)])
    settle(spare)
    assert spare.held_bytes == 0
    assert spare_threads() == []
    spare.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.ENOMEM])
def test_memory_that_is_not_to_be_had_costs_nothing_but_the_time(error, caplog):
    attempts = []

    class Refused(PoolFile):
        def fault_in(self, step_bytes: int, stop: StopSign | None = None) -> None:
            attempts.append(step_bytes)
            raise OSError(error, os.strerror(error))

    spare = spare_memory(make=Refused)
    spare.fit(32 * MIB)
    spare.want([(4 * MIB,)])
    settle(spare)
    assert spare.held_bytes == 0
    assert len(attempts) == 1
    spare.begin(A, 4 * MIB, 28 * MIB)
    with spare.allocate(A, 4 * MIB) as file:
        assert (file.size_bytes, file.faulted_bytes) == (4 * MIB, 0)
    spare.end(A, 28 * MIB)
    # The end of a load is a reason to try again.
    settle(spare)
    assert len(attempts) == 2
    assert [record.message for record in caplog.records] == [
        "no memory is kept ready for loads for now"
    ]
    spare.close()


def test_a_machine_with_little_memory_keeps_it():
    spare = spare_memory(free_memory=lambda: KEEP_FREE_BYTES)
    spare.fit(32 * MIB)
    spare.want([(4 * MIB,)])
    settle(spare)
    spare.begin(A, 4 * MIB, 28 * MIB)
    with spare.allocate(A, 4 * MIB) as file:
        assert file.faulted_bytes == 0
    spare.close()


def test_its_thread_comes_after_all_others(spare):
    spare.fit(32 * MIB)
    spare.want([(4 * MIB,)])
    settle(spare)
    (thread,) = spare_threads()
    assert thread.native_id is not None
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == min(19, ours + 5)


def test_closed_it_leaves_nothing():
    before = sorted(Path("/proc/self/fd").iterdir())
    spare = spare_memory()
    spare.fit(32 * MIB)
    spare.want([(8 * MIB, 4 * MIB)])
    spare.close()
    spare.close()
    assert spare_threads() == []
    assert sorted(Path("/proc/self/fd").iterdir()) == before


class SpareMachine(RuleBasedStateMachine):
    """Loads of any sizes in any order: never more memory than the pool has room for."""

    CAPACITY_BYTES = 96 * 4096
    names = st.sampled_from([A, B])
    sizes = st.integers(1, 40 * 4096)

    def __init__(self) -> None:
        super().__init__()
        self.spare = spare_memory(64 * 4096)
        self.used_bytes = 0
        self.wanted: list[list[int]] = []
        self.owed: dict[ModelName, list[int]] = {}
        self.spare.fit(self.CAPACITY_BYTES)

    @property
    def free_bytes(self) -> int:
        return self.CAPACITY_BYTES - self.used_bytes

    @rule(models=st.lists(st.lists(sizes, max_size=3), max_size=3))
    def want(self, models: list[list[int]]) -> None:
        self.wanted = models
        self.spare.want(models)

    @rule(model=names, sizes=st.lists(sizes, min_size=1, max_size=3))
    def begin(self, model: ModelName, sizes: list[int]) -> None:
        if model not in self.owed and sum(sizes) <= self.free_bytes:
            self.used_bytes += sum(sizes)
            self.owed[model] = sizes
            self.spare.begin(model, sum(sizes), self.free_bytes)

    @rule(model=names)
    def allocate(self, model: ModelName) -> None:
        if self.owed.get(model):
            size_bytes = self.owed[model].pop()
            with self.spare.allocate(model, size_bytes) as file:
                assert file.size_bytes == size_bytes
                owed_bytes = sum(map(sum, self.owed.values()))
                assert self.spare.held_bytes <= self.free_bytes + owed_bytes

    @rule(model=names, freed=st.booleans())
    def end(self, model: ModelName, freed: bool) -> None:
        if model in self.owed:
            del self.owed[model]
            if freed:
                self.used_bytes = 0 if not self.owed else self.used_bytes
            self.spare.end(model, self.free_bytes)

    @precondition(lambda self: not self.owed)
    @rule()
    def rest(self) -> None:
        settle(self.spare)
        room_bytes = min(64 * 4096, self.free_bytes)
        assert self.spare.held_bytes == sum(plan_spares(self.wanted, room_bytes, 1))

    def teardown(self) -> None:
        self.spare.close()


TestSpareMachine = SpareMachine.TestCase
TestSpareMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
