"""The migration's machines: docstrings are tables, no order of events and faults breaks them.

The promises are those of `migration_world`: one owner, the true tokens in order and all of them,
nothing left anywhere.
"""

import asyncio
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.migration import source_table, target_table
from services.worker.migration.events import (
    Accepted,
    Connected,
    End,
    FreezeCame,
    Held,
    Produced,
    Progress,
    SendProgress,
    SendRefused,
    SendTokens,
    SourceAct,
    TargetAct,
    TokensCame,
)
from services.worker.migration.source_table import SOURCE_RULES, Source, SourceState, step_source
from services.worker.migration.target_table import TARGET_RULES, Target, TargetState, step_target
from services.worker.migration.terms import Terms
from tests.services.worker.migration.migration_world import World

OWNING = "offered, moving, freezing, frozen"
HOLDING = "opening, holding, held, completing"


def rows(text: str) -> set[tuple[str, str]]:
    """The (state, event) pairs of one table in the docstring."""
    pairs = set()
    states = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"    (.+?) *\| (.*?) *\| .+", line):
            states = match[1].strip() or states
            named = states.replace("(owning)", OWNING).replace("(holding)", HOLDING)
            events = match[2].split(", ") if match[2] else []
            pairs |= {(state, event) for state in named.split(", ") for event in events}
    return pairs - {("source", "event"), ("target", "event")}


def words(kind: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()


def test_each_docstring_is_its_table():
    source, target = source_table.__doc__ or "", target_table.__doc__ or ""
    assert rows(source) == {(state.value, words(event)) for state, event in SOURCE_RULES}
    assert rows(target) == {(state.value, words(event)) for state, event in TARGET_RULES}


def source(**fields) -> Source:
    return Source(Terms(), by_kv=False, block_tokens=16, produced=100, sent=100, **fields)


def test_rounds_go_on_while_the_gap_is_large():
    moving, effects = step_source(source(), Accepted())
    assert effects == (SendTokens(1, 100, 100),)
    moving, _ = step_source(moving, Produced(150))
    moving, effects = step_source(moving, Progress(100))
    assert effects == (SendTokens(2, 100, 150),)
    moving, _ = step_source(moving, Produced(151))
    frozen, effects = step_source(moving, Progress(150))
    assert frozen.state is SourceState.FREEZING
    assert effects[0] is SourceAct.FREEZE


@pytest.mark.parametrize(
    ("gaps", "state"),
    [
        ((50, 4), SourceState.MOVING),
        ((50, 4, 3), SourceState.MOVING),
        ((50, 4, 4), SourceState.FREEZING),
        ((50, 3, 4), SourceState.FREEZING),
        ((50, 5, 5), SourceState.MOVING),
        ((50, 1), SourceState.FREEZING),
        ((0,), SourceState.FREEZING),
    ],
)
def test_a_small_gap_that_rounds_do_not_close_is_left_to_the_freeze(gaps, state):
    moving, _ = step_source(source(), Accepted())
    produced = 100
    for gap in gaps:
        assert moving.state is SourceState.MOVING
        moving, _ = step_source(moving, Produced(produced + gap))
        moving, _ = step_source(moving, Progress(produced))
        produced += gap
    assert moving.state is state


def test_a_target_that_never_catches_up_is_given_up():
    moving, _ = step_source(source(), Accepted())
    for number in range(Terms().most_rounds):
        moving, _ = step_source(moving, Produced(200 + 100 * number))
        moving, effects = step_source(moving, Progress(100))
    assert moving.state is SourceState.ENDED
    assert effects[0] is SourceAct.ABORT
    assert isinstance(effects[-1], End)
    assert "did not catch up" in effects[-1].error


def held() -> Target:
    target = Target(Terms(), by_kv=False, prompt_tokens=10, known=5)
    target, _ = step_target(target, Connected())
    target, _ = step_target(target, Held(5, 0))
    assert target.state is TargetState.HELD
    return target


def test_a_round_is_whole_when_all_but_its_last_token_is_computed():
    target, _ = step_target(held(), TokensCame(5, 8))
    assert step_target(target, Held(8, 16))[1] == ()
    (progress,) = step_target(target, Held(8, 17))[1]
    assert progress == SendProgress(1, 8, 0)


def test_what_does_not_continue_is_refused():
    for event in (TokensCame(6, 8), TokensCame(4, 8), FreezeCame(6)):
        target, effects = step_target(held(), event)
        assert target.state is TargetState.ENDED
        assert effects[0] is TargetAct.DROP
        assert isinstance(effects[1], SendRefused)


ACTIONS = (
    *("advance",) * 6,
    *("deliver",) * 8,
    *("step a", "step b") * 3,
    *("migrate tokens", "migrate kv") * 3,
    *("claim a", "claim b"),
    *("cut", "notice worker", "notice router", "notice source", "notice target"),
    *("expire source", "expire target", "reconnect a", "reconnect b"),
    *("engine a", "engine b", "give back a", "give back b"),
)
ENDS = ("cancel", "kill a", "kill b", "kill router")
PLANS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1000)), min_size=10, max_size=120
)
FATES = st.lists(st.tuples(st.sampled_from(ENDS), st.integers(0, 120)), max_size=2)


async def act(world: World, action: str, pick: int) -> None:
    """Do one thing, if it can be done now."""
    verb, _, rest = action.partition(" ")
    lines = [line for line in world.lines() if line.items]
    sites = list(world.sites.values())
    streams = [s.stream for s in sites if s.stream is not None and s.is_alive]
    match verb:
        case "advance":
            await world.advance()
        case "deliver" if lines:
            lines[pick % len(lines)].deliver()
        case "step" if world.sites[rest].is_alive:
            world.sites[rest].process.step()
        case "migrate":
            world.migrate(by_kv=rest == "kv")
        case "claim":
            await world.claim(rest)
        case "cut" if pick % 3 == 0:
            cut_wire(world, pick)
        case "notice" | "expire":
            notice(world, action, streams[pick % len(streams)] if streams else None, pick)
        case _:
            await strike(world, action, pick)


def cut_wire(world, pick):
    wires = [w for w in world.lines() if all(w is not s.process.out for s in world.sites.values())]
    if wires:
        wires[pick % len(wires)].is_cut = True


def notice(world, action, stream, pick):
    call = world.calls[pick % len(world.calls)] if world.calls else None
    match action:
        case "notice worker" if stream is not None:
            stream.notice_at_worker()
        case "notice router" if stream is not None:
            stream.notice_at_router()
        case "notice source" if call is not None:
            call.notice_at_source()
        case "notice target" if call is not None:
            call.notice_at_target()
        case "expire source" if call is not None:
            call.expire_source()
        case "expire target" if call is not None:
            call.expire_target()


async def strike(world: World, action: str, pick: int) -> None:
    match action.split(" "):
        case ["engine", name] if world.sites[name].is_alive and pick % 4 == 0:
            world.sites[name].restart_engine()
        case ["give", "back", name] if world.sites[name].is_alive and pick % 4 == 0:
            world.sites[name].board.give_back(next(iter(world.sites[name].board._engines)))
        case ["reconnect", name] if world.sites[name].is_alive:
            stream = world.sites[name].stream
            if stream is not None:
                stream.connect()
        case ["cancel"]:
            world.cancel()
        case ["kill", "router"]:
            world.kill_router()
        case ["kill", name] if world.sites[name].is_alive:
            world.kill(name)


@settings(max_examples=150)
@given(plan=PLANS, fates=FATES, prompt_tokens=st.sampled_from([3, 20, 50]))
def test_whatever_happens_the_client_gets_the_true_tokens_from_one_owner_at_a_time(
    plan, fates, prompt_tokens
):
    async def play() -> None:
        world = World(prompt_tokens=prompt_tokens, max_tokens=40)
        await world.start()
        try:
            for number, (action, pick) in enumerate(plan):
                await act(world, action, pick)
                for fate, at in fates:
                    if at == number:
                        await strike(world, fate, 0)
                world.check()
            await world.heal()
        finally:
            await world.stop()

    asyncio.run(play())
