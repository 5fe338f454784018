"""What a killed or frozen engine or worker costs a client: a pause, and any changed token.

`python -m bench.resume` starts a cluster of real processes with the demo's large model, then kills
(SIGKILL) or freezes (SIGSTOP) in mid-stream at random tokens and compares every stream, greedy and
sampled by turns, with an undisturbed one. A pause has two parts: until the router has noticed, as
its log says to the millisecond, and from there to the next token.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from bench.measuring.entry import run_bench
from bench.measuring.machine import machine_facts
from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.demo import catalogue
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.pb import common_pb2
from gearfall.simulation.fleet.figures import quantile

MODEL = "arith-large"
PROMPT = "31415+27182="
SAMPLINGS = (Options(temperature=0.0), Options(temperature=1.0, seed=17))
_LOOK_AGAIN_S = 0.1
_NOTICED = "job lost its owner"
RESULTS = Path(__file__).parent / "results" / "resume.json"


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as a client saw it."""

    token_ids: tuple[int, ...]
    owners: int
    """Owners the job had; 1 when nothing was struck in time."""
    struck_unix_s: float = 0.0
    next_token_unix_s: float = 0.0
    """When the first token of another owner came: behind the longest pause since the strike."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All strikes of one kind. Times are of the streams that really changed their owner."""

    struck: str
    strikes: int
    resumed: int
    changed: int
    """Streams, of all, whose tokens differ from the undisturbed run."""
    noticed_p50_s: float
    """From the strike to the router's notice."""
    next_token_p50_s: float
    """From the notice to the next token at the client."""
    next_token_p99_s: float
    pause_p50_s: float
    """From the strike to the next token at the client."""
    pause_p99_s: float
    pause_max_s: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; exit 1 when a token was lost or changed."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume")
    parser.add_argument("--engine-kills", type=int, default=100)
    parser.add_argument("--worker-kills", type=int, default=5)
    parser.add_argument("--engine-freezes", type=int, default=5)
    parser.add_argument("--worker-freezes", type=int, default=0, help="with --workers 2 or more")
    parser.add_argument("--workers", type=int, default=1, help="the others take over from one")
    parser.add_argument("--tokens", type=int, default=200)
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
            references = [await _read(client, flags.tokens, each) for each in SAMPLINGS]
            striker = _Striker(client, cluster, flags.tokens, Random(flags.seed))
            return [
                await striker.strike_all(victim, signum, strikes, references)
                for victim, signum, strikes in (
                    ("engine", signal.SIGKILL, flags.engine_kills),
                    ("worker", signal.SIGKILL, flags.worker_kills),
                    ("engine", signal.SIGSTOP, flags.engine_freezes),
                    ("worker", signal.SIGSTOP, flags.worker_freezes),
                )
                if strikes
            ]
    finally:
        await cluster.stop()


class _Striker:
    """Strikes one process after another and measures what it cost."""

    def __init__(
        self, client: AsyncClient, cluster: LocalCluster, tokens: int, draw: Random
    ) -> None:
        self._client = client
        self._cluster = cluster
        self._tokens = tokens
        self._draw = draw

    async def strike_all(
        self, victim: str, signum: signal.Signals, strikes: int, references: Sequence[Stream]
    ) -> Outcome:
        streams = []
        for number in range(strikes):
            find_pid = _engine_pid if victim == "engine" else _worker_pid
            pid = await find_pid(self._client, self._cluster)
            at = self._draw.randint(1, self._tokens // 2)
            sampling = SAMPLINGS[number % len(SAMPLINGS)]
            streams.append(
                await _read(self._client, self._tokens, sampling, at, partial(os.kill, pid, signum))
            )
            if signum is signal.SIGSTOP:
                with contextlib.suppress(ProcessLookupError):  # a frozen engine was killed
                    os.kill(pid, signal.SIGCONT)
        changed = sum(
            stream.token_ids != references[number % len(SAMPLINGS)].token_ids
            for number, stream in enumerate(streams)
        )
        verb = "killed" if signum is signal.SIGKILL else "frozen"
        return summarise(f"{victim} {verb}", streams, changed, self._notices())

    def _notices(self) -> list[float]:
        """Return when the router noticed that an owner was gone, Unix seconds, ascending."""
        services = self._cluster.describe().services
        log = next(Path(each.log) for each in services if each.service == "router")
        lines = (json.loads(line) for line in log.read_text().splitlines() if _NOTICED in line)
        return sorted(datetime.fromisoformat(line["time"]).timestamp() for line in lines)


async def _read(
    client: AsyncClient,
    tokens: int,
    sampling: Options,
    strike_at: int = 0,
    strike: Callable[[], None] = lambda: None,
) -> Stream:
    ids: list[int] = []
    owners, struck_s, last_s, longest_s, next_token_s = 0, 0.0, 0.0, 0.0, 0.0
    options = sampling | Options(max_tokens=tokens, ignore_eos=True, logprobs=True)
    async for event in client.stream(MODEL, PROMPT, **options):
        if isinstance(event, TextDelta):
            now_s = time.time()
            if struck_s and now_s - last_s > longest_s:
                longest_s, next_token_s = now_s - last_s, now_s
            last_s = now_s
            ids += [item.token_id for item in event.logprobs]
            if strike_at and len(ids) >= strike_at:
                strike_at, struck_s = 0, time.time()
                strike()
        elif isinstance(event, Finished):
            owners = event.stages[-1].epochs
    return Stream(tuple(ids), owners, struck_s, next_token_s)


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
            if replica.model == MODEL
            and replica.state == common_pb2.REPLICA_STATE_READY
            and _runs(replica.pid)  # the record may lag behind the last kill
        ]
        if len(found) == 1:
            return found
        await asyncio.sleep(_LOOK_AGAIN_S)


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def summarise(
    struck: str, streams: Sequence[Stream], changed: int, notices_s: Sequence[float]
) -> Outcome:
    """Return the times of streams that were struck; `notices_s`: when the router said so.

    Raises RuntimeError when every stream had ended before.
    """
    spans_s: list[tuple[float, float]] = []  # until it was noticed, from there to the next token
    for stream in streams:
        # The log cuts its times to the millisecond.
        first_s, last_s = stream.struck_unix_s - 0.001, stream.next_token_unix_s
        at_s = next((at_s for at_s in notices_s if first_s <= at_s <= last_s), None)
        if stream.owners > 1 and at_s is not None:
            spans_s.append((max(0.0, at_s - stream.struck_unix_s), last_s - at_s))
    if not spans_s:
        raise RuntimeError(f"{struck}: every stream had ended before; use more --tokens")
    noticed, rest = zip(*spans_s, strict=True)
    pauses = list(map(sum, spans_s))
    return Outcome(
        struck=struck,
        strikes=len(streams),
        resumed=len(spans_s),
        changed=changed,
        noticed_p50_s=quantile(noticed, 0.5),
        next_token_p50_s=quantile(rest, 0.5),
        next_token_p99_s=quantile(rest, 0.99),
        pause_p50_s=quantile(pauses, 0.5),
        pause_p99_s=quantile(pauses, 0.99),
        pause_max_s=max(pauses),
    )


def _print(outcomes: Sequence[Outcome]) -> None:
    table = Table(title="struck in mid-stream", title_justify="left")
    names = ("noticed p50", "then next token p50", "p99", "pause p50", "p99", "max")
    for name in ("struck", "strikes", "resumed", "changed", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for each in outcomes:
        times_s = (
            each.noticed_p50_s,
            each.next_token_p50_s,
            each.next_token_p99_s,
            each.pause_p50_s,
            each.pause_p99_s,
            each.pause_max_s,
        )
        table.add_row(
            each.struck,
            str(each.strikes),
            str(each.resumed),
            str(each.changed),
            *(f"{spent_s * 1000:.0f} ms" for spent_s in times_s),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    run_bench(main)
