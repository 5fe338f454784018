"""What a leader's writer has done when it returns, and what it says of failures behind."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import cast

import pytest

from gearfall.core.errors import Conflict, Internal, PermissionDenied, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.ports import Fence
from gearfall.core.records import AssignmentRecord, DecisionRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.scheduling.actions import Action, Assign, Decide
from services.scheduler.action_writer import ActionWriter
from tests.gearfall.scheduling.clusters import assignment


class SlowReasons:
    """Cluster state that takes assignments at once and reasons when a test lets it."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.let_go = asyncio.Event()
        self.error: Exception | None = None

    async def put_assignment(self, record: AssignmentRecord, *, fence: Fence) -> int:
        self.written.append(f"assign {record.model}")
        return len(self.written)

    async def put_decision(self, record: DecisionRecord, *, fence: Fence) -> int:
        await self.let_go.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.written.append(f"why {record.model}")
        return len(self.written)


def start(name: str) -> Sequence[Action]:
    return (
        Assign(assignment(ModelName(name))),
        Decide(DecisionRecord(ModelName(name), 0.0, "start", "")),
    )


def writer_to(state: SlowReasons) -> tuple[ActionWriter, list[bool]]:
    woken: list[bool] = []
    fence = Fence("leader", 1)
    writer = ActionWriter(cast("Cluster", state), fence, on_failed=lambda: woken.append(True))
    return writer, woken


async def test_nobody_waits_for_the_reason_of_another_start():
    state = SlowReasons()
    writer, _ = writer_to(state)
    assert await writer.write_all(start("a")) == 1
    assert await writer.write_all(start("b")) == 2
    assert state.written == ["assign a", "assign b"]
    state.let_go.set()
    await writer.finish()
    assert state.written[2:] == ["why a", "why b"]
    assert not writer.has_failed


@pytest.mark.parametrize("error", [Conflict("deposed"), Unavailable("no answer")])
async def test_a_reason_that_was_not_written_is_told_once_and_costs_no_other(error):
    state = SlowReasons()
    state.error = error
    writer, woken = writer_to(state)
    await writer.write_all(start("a"))
    await writer.write_all(start("b"))
    state.let_go.set()
    await writer.finish()
    assert woken == [True]
    assert state.written == ["assign a", "assign b", "why b"]
    assert writer.has_failed
    with pytest.raises(type(error)):
        writer.raise_failed()
    writer.raise_failed()


@pytest.mark.parametrize("error", [PermissionDenied("not yours"), Internal("too large")])
async def test_a_refused_reason_is_logged_once_and_costs_no_other(error, caplog):
    state = SlowReasons()
    state.error = error
    writer, woken = writer_to(state)
    for name in "abc":
        await writer.write_all(start(name))
    state.let_go.set()
    with caplog.at_level(logging.ERROR):
        await writer.finish()
    assert state.written[3:] == ["why b", "why c"]
    assert [record.message for record in caplog.records] == ["reason refused"]
    # To decide anew would only have it refused again.
    assert not writer.has_failed
    assert not woken


class SlowStarts(SlowReasons):
    """Cluster state that takes reasons at once and assignments when a test lets it."""

    async def put_assignment(self, record: AssignmentRecord, *, fence: Fence) -> int:
        await self.let_go.wait()
        if self.error is not None:
            raise self.error
        return await super().put_assignment(record, fence=fence)

    async def put_decision(self, record: DecisionRecord, *, fence: Fence) -> int:
        self.written.append(f"{record.model}: {record.decision}")
        return len(self.written)

    async def wait_seen(self, revision: int) -> None:
        pass


@pytest.mark.parametrize("error", [None, Unavailable("no answer")])
async def test_what_was_decided_last_stands_though_an_earlier_plan_is_written_later(error):
    state = SlowStarts()
    state.error = error
    writer, _ = writer_to(state)
    is_seen = asyncio.Event()
    later = Decide(DecisionRecord(ModelName("a"), 1.0, "wait", ""))
    writer.write_behind(start("a"), lambda _: None)
    writer.write_behind((later,), lambda _: is_seen.set())
    await is_seen.wait()
    assert state.written == [], "the second plan has no step, and its reason waits for the first"
    state.let_go.set()
    with contextlib.suppress(Unavailable):
        await writer.settled()
    await writer.finish()
    assert state.written == (["a: wait"] if error else ["assign a", "a: start", "a: wait"])


async def test_a_plan_that_was_not_begun_yet_is_not_written_once_its_leader_finishes():
    state = SlowReasons()
    state.let_go.set()
    writer, _ = writer_to(state)
    writer.write_behind(start("a"), lambda _: None)
    await writer.finish()
    assert state.written == []


class RefusesOneLosesOther(SlowReasons):
    async def put_decision(self, record: DecisionRecord, *, fence: Fence) -> int:
        raise Internal("too large") if record.model == "a" else Unavailable("no answer")


async def test_a_refused_reason_does_not_hide_one_that_can_be_tried_again():
    writer, woken = writer_to(RefusesOneLosesOther())
    await writer.write_all((*start("a"), *start("b")))
    await writer.finish()
    assert woken == [True]
    with pytest.raises(Unavailable):
        writer.raise_failed()
