"""What a killed engine or worker costs a client: the pause in a stream, and any changed token.

`python -m bench.resume` starts a cluster of real processes with the demo's large model, then kills
with -9 in mid-stream at random tokens and compares every stream with an undisturbed one.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from bench.machine import machine_facts
from gearfall.cli.bench import percentile
from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.demo import catalogue
from gearfall.infra.launcher import LocalCluster, LocalClusterSettings
from gearfall.pb import common_pb2

MODEL = "arith-large"
PROMPT = "31415+27182="
_LOOK_AGAIN_S = 0.1
RESULTS = Path(__file__).parent / "results" / "resume.json"


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as a client saw it."""

    token_ids: tuple[int, ...]
    longest_pause_s: float
    owners: int
    """Owners the job had; 1 when nothing was killed in time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All kills of one kind of process. Pauses: from the last token before to the first after."""

    killed: str
    kills: int
    resumed: int
    """Streams whose job really changed its owner."""
    changed: int
    """Streams whose tokens differ from the undisturbed run."""
    pause_p50_s: float
    pause_p99_s: float
    pause_max_s: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; exit 1 when a token was lost or changed."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume")
    parser.add_argument("--engine-kills", type=int, default=100)
    parser.add_argument("--worker-kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="the others take over from one")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gearfall-bench-") as home:
        outcomes = asyncio.run(_measure(Path(home), flags))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine_facts(),
        "workers": flags.workers,
        "outcomes": [asdict(each) for each in outcomes],
    }
    flags.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    _print(outcomes)
    sys.exit(1 if any(each.changed for each in outcomes) else 0)


async def _measure(home: Path, flags: argparse.Namespace) -> list[Outcome]:
    cluster = LocalCluster(
        LocalClusterSettings(
            runtime_dir=home / "run",
            data_dir=home / "data",
            rest_listen="127.0.0.1:0",
            grpc_listen="127.0.0.1:0",
            workers_per_node=flags.workers,
        )
    )
    await cluster.start()
    try:
        async with AsyncClient(cluster.grpc_address) as client:
            path = str(catalogue.checkpoint_path(MODEL))
            async for _ in client.register_model(MODEL, path):
                pass
            reference = await _read(client, flags.tokens)
            draw = Random(flags.seed)

            async def kill_all(killed: str, kills: int) -> Outcome:
                streams = []
                for _ in range(kills):
                    find_pid = _engine_pid if killed == "engine" else _worker_pid
                    pid = await find_pid(client, cluster)
                    at = draw.randint(1, flags.tokens // 2)
                    streams.append(await _read(client, flags.tokens, at, pid))
                return _summarise(killed, streams, reference)

            return [
                await kill_all("engine", flags.engine_kills),
                await kill_all("worker", flags.worker_kills),
            ]
    finally:
        await cluster.stop()


async def _read(client: AsyncClient, tokens: int, kill_at: int = 0, pid: int = 0) -> Stream:
    ids: list[int] = []
    longest_s, owners = 0.0, 0
    last = time.perf_counter()
    stream = client.stream(
        MODEL, PROMPT, temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=True
    )
    async for event in stream:
        now = time.perf_counter()
        if isinstance(event, TextDelta):
            if ids:
                longest_s = max(longest_s, now - last)
            last = now
            ids += [item.token_id for item in event.logprobs]
            if kill_at and len(ids) >= kill_at:
                os.kill(pid, signal.SIGKILL)
                kill_at = 0
        elif isinstance(event, Finished):
            owners = event.stages[-1].epochs
    return Stream(tuple(ids), longest_s, owners)


async def _engine_pid(client: AsyncClient, _cluster: LocalCluster) -> int:
    return (await _replicas(client))[0][1]


async def _worker_pid(client: AsyncClient, cluster: LocalCluster) -> int:
    """Return the process of the worker with the replica; all workers are up by then."""
    services = cluster.describe().services
    while any(s.state != "ready" for s in services if s.service == "worker"):
        await asyncio.sleep(_LOOK_AGAIN_S)
        services = cluster.describe().services
    address = (await _replicas(client))[0][0]
    return next(s.pid for s in services if s.address == address)


async def _replicas(client: AsyncClient) -> list[tuple[str, int]]:
    """Return (worker's address, engine's pid) of the one ready replica; wait until it is one."""
    while True:
        found = [
            (worker.address, replica.pid)
            for worker in (await client.status()).workers
            for replica in worker.replicas
            if replica.model == MODEL and replica.state == common_pb2.REPLICA_STATE_READY
        ]
        if len(found) == 1:
            return found
        await asyncio.sleep(_LOOK_AGAIN_S)


def _summarise(killed: str, streams: Sequence[Stream], reference: Stream) -> Outcome:
    pauses = sorted(stream.longest_pause_s for stream in streams)
    return Outcome(
        killed=killed,
        kills=len(streams),
        resumed=sum(stream.owners > 1 for stream in streams),
        changed=sum(stream.token_ids != reference.token_ids for stream in streams),
        pause_p50_s=percentile(pauses, 0.5),
        pause_p99_s=percentile(pauses, 0.99),
        pause_max_s=pauses[-1],
    )


def _print(outcomes: Sequence[Outcome]) -> None:
    table = Table(title="kill -9 in mid-stream", title_justify="left")
    for name in ("killed", "kills", "resumed", "changed", "pause p50", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in outcomes:
        pauses = (each.pause_p50_s, each.pause_p99_s, each.pause_max_s)
        table.add_row(
            each.killed,
            str(each.kills),
            str(each.resumed),
            str(each.changed),
            *(f"{pause * 1000:.0f} ms" for pause in pauses),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
