"""Where the core time of small requests goes: `python -m bench.cascade cores`.

A local cluster of two workers with the demo models, which are so small that nearly all that is
spent is spent beside the arithmetic. Measured are, process by process, the core time a second while
nobody asks, and the core time a request while questions come at a steady rate, in random gaps: of
the small model alone and of the cascade of all three. The client's time is not in it.

`--against DIR` starts a second cluster from another checkout, which has an environment of its own
(`make venv`), and measures both in turn: the load goes to one after the other, in each round in
another order.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from rich.table import Table

from bench.cascade.companions import write_companion
from bench.cascade.core_time import ALL, Burst, difference, medians_ms, ratios, spent_so_far
from bench.cascade.real_cluster import keep_replicas
from bench.cascade.real_console import console
from bench.cascade.real_work import MAX_TOKENS
from bench.measuring.spread import rotated
from gearfall.cli.deploy import deployment_from_file
from gearfall.client import AsyncClient
from gearfall.core.errors import Internal
from gearfall.core.ids import ModelName
from gearfall.demo.arithmetic import Question
from gearfall.demo.catalogue import (
    MODELS,
    checkpoint_paths,
    demo_questions,
    deployment_path,
)
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings, service_commands
from gearfall.infra.local.supervised_process import ProcessSpec

HERE, THERE = "here", "against"
CASCADE = "arith"
NODES = 2
LOAD = Path(__file__).with_name("cores_load.py")
QUESTIONS = 2000


@dataclass(frozen=True, slots=True)
class Measured:
    """A running cluster."""

    name: str
    load: asyncio.subprocess.Process
    """`cores_load.py`: the client of the cluster's own checkout."""
    pids: Sequence[tuple[str, int]]

    async def ask(self, burst: Mapping[str, object]) -> None:
        """Ask a burst; raises Internal when an answer fails."""
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        self.load.stdin.write(json.dumps(burst).encode() + b"\n")
        if not await self.load.stdout.readline():
            raise Internal("the load ended early: see what it said above")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.cascade cores", description=__doc__)
    parser.add_argument("--rate", type=float, default=50.0, help="Requests a second.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each stretch with requests.")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="Of each without.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--ask", nargs="+", default=[MODELS[0], CASCADE], help="Models and cascade to ask."
    )
    parser.add_argument(
        "--companions", action="store_true", help="The larger models of `bench.cascade real`."
    )
    parser.add_argument("--against", type=Path, help="Another checkout, with its .venv.")
    asyncio.run(_run(parser.parse_args(argv)))


async def _run(chosen: argparse.Namespace) -> None:
    async with contextlib.AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gearfall-cores-")))
        trees = {HERE: None} if chosen.against is None else {HERE: None, THERE: chosen.against}
        paths = checkpoint_paths()
        if chosen.companions:
            paths = _write_companions(paths, scratch / "companions")
        clusters = {
            name: await stack.enter_async_context(_cluster(name, scratch / name, tree, paths))
            for name, tree in trees.items()
        }
        bursts = await _rounds(chosen, clusters)
    _print(bursts, tuple(clusters))


async def _rounds(chosen: argparse.Namespace, clusters: Mapping[str, Measured]) -> Sequence[Burst]:
    questions = demo_questions(QUESTIONS)
    for what in chosen.ask:
        for each in clusters.values():
            await _burst(each, what, questions, chosen.rate, 2.0)
    order = [
        (name, what)
        for number in range(chosen.rounds)
        for what in ("", *chosen.ask)
        for name in rotated(tuple(clusters), number)
    ]
    return [
        await _burst(
            clusters[name],
            what,
            questions,
            chosen.rate if what else 0.0,
            chosen.seconds if what else chosen.idle_seconds,
        )
        for name, what in order
    ]


async def _burst(
    cluster: Measured, what: str, questions: Sequence[Question], rate: float, seconds: float
) -> Burst:
    """Ask at a rate for a while, or do nothing, and say what that cost."""
    draw = Random(what)
    asks = [
        (draw.uniform(0.0, seconds), questions[number % len(questions)].prompt)
        for number in range(round(rate * seconds))
    ]
    wanted = {"what": what, "seconds": seconds, "max_tokens": MAX_TOKENS, "asks": asks}
    before, begun_s = spent_so_far(cluster.pids), time.perf_counter()
    await cluster.ask(wanted)
    took_s = time.perf_counter() - begun_s
    spent = difference(spent_so_far(cluster.pids), before)
    return Burst(cluster.name, what, len(asks), took_s, spent)


@contextlib.asynccontextmanager
async def _cluster(
    name: str, directory: Path, tree: Path | None, paths: Mapping[str, Path]
) -> AsyncIterator[Measured]:
    """Start a cluster from a checkout, with a replica of every model on every worker."""
    settings = LocalClusterSettings(
        runtime_dir=directory / "run",
        data_dir=directory / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        nodes=NODES,
        dram_bytes=2**30,
        memory_bytes=3 * 2**30,
        max_replicas=4,
        log_level="WARNING",
    )
    cluster = LocalCluster(settings, commands=lambda known: _commands(known, tree))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
        for model, path in paths.items():
            async for _ in client.register_model(model, str(path)):
                pass
        await keep_replicas(client, tuple(map(ModelName, MODELS)), NODES)
        await client.deploy(deployment_from_file(deployment_path()))
        pids = [(process.spec.service, process.pid) for process in cluster.processes]
        load = await stack.enter_async_context(_load(cluster.grpc_address, tree))
        yield Measured(name, load, pids)


@contextlib.asynccontextmanager
async def _load(address: str, tree: Path | None) -> AsyncIterator[asyncio.subprocess.Process]:
    python, own = (sys.executable, {}) if tree is None else _environment(tree)
    load = await asyncio.create_subprocess_exec(
        *(python, LOAD, address),
        env=os.environ | own,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield load
    finally:
        assert load.stdin is not None
        load.stdin.close()
        await load.wait()


def _environment(tree: Path) -> tuple[str, dict[str, str]]:
    """Return a checkout's Python and what makes it find that checkout's modules."""
    # Or this checkout's services would be found in the working directory.
    own = {"PYTHONPATH": str(tree.absolute()), "PYTHONSAFEPATH": "1"}
    return str(tree.absolute() / ".venv" / "bin" / "python"), own


def _write_companions(paths: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    for name, original in paths.items():
        write_companion(original, directory / name)
    return {name: directory / name for name in paths}


def _commands(settings: LocalClusterSettings, tree: Path | None) -> Sequence[Sequence[ProcessSpec]]:
    stages = service_commands(settings)
    if tree is None:
        return stages
    python, own = _environment(tree)
    return [
        [
            replace(spec, argv=(python, *spec.argv[1:]), environment={**spec.environment, **own})
            for spec in stage
        ]
        for stage in stages
    ]


def _print(bursts: Sequence[Burst], clusters: Sequence[str]) -> None:
    asked = tuple(dict.fromkeys(burst.what for burst in bursts))
    for name in clusters:
        table = Table(title=f"{name}: core time, medians of rounds")
        table.add_column("process")
        for what in asked:
            table.add_column(f"{what}, ms a request" if what else "idle, ms a second")
        columns = [medians_ms(bursts, name, what) for what in asked]
        for kind in columns[0]:
            table.add_row(kind, *(f"{column[kind]:.2f}" for column in columns))
        console.print(table)
    if THERE in clusters:
        for what in asked:
            found = sorted(ratios(bursts, what, HERE, THERE))
            said = ", ".join(f"{ratio:.3f}" for ratio in found)
            console.print(f"{what or 'idle'}: {ALL} {HERE} / {THERE}: {said}", highlight=False)


if __name__ == "__main__":
    main()
