"""The judge of histories: good runs are sound, and each way to spoil one is found."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.history import (
    Accepted,
    Answered,
    AnyEvent,
    Appended,
    Bound,
    Claimed,
    Ended,
    HandedOver,
    Holding,
    Lost,
    ProcessEnded,
    ProcessHistory,
    ProcessStarted,
    accepted,
)
from gearfall.core.generation.job import Job
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.generation.verdict import Verdict, judge
from gearfall.core.ids import Epoch, JobId, ModelName, RequestId, RouterId, WorkerId

ROUTER, WORKER, ENGINE = 10, 20, 21
A, B = WorkerId("worker-a"), WorkerId("worker-b")
JOB, REFERENCE = JobId("moved"), JobId("undisturbed")
TOKENS = 12


def token(index: int) -> int:
    return 100 + index


def process(service: str, pid: int, *events: AnyEvent, parent: int = 1) -> ProcessHistory:
    return ProcessHistory(ProcessStarted(service, pid, parent, 7), events)


def undisturbed() -> list[AnyEvent]:
    return [
        Accepted(REFERENCE, ModelName("m"), "d"),
        Bound(REFERENCE, Epoch(1), A),
        Appended(REFERENCE, Epoch(1), A, 0, tuple(map(token, range(TOKENS)))),
        Ended(REFERENCE, "length"),
    ]


def disturbed(steps: list[str]) -> list[AnyEvent]:
    """A job that is carried on, moved, lost and claimed again as `steps` say, then finished."""
    events: list[AnyEvent] = [Accepted(JOB, ModelName("m"), "d")]
    epoch, owner, index, others = Epoch(1), None, 0, {A: B, B: A}
    for step in [*steps, "finish"]:
        if owner is None:
            owner = A if epoch % 2 else B
            events.append(Bound(JOB, epoch, owner))
        count = TOKENS - index if step == "finish" else min(2, TOKENS - index - 1)
        if step in {"go on", "finish"} and count:
            run = tuple(map(token, range(index, index + count)))
            events.append(Appended(JOB, epoch, owner, index, run))
            index += count
        elif step == "move":
            epoch = Epoch(epoch + 1)
            events.append(HandedOver(JOB, epoch, owner, others[owner]))
            owner = others[owner]
        elif step == "lose":
            epoch, owner = Epoch(epoch + 1), None
            events.append(Lost(JOB, epoch))
    return [*events, Ended(JOB, "length")]


def run_of(events: list[AnyEvent]) -> tuple[ProcessHistory, ...]:
    end = (Holding({"jobs": 0}), ProcessEnded())
    return (
        process("router", ROUTER, *undisturbed(), *events, *end),
        process("worker", WORKER, Claimed(JOB, Epoch(1)), Holding({"claims": 0}), ProcessEnded()),
        process("client", 30, *(Answered("q", (1, 2), is_whole=True) for _ in range(2)), *end),
    )


STEPS = st.lists(st.sampled_from(["go on", "go on", "move", "lose"]), max_size=12)


@given(STEPS)
def test_a_job_that_is_moved_and_lost_in_order_is_sound(steps: list[str]) -> None:
    verdict = judge(run_of(disturbed(steps)))
    assert verdict.is_sound, verdict
    assert verdict.tokens == 2 * TOKENS
    assert (verdict.jobs, verdict.abandoned) == (2, 0)
    assert verdict.moves == steps.count("move")


def of_kind(events: list[AnyEvent], kind: type[AnyEvent]) -> list[int]:
    return [place for place, event in enumerate(events) if isinstance(event, kind)]


def without(kind: type[AnyEvent]) -> Callable[[list[AnyEvent], int], list[AnyEvent]]:
    def spoil(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
        places = of_kind(events, kind)
        place = places[draw % len(places)]
        return events[:place] + events[place + 1 :]

    return spoil


def twice(kind: type[AnyEvent]) -> Callable[[list[AnyEvent], int], list[AnyEvent]]:
    def spoil(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
        places = of_kind(events, kind)
        place = places[draw % len(places)]
        return [*events[: place + 1], events[place], *events[place + 1 :]]

    return spoil


def another_token(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
    places = of_kind(events, Appended)
    place = places[draw % len(places)]
    run = events[place]
    assert isinstance(run, Appended)
    changed = msgspec.structs.replace(run, token_ids=(*run.token_ids[:-1], 7))
    return [*events[:place], changed, *events[place + 1 :]]


def a_stale_owner(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
    places = of_kind(events, Appended)
    place = places[draw % len(places)]
    run = events[place]
    assert isinstance(run, Appended)
    other = msgspec.structs.replace(run, worker_id=WorkerId("worker-c"))
    return [*events[:place], other, *events[place + 1 :]]


def a_stale_epoch(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
    places = of_kind(events, Appended)
    place = places[draw % len(places)]
    run = events[place]
    assert isinstance(run, Appended)
    other = msgspec.structs.replace(run, epoch=Epoch(run.epoch - 1))
    return [*events[:place], other, *events[place + 1 :]]


def without_last_bound(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
    # An earlier owner may have brought nothing: then its going unseen changes nothing.
    place = of_kind(events, Bound)[-1]
    return events[:place] + events[place + 1 :]


def cut_short(events: list[AnyEvent], draw: int) -> list[AnyEvent]:
    run = events[-2]
    assert isinstance(run, Appended)
    return [*events[:-2], msgspec.structs.replace(run, token_ids=run.token_ids[:-1]), events[-1]]


def has_breach(verdict: Verdict) -> bool:
    return bool(verdict.breaches)


SPOILED: dict[str, tuple[Callable[[list[AnyEvent], int], list[AnyEvent]], object]] = {
    "a run is missing": (without(Appended), lambda v: v.lost > 0),
    "a run came twice": (twice(Appended), lambda v: v.repeated > 0),
    "a token is another": (another_token, lambda v: v.changed == 1),
    "the end is missing": (cut_short, lambda v: v.lost == 1),
    "somebody else appends": (a_stale_owner, has_breach),
    "the owner appends under its old epoch": (a_stale_epoch, has_breach),
    "it was never accepted": (without(Accepted), has_breach),
    "it was accepted twice": (twice(Accepted), has_breach),
    "the last owner was never bound": (without_last_bound, has_breach),
    "it was bound twice": (twice(Bound), has_breach),
    "it never ended": (without(Ended), has_breach),
    "it ended twice": (twice(Ended), has_breach),
}


@pytest.mark.parametrize("how", SPOILED)
@given(steps=STEPS, draw=st.integers(0, 100))
def test_each_way_to_spoil_a_run_is_found(how: str, steps: list[str], draw: int) -> None:
    spoil, is_found = SPOILED[how]
    verdict = judge(run_of(spoil(disturbed(steps), draw)))
    assert not verdict.is_sound
    assert is_found(verdict), verdict  # type: ignore[operator]


@given(steps=STEPS, draw=st.integers(0, 100))
def test_a_change_of_owner_that_nobody_decided_is_found(steps: list[str], draw: int) -> None:
    events = disturbed(["go on", "move", *steps, "lose"])
    assert has_breach(judge(run_of(without(HandedOver)(events, draw))))
    assert has_breach(judge(run_of(without(Lost)(events, draw))))
    assert has_breach(judge(run_of(twice(HandedOver)(events, draw))))
    assert has_breach(judge(run_of(twice(Lost)(events, draw))))


def test_a_killed_router_takes_its_jobs_with_it_and_a_living_one_does_not() -> None:
    events = disturbed(["go on"])[:-1]
    killed = process("router", ROUTER, *undisturbed(), *events)
    verdict = judge([killed])
    assert verdict.is_sound
    assert verdict.abandoned == 1
    running = process("router", ROUTER, *undisturbed(), *events, Holding({"jobs": 0}))
    verdict = judge([running], frozenset({ROUTER}), is_stopped=False)
    assert verdict.breaches == (f"{JOB} never ended",)


def test_a_cancelled_answer_is_the_beginning_of_the_whole_one() -> None:
    early = disturbed(["go on", "go on", "lose"])
    early = [event for event in early[:-2] if not isinstance(event, Ended)]
    assert judge(run_of([*early, Ended(JOB, "client gone")])).is_sound
    assert not judge(run_of([*early, Ended(JOB, "stop")])).is_sound


@pytest.mark.parametrize(
    ("answer", "lost", "repeated", "changed"),
    [
        (Answered("q", (1, 2), is_whole=True), 0, 0, 0),
        (Answered("q", (1,), is_whole=True), 1, 0, 0),
        (Answered("q", (1,), is_whole=False), 0, 0, 0),
        (Answered("q", (1, 2, 2), is_whole=True), 0, 1, 0),
        (Answered("q", (1, 3), is_whole=False), 0, 0, 1),
        (Answered("other", (9,), is_whole=True), 0, 0, 0),
    ],
)
def test_what_clients_received_is_compared(
    answer: Answered, lost: int, repeated: int, changed: int
) -> None:
    histories = (*run_of(disturbed([])), process("client", 31, answer, Holding({}), ProcessEnded()))
    verdict = judge(histories)
    assert (verdict.lost, verdict.repeated, verdict.changed) == (lost, repeated, changed)
    assert verdict.breaches == ()


def test_what_is_left_over_is_found() -> None:
    def breaches(history: ProcessHistory, *alive: int, is_stopped: bool = True) -> tuple[str, ...]:
        return judge([history], frozenset(alive), is_stopped=is_stopped).breaches

    holds = process("worker", WORKER, Holding({"claims": 2, "x": 0}), ProcessEnded())
    assert breaches(holds) == (f"worker {WORKER} holds 2 claims",)
    silent = process("worker", WORKER, ProcessEnded())
    assert breaches(silent) == (f"worker {WORKER} did not say what it holds",)
    gave_back = process("worker", WORKER, Holding({"claims": 2}), Holding({"claims": 0}))
    assert breaches(gave_back, WORKER, is_stopped=False) == ()
    assert breaches(gave_back, WORKER) == (f"worker {WORKER} still runs",)
    killed = process("worker", WORKER, Holding({"claims": 2}))
    assert breaches(killed) == ()


def test_leases_stand_while_the_cluster_does() -> None:
    store = process("store", 40, Holding({"leases": 1}))
    assert judge([store], frozenset({40}), is_stopped=False).is_sound
    ended = replace(store, events=(*store.events, ProcessEnded()))
    assert judge([ended]).breaches == ("store 40 holds 1 leases",)


def test_a_process_that_outlives_its_parent_is_found() -> None:
    killed = process("worker", WORKER)
    orphan = process("engine", ENGINE, Holding({"blocks": 0}), parent=WORKER)
    verdict = judge([killed, orphan], frozenset({ENGINE}), is_stopped=False)
    assert verdict.breaches == (f"engine {ENGINE} still runs",)


def test_work_on_a_job_that_no_router_had_is_found() -> None:
    stray = process("worker", 50, Claimed(JobId("x"), Epoch(1)), Holding({}), ProcessEnded())
    assert has_breach(judge([stray]))


def test_equal_requests_have_equal_digests() -> None:
    job = Job(
        *(JOB, RequestId("r"), ModelName("m"), Epoch(1), RouterId("router"), "127.0.0.1:1"),
        prompt_token_ids=(1, 2),
        generated_token_ids=(),
        sampling=SamplingParams(max_tokens=3, seed=4),
    )
    digest = accepted(job).digest
    again = replace(job, job_id=JobId("other"), epoch=Epoch(3), generated_token_ids=(9,))
    assert accepted(again).digest == digest
    greedy = [
        replace(job, sampling=SamplingParams(max_tokens=3, temperature=0.0, seed=seed))
        for seed in (1, 2)
    ]
    assert len({accepted(each).digest for each in greedy}) == 1
    for other in (
        replace(job, prompt_token_ids=(1, 3)),
        replace(job, sampling=SamplingParams(max_tokens=3, seed=5)),
        replace(job, model=ModelName("n")),
        replace(job, adapter="a"),
    ):
        assert accepted(other).digest != digest
