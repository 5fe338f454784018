"""Batches of writes: nothing is lost, and what must come in order does."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import DecisionRecord, MoveRecord, PrefetchRecord
from gearfall.core.tiers import Tier
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
from services.scheduler.write_order import MOST_AT_ONCE, in_batches, key_ids
from tests.gearfall.scheduling.clusters import assignment

MODELS = [ModelName(name) for name in "abc"]
WORKERS = [WorkerId(name) for name in "vw"]


def move(worker: WorkerId, model: ModelName) -> MoveRecord:
    return MoveRecord(worker, model, WorkerId("t"), ModelName("m"), "", 0.0)


KEYS = st.tuples(st.sampled_from(WORKERS), st.sampled_from(MODELS))
ACTIONS = st.one_of(
    KEYS.map(lambda key: Assign(assignment(key[1], key[0]))),
    KEYS.map(lambda key: Unassign(key, "")),
    KEYS.map(lambda key: BeginMove(move(*key))),
    KEYS.map(lambda key: EndMove(key, "")),
    KEYS.map(lambda key: Unwish((NodeId(key[0]), key[1]), "")),
    KEYS.map(lambda key: Wish(PrefetchRecord(NodeId(key[0]), key[1], Tier.DRAM, "", 0.0))),
    st.sampled_from(MODELS).map(lambda model: Decide(DecisionRecord(model, 0.0, "start", ""))),
    st.sampled_from(MODELS).map(Undecide),
)


def rank(action: Action) -> int:
    return 2 if isinstance(action, Decide | Undecide) else int(isinstance(action, Wish | Unwish))


@given(st.lists(ACTIONS, max_size=30))
def test_every_write_comes_once_and_steps_keep_their_order(actions: list[Action]) -> None:
    batches = list(in_batches(actions))
    flat = [action for batch in batches for action in batch]
    assert flat == sorted(actions, key=rank), "those of one rank keep their order"
    for batch in batches:
        assert len({type(action) for action in batch}) == 1
        assert len({key_ids(action) for action in batch}) == len(batch) <= MOST_AT_ONCE


def test_many_starts_go_out_together_and_their_reasons_behind_them() -> None:
    starts = [Assign(assignment(ModelName(f"m{n}"))) for n in range(3)]
    reasons = [Decide(DecisionRecord(ModelName(f"m{n}"), 0.0, "start", "")) for n in range(3)]
    mixed = [each for pair in zip(starts, reasons, strict=True) for each in pair]
    assert list(in_batches(mixed)) == [tuple(starts), tuple(reasons)]


def test_more_than_fit_at_once_go_out_one_batch_after_the_other() -> None:
    starts = [Assign(assignment(ModelName(f"m{n}"))) for n in range(MOST_AT_ONCE + 1)]
    assert [len(batch) for batch in in_batches(starts)] == [MOST_AT_ONCE, 1]
