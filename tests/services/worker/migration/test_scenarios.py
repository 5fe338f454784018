"""Scenario files in `scenarios/`: scripts of one migration and what goes wrong with it.

A line is a command; `each NAME: A B` (or `A; B`) runs the script once for each value of `{NAME}`.
Whatever a script expects, the world checks at every step that the client's tokens are the true ones
in order, and at the end that it has them all and that nothing is left anywhere.
"""

import itertools
import re
from pathlib import Path

import pytest

from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.migration.source_table import SourceState
from services.worker.migration.target_table import TargetState
from tests.services.worker.migration.migration_world import World
from tests.services.worker.migration.played_worker import MODEL
from tests.services.worker.migration.wires import Line

FOLDER = Path(__file__).parent / "scenarios"
TICKS = 3000
FILLER = (JobId("filler"), Epoch(1))


def scripts() -> list[tuple[str, list[str]]]:
    found = []
    for path in sorted(FOLDER.glob("*.txt")):
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        choices = {}
        for line in lines:
            if match := re.fullmatch(r"each (\w+): (.+)", line):
                values = match[2]
                choices[match[1]] = re.split(r"; " if "; " in values else r" ", values)
        commands = [line for line in lines if not line.startswith("each ")]
        for picked in itertools.product(*choices.values()):
            named = dict(zip(choices, picked, strict=True))
            name = " ".join((path.stem, *picked))
            found.append((name, [line.format(**named) for line in commands]))
    return found


class Player:
    """Plays one script."""

    def __init__(self) -> None:
        self.world = World()
        self._held: dict[str, Line] = {}

    async def play(self, commands: list[str]) -> None:
        match = re.fullmatch(r"job (\d+) (\d+)", commands[0])
        assert match, commands[0]
        self.world = World(prompt_tokens=int(match[1]), max_tokens=int(match[2]))
        await self.world.start()
        try:
            for command in commands[1:]:
                await self._do(command)
        finally:
            await self.world.stop()

    async def _do(self, command: str) -> None:
        verb, _, rest = command.partition(" ")
        world = self.world
        match verb:
            case "run":
                await world.run(steps=int(rest))
            case "migrate":
                assert world.migrate(by_kv=rest == "kv")
            case "until":
                await self._until(rest)
            case "heal":
                await world.heal()
            case "expect":
                self._expect(rest)
            case "claim":
                assert await world.claim(rest)
            case _:
                self._disturb(command)
        world.check()

    def _disturb(self, command: str) -> None:
        world, call = self.world, self.world.calls[-1] if self.world.calls else None
        match command.split(" ", 2):
            case ["kill", "router"]:
                world.kill_router()
            case ["kill", name]:
                world.kill(name)
            case ["engine", name]:
                world.sites[name].restart_engine()
            case ["cancel"]:
                world.cancel()
            case ["expire", side] if call is not None:
                call.expire_source() if side == "source" else call.expire_target()
            case ["cut" | "hold" | "release" as verb, line]:
                self._line(line).is_cut = verb != "release"
            case _:
                self._arrange(command)

    def _arrange(self, command: str) -> None:
        world = self.world
        match command.split(" ", 2):
            case ["refuse", *reason]:
                world.sites["b"].obstacle = " ".join(reason)
            case ["fill", name, blocks]:
                assert world.sites[name].process.blocks.extend(FILLER, int(blocks) * BLOCK_TOKENS)
            case ["empty", name]:
                world.sites[name].process.blocks.free(FILLER)
            case ["streams", "closed"]:
                world.opens_streams = False
            case ["router", "loses", name]:
                stream = world.sites[name].stream
                assert stream is not None
                stream.notice_at_router()
            case ["give", "back", name]:
                world.sites[name].board.give_back(MODEL)
            case _:
                raise AssertionError(command)

    def _line(self, name: str) -> Line:
        site, _, direction = name.partition(".")
        if direction:
            stream = self.world.sites[site].stream
            if stream is None:  # the target has not opened it yet: nothing to cut
                return Line(lambda *_: None)
            return stream.up if direction == "up" else stream.down
        call = self.world.calls[-1]
        return {"forward": call.forward, "back": call.back, "bulk": call.bulk}[name]

    async def _until(self, what: str) -> None:
        side, _, state = what.partition(" ")
        for _ in range(TICKS):
            call = self.world.calls[-1]
            if side == "ended" and call.error is not None:
                return
            if side == "source" and call.source.source.state is SourceState(state):
                return
            target = call.target
            if side == "target" and target and target.target.state is TargetState(state):
                return
            await self._tick()
        raise AssertionError(f"never {what}")

    async def _tick(self) -> None:
        """One message, or a step of both engines when none is on its way."""
        if any(line.deliver() for line in self.world.lines()):
            self.world.check()
            return
        for site in self.world.sites.values():
            if site.is_alive:
                site.process.step()
        await self.world.turn()

    def _expect(self, what: str) -> None:
        call, client = self.world.calls[-1], self.world.client
        owners = [f"{worker}{epoch}" for worker, epoch in client.owners]
        match what.split(" ", 1):
            case ["moved"]:
                assert call.error == ""
            case ["stayed", reason]:
                assert call.error
                assert reason in call.error
            case ["owners", names]:
                assert owners == names.split(" ")
            case ["owner", name]:
                assert name.replace(" ", "") in owners
            case ["at", least]:
                assert len(owners) >= int(least.split(" ")[1])
            case ["source", state]:
                assert call.source.source.state is SourceState(state)
            case _:
                raise AssertionError(what)


@pytest.mark.parametrize(
    ("name", "commands"), scripts(), ids=lambda x: x if isinstance(x, str) else ""
)
async def test_scenario(name: str, commands: list[str]) -> None:
    await Player().play(commands)
