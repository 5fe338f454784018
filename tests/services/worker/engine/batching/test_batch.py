"""The batch: who runs, who gives way, and that everybody gets to the end."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.feedback_levels import (
    BATCH_PATIENCE_S,
    FIRST_QUANTUM_TOKENS,
    PATIENCE_S,
)
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine.batching.sequence import Sequence, Stance


def sequence(name, tokens=1, *, first=None, **fields):
    """A job of so many prompt tokens; those of different names share nothing."""
    beginning = 1000 + sum(map(ord, name)) if first is None else first
    prompt = [beginning + place for place in range(tokens)]
    return Sequence(JobId(name), Epoch(1), prompt, tokens, SamplingParams(max_tokens=99), **fields)


class Stepper:
    """A batch whose samples are all token 7."""

    def __init__(self, *, total_blocks=16, slots=2, step_tokens=64):
        self.batch = Batch(KvBlocks(total_blocks), slots=slots, step_tokens=step_tokens)
        self.now_s = 0.0

    def submit(self, name, tokens=1, **fields):
        one = sequence(name, tokens, **fields)
        self.batch.submit(one, self.now_s)
        return one

    def find(self, key) -> Any:
        """A sequence that must be here."""
        found = self.batch.find(key)
        assert found is not None
        return found

    def step(self, *, seconds=0.01):
        """Compute a step; return {name: tokens computed}."""
        self.now_s += seconds
        chunks = self.batch.plan_step(self.now_s)
        self.batch.check()
        for chunk in chunks:
            samples = chunk.samples
            self.batch.commit(chunk)
            if samples:
                self.batch.append(chunk.sequence, 7)
        self.batch.check()
        return {chunk.sequence.job_id: chunk.count for chunk in chunks}


def test_decodes_go_first_and_prefills_share_what_is_left():
    stepper = Stepper(slots=3, step_tokens=10)
    stepper.submit("a")
    assert stepper.step() == {"a": 1}
    stepper.submit("b", 30)
    stepper.submit("c", 5)
    assert stepper.step() == {"a": 1, "b": 9}
    assert stepper.step() == {"a": 1, "b": 9}
    assert stepper.step() == {"a": 1, "b": 9}
    assert stepper.step() == {"a": 1, "b": 3, "c": 5}


def test_interactive_takes_a_batch_jobs_slot_in_the_next_step_and_gives_it_back():
    stepper = Stepper(slots=2)
    batch = [stepper.submit(name, 20, priority=Priority.BATCH) for name in ("old", "young")]
    assert set(stepper.step()) == {"old", "young"}
    chat = stepper.submit("chat")
    assert set(stepper.step()) == {"old", "chat"}
    assert set(stepper.step()) == {"old", "chat"}
    stepper.batch.remove(chat.key)
    assert stepper.step() == {"old": 1, "young": 21 - BLOCK_TOKENS}, "its full block is found again"
    assert [len(one.tokens) for one in batch] == [24, 22]


def test_interactive_takes_a_batch_jobs_blocks():
    stepper = Stepper(total_blocks=4, slots=4)
    stepper.submit("batch", 40, priority=Priority.BATCH)
    stepper.step()
    stepper.submit("chat", 20)
    assert set(stepper.step()) == {"chat"}


@pytest.mark.parametrize(("prompt", "ran"), [(40, {"one", "chat"}), (60, {"chat"})])
def test_only_as_many_batch_jobs_give_way_as_must_though_they_share_blocks(prompt, ran):
    stepper = Stepper(total_blocks=7, slots=4)
    stepper.submit("one", 40, first=5, priority=Priority.BATCH)
    stepper.step()
    stepper.submit("two", 40, first=5, priority=Priority.BATCH)
    assert set(stepper.step()) == {"one", "two"}
    stepper.submit("chat", prompt)
    assert set(stepper.step()) == ran


def test_equals_do_not_displace_one_another():
    stepper = Stepper(slots=1)
    stepper.submit("a")
    stepper.step()
    stepper.submit("b")
    for _ in range(FIRST_QUANTUM_TOKENS - 1):
        assert stepper.step() == {"a": 1}
    assert stepper.step() == {"b": 1}, "the first's quantum was used up"


def test_who_runs_out_of_blocks_takes_them_from_who_comes_last():
    stepper = Stepper(total_blocks=4, slots=3)
    for name in ("a", "b", "c"):
        stepper.submit(name, 15)
    assert set(stepper.step()) == {"a", "b", "c"}
    stepper.step()
    for _ in range(16):
        assert stepper.step() == {"a": 1, "b": 1}, "two blocks each"
    assert stepper.step() == {"a": 1}, "three blocks, and one is too few for the second"


def test_a_prefix_is_computed_once_for_a_tenant():
    stepper = Stepper(slots=4)
    stepper.submit("a", 40, first=5, tenant="t")
    stepper.step()
    again = stepper.submit("b", 40, first=5, tenant="t")
    other = stepper.submit("c", 40, first=5, tenant="u")
    adapted = stepper.submit("d", 40, first=5, tenant="t", adapter="x")
    assert stepper.step() == {"a": 1, "b": 8, "c": 40, "d": 15}
    assert [one.cached_tokens for one in (again, other, adapted)] == [32, 0, 0]


@pytest.mark.parametrize(("tokens", "computed"), [(32, 16), (33, 1), (31, 15)])
def test_the_last_token_is_always_computed(tokens, computed):
    stepper = Stepper()
    stepper.submit("a", tokens, first=5)
    stepper.step()
    stepper.submit("b", tokens, first=5)
    assert stepper.step()["b"] == computed


def test_an_answer_is_known_to_the_next_turn():
    stepper = Stepper()
    first = stepper.submit("a", 10, first=5)
    for _ in range(30):
        stepper.step()
    stepper.batch.remove(first.key)
    turn = Sequence(JobId("b"), Epoch(1), [*first.tokens, 1], 41, SamplingParams(max_tokens=9))
    stepper.batch.submit(turn, stepper.now_s)
    assert stepper.step() == {"b": 41 - 32}


def test_deadlines_end_running_and_waiting_jobs_but_not_held_ones():
    stepper = Stepper(slots=2)
    stepper.submit("running", deadline_s=1.0)
    held = sequence("held", deadline_s=1.0, stance=Stance.HELD)
    assert not stepper.batch.hold(held, reserve_tokens=0, now_s=0.0)
    stepper.submit("waiting", deadline_s=0.5)
    stepper.submit("later", deadline_s=2.0)
    stepper.step()
    assert [one.job_id for one in stepper.batch.expire(0.99)] == ["waiting"]
    assert [one.job_id for one in stepper.batch.expire(1.0)] == ["running"]
    assert stepper.step() == {"later": 1}
    stepper.batch.check()


def test_the_oldest_prefill_gets_on_however_many_come_before_it():
    stepper = Stepper(total_blocks=200, slots=8, step_tokens=16)
    stepper.submit("long", 2000)
    steps = 0
    for number in range(1000):
        stepper.submit(f"short {number}", 16)
        steps += 1
        ran = stepper.step()
        assert ran["long"] >= 2
        for name in ran:
            if name != "long":
                stepper.batch.remove((JobId(name), Epoch(1)))
        if stepper.find((JobId("long"), Epoch(1))).next_index:
            break
    assert steps <= 1000


ARRIVALS = st.tuples(
    st.integers(0, 3), st.integers(1, 60), st.integers(1, 40), st.sampled_from(list(Priority))
)


@settings(max_examples=40)
@given(
    first=st.lists(ARRIVALS, min_size=1, max_size=5),
    flood=st.lists(ARRIVALS, min_size=1, max_size=4),
    slots=st.integers(1, 3),
    total_blocks=st.integers(7, 12),
    step_tokens=st.integers(4, 40),
)
def test_every_job_ends_however_many_come_after_it(first, flood, slots, total_blocks, step_tokens):
    """The flood never ends, and each of its jobs would come before the first ones or displace them.

    Time runs so fast that patience ends after a few hundred steps.
    """
    stepper = Stepper(total_blocks=total_blocks, slots=slots, step_tokens=step_tokens)
    left: dict[Any, int] = {}
    for number, (_, prompt, answer, priority) in enumerate(first):
        one = stepper.submit(f"first {number}", prompt, priority=priority)
        left[one.key] = answer
    wanted = dict(left)
    for number in range(6000):
        pause, prompt, answer, priority = flood[number % len(flood)]
        if number % (pause + 1) == 0 and stepper.batch.waiting < 6:
            one = stepper.submit(f"flood {number}", prompt, priority=priority)
            wanted[one.key] = answer
        stepper.step(seconds=BATCH_PATIENCE_S / 100)
        for key in list(wanted):
            found = stepper.find(key)
            if found.next_index >= wanted[key]:
                stepper.batch.remove(key)
                del wanted[key]
                left.pop(key, None)
        if not left:
            return
    raise AssertionError(f"{len(left)} jobs never ended")


class Life(RuleBasedStateMachine):
    """Everything that may happen to jobs, in any order."""

    def __init__(self):
        super().__init__()
        self.stepper = Stepper(total_blocks=10, slots=3, step_tokens=24)
        self.batch = self.stepper.batch
        self.count = 0
        self.keys: set[Any] = set()
        self.pinned: dict[Any, list[int]] = {}
        self.log: dict[Any, int] = {}

    def one(self, data):
        return data.draw(st.sampled_from(sorted(self.keys)))

    @rule(tokens=st.integers(1, 70), first=st.integers(1, 2), priority=st.sampled_from(Priority))
    def submit(self, tokens, first, priority):
        self.count += 1
        one = self.stepper.submit(str(self.count), tokens, first=first, priority=priority)
        self.keys.add(one.key)
        self.log[one.key] = 0

    @rule(
        tokens=st.integers(1, 70),
        reserve=st.integers(0, 40),
        stance=st.sampled_from([Stance.HELD, Stance.HELD_BY_KV]),
    )
    def hold(self, tokens, reserve, stance):
        self.count += 1
        one = sequence(str(self.count), tokens, first=1, stance=stance)
        if not self.batch.hold(one, reserve_tokens=reserve, now_s=self.stepper.now_s):
            self.keys.add(one.key)
            self.log[one.key] = 0
            table = self.batch.blocks.table(one.key)
            assert len(table) * BLOCK_TOKENS >= tokens + reserve

    @precondition(lambda self: self.keys)
    @rule(data=st.data(), count=st.integers(0, 20), by_kv=st.integers(0, 90))
    def feed_or_release(self, data, count, by_kv):
        one = self.stepper.find(self.one(data))
        if not one.is_held:
            return
        if count and self.batch.feed(one, (9,) * count):
            self.log[one.key] += count
        if one.stance is Stance.HELD_BY_KV:
            self.batch.advance(one, max(one.computed, min(by_kv, len(one.tokens) - 1)))
        if not count:
            self.batch.change_stance(one, Stance.FREE)

    @precondition(lambda self: self.keys)
    @rule(data=st.data(), is_frozen=st.booleans())
    def freeze_or_thaw(self, data, is_frozen):
        one = self.stepper.find(self.one(data))
        if not one.is_held:
            self.batch.change_stance(one, Stance.FROZEN if is_frozen else Stance.FREE)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def pin(self, data):
        key = self.one(data)
        self.batch.blocks.pin(key)
        self.pinned[key] = list(self.batch.blocks.table(key))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        self.batch.blocks.unpin(key)
        del self.pinned[key]

    @precondition(lambda self: self.keys)
    @rule(data=st.data(), is_cancelled=st.booleans())
    def end(self, data, is_cancelled):
        key = self.one(data)
        if is_cancelled:
            self.batch.cancel(key)
            self.pinned.pop(key, None)
        else:
            assert self.batch.remove(key) is not None
        self.keys.remove(key)
        assert self.batch.find(key) is None

    @rule(seconds=st.sampled_from([0.01, PATIENCE_S]))
    def step(self, seconds):
        still = {key for key in self.keys if self.stepper.find(key).stance is not Stance.FREE}
        ran = self.stepper.step(seconds=seconds)
        assert sum(ran.values()) <= 24
        for key in self.keys:
            one = self.stepper.find(key)
            grown = one.next_index - self.log[key]
            assert grown in {0, 1} if key[0] in ran and key not in still else grown == 0
            self.log[key] = one.next_index
            if one.next_index > 60:
                self.batch.cancel(key)
        gone = {key for key in self.keys if self.batch.find(key) is None}
        self.keys -= gone
        for key in gone:
            self.pinned.pop(key, None)

    @invariant()
    def holds(self):
        self.batch.check()
        for key, table in self.pinned.items():
            assert self.batch.blocks.table(key)[: len(table)] == table, "a pinned block moved"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40)
