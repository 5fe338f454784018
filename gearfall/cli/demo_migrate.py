"""`gearfall demo migrate`: an answer moves three times while it is read, and says so beside it."""

import asyncio
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson
from gearfall.cli.models import register_with_progress
from gearfall.cli.render import console, print_json, seconds_text
from gearfall.client import AsyncClient, Client
from gearfall.demo import catalogue
from gearfall.demo.migrate import MODEL, MOVES_AT, PROMPT, MigrationDemo, Move, run
from gearfall.infra.failpoints import RULES_VARIABLE
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings

WIDTH = 48
DIFFERENT_EXIT = 1


def migrate(
    pace: Annotated[
        float,
        typer.Option(min=0.0, help="Tokens a second, slow enough to watch; 0: as fast as it goes."),
    ] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Move a long answer between two workers while it streams, and compare it to one left alone.

    Exits with 1 when one token differs.
    """
    with tempfile.TemporaryDirectory(prefix="gearfall-demo-") as home:
        result = asyncio.run(_run(Path(home), pace, quiet=as_json))
    if as_json:
        print_json(asdict(result))
    else:
        _print_result(result)
    raise typer.Exit(0 if result.is_same else DIFFERENT_EXIT)


class Page:
    """An answer in lines of WIDTH, with notes to the right of the line in which they fell."""

    def __init__(self, put: Callable[[str], None]) -> None:
        """`put` prints without a newline."""
        self._put = put
        self._column = 0
        self._notes: list[str] = []

    def write(self, text: str) -> None:
        """See `Show`."""
        for character in text:
            self._put(character)
            self._column += 1
            if self._column == WIDTH:
                self.end_line()

    def move(self, number: int, move: Move) -> None:
        """See `Show`."""
        rounds = f"{move.rounds} round" + "s" * (move.rounds != 1)
        self._notes.append(
            f"<- move {number}, to {move.target}: by {move.path}, {rounds}, paused "
            f"{seconds_text(move.pause_s)}"
        )

    def end_line(self) -> None:
        """Write the notes and begin a new line."""
        first, *more = self._notes or [""]
        self._put(" " * (WIDTH - self._column) + (f"  {first}" if first else "") + "\n")
        for note in more:
            self._put(" " * (WIDTH + 2) + note + "\n")
        self._column, self._notes = 0, []


async def _run(home: Path, pace: float, *, quiet: bool) -> MigrationDemo:
    settings = LocalClusterSettings(
        runtime_dir=home / "run",
        data_dir=home / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        workers_per_node=2,
    )
    if pace > 0:
        # The engines wait at each token by a named point that is there for tests.
        os.environ[RULES_VARIABLE] = f"engine.decode=delay:{1 / pace:.4f}"
    cluster = LocalCluster(settings)
    try:
        with console.status("starting etcd, Redis, store, two workers, scheduler, router"):
            await cluster.start()
        await asyncio.to_thread(_register, cluster.grpc_address, quiet=quiet)
        page = Page(_put_nothing if quiet else _put)
        if not quiet:
            console.print(f"{MODEL} goes on from {PROMPT!r}, moved at tokens {MOVES_AT}:\n")
        async with AsyncClient(cluster.grpc_address) as client:
            result = await run(client, page)
        page.end_line()
        return result
    finally:
        await cluster.stop()


def _register(grpc_address: str, *, quiet: bool) -> None:
    with Client(grpc_address) as client:
        register_with_progress(client, MODEL, catalogue.checkpoint_path(MODEL), quiet=quiet)


def _put(text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def _put_nothing(_text: str) -> None:
    return


def _print_result(result: MigrationDemo) -> None:
    verdict = "[green]the same[/]" if result.is_same else "[red]not the same[/]"
    console.print(
        f"{result.same_tokens} of {result.tokens} tokens as in an undisturbed run: {verdict}"
    )
    console.print(
        f"gap between tokens: median {seconds_text(result.median_gap_s)}, longest "
        f"{seconds_text(result.longest_gap_s)}; undisturbed: median "
        f"{seconds_text(result.undisturbed_median_gap_s)}, longest "
        f"{seconds_text(result.undisturbed_longest_gap_s)}"
    )
