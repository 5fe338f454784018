"""`gearfall history`: the verdict on a run whose processes wrote down what they did."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson
from gearfall.cli.render import console, print_json
from gearfall.core.errors import NotFound
from gearfall.core.generation.verdict import Verdict, judge
from gearfall.infra.history_log import alive_pids, ask_what_is_held, read_histories

_ANSWER_TIMEOUT_S = 5.0


def history(
    directory: Annotated[Path, typer.Argument(help="What GEARFALL_HISTORY named.")],
    running: Annotated[
        bool, typer.Option(help="The cluster runs and is idle: ask what its processes hold.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge a run: owners, tokens, ends, and what is left over; exit with 1 if it is not sound."""
    if running:
        ask_what_is_held(directory, timeout_s=_ANSWER_TIMEOUT_S)
    histories = read_histories(directory)
    if not histories:
        raise NotFound(f"no process wrote a history to {directory}")
    verdict = judge(histories, alive_pids(histories), is_stopped=not running)
    if as_json:
        print_json(asdict(verdict) | {"sound": verdict.is_sound, "processes": len(histories)})
    else:
        _print(verdict, len(histories))
    if not verdict.is_sound:
        raise typer.Exit(1)


def _print(verdict: Verdict, processes: int) -> None:
    for breach in verdict.breaches:
        console.print(f"[red]breach[/] {breach}", highlight=False, soft_wrap=True)
    word = "[green]sound[/]" if verdict.is_sound else "[red]not sound[/]"
    console.print(
        f"{word}: {verdict.tokens} tokens of {verdict.jobs} jobs in {processes} processes; "
        f"{verdict.moves} moves, {verdict.resumes} resumes, {verdict.abandoned} abandoned; "
        f"lost {verdict.lost}, repeated {verdict.repeated}, changed {verdict.changed}",
        highlight=False,
        soft_wrap=True,
    )
