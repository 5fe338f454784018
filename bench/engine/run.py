"""Generated tokens a second on one machine: `python -m bench.engine`.

gearfall's engine, as a worker runs it, beside transformers' `generate` (the fastest of several
ways), transformers' continuous batching, llama.cpp and, where an interpreter that has it is given,
vLLM: the same random Llama of 135M parameters in
bfloat16, the same prompts, answer lengths and number of threads, greedy, no end of sequence. All
requests of a batch are there at the start; a figure is generated tokens over the whole time, the
prompts' included. Engines take turns, round after round; in the first one every way of a peer runs,
in the others its fastest at that batch. gearfall runs as a worker does by default, with activations
rounded to bfloat16 as its peers round them, and beside that exactly: those answers must be those of
transformers' float32 forward pass. Each engine's must be the same in every round.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.engine.check import first_difference
from bench.engine.figures import OURS, OURS_EXACT, EngineRun, EngineSummary, best_ways, summarize
from bench.engine.memory_read import read_bytes_per_s
from bench.engine.model import VOCABULARY, write_model
from bench.engine.ours import OurEngine, our_engine
from bench.engine.peers import CONTINUOUS, GENERATE, PeerProcess, llama_cpp, start_peers, vllm
from bench.engine.work import Work, make_work
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import Spread
from gearfall.core.generation.arithmetic import Arithmetic

RESULTS = Path(__file__).parents[1] / "results" / "engine.json"
BUILD = Path(__file__).parents[2] / "build"
WAYS = {OURS: Arithmetic.BF16, OURS_EXACT: Arithmetic.EXACT}
ARITHMETIC = ("projection", "mlp", "head", "attention", "row")


async def measure(
    ours: Mapping[str, OurEngine],
    peers: Sequence[PeerProcess],
    works: Sequence[Work],
    rounds: int,
) -> list[EngineRun]:
    """Run all engines in turn on all works, `rounds` times."""
    runs: list[EngineRun] = []
    answered: dict[tuple[str, int], list[list[int]]] = {}
    for index in range(rounds):
        best = best_ways([run for run in runs if run.round_index == 0]) if index else {}
        for work in works:
            tokens = work.answer_tokens
            for name, engine in ours.items():
                seconds, answers = await engine.run(work)
                if answered.setdefault((name, work.batch), answers) != answers:
                    raise RuntimeError(f"{name}, batch {work.batch}: other answers than before")
                same = _agreement([a[0] for a in answers], answered[OURS, work.batch])
                way = WAYS[name].value
                runs.append(_shown(EngineRun(index, name, way, work.batch, tokens, seconds, same)))
            answers = answered[OURS, work.batch]
            turn = index % max(1, len(peers))
            for peer in (*peers[turn:], *peers[:turn]):
                name = peer.kind.name
                for way in peer.kind.ways if index == 0 else (best[name, work.batch],):
                    spent_s, first_tokens = peer.run(way, work)
                    same = _agreement(first_tokens, answers)
                    found = EngineRun(index, name, way, work.batch, tokens, spent_s, same)
                    runs.append(_shown(found))
    return runs


def _shown(run: EngineRun) -> EngineRun:
    speed = f"{run.tokens_per_s:.1f}"
    print(
        f"round {run.round_index}, batch {run.batch:2}, {run.engine}, {run.way}: {speed}",
        flush=True,
    )
    return run


def _agreement(first_tokens: Sequence[int], answers: Sequence[Sequence[int]]) -> float:
    pairs = zip(first_tokens, answers, strict=True)
    return sum(token == answer[0] for token, answer in pairs) / len(answers)


def profile(directory: Path, threads: int, work: Work, lengths: Sequence[int]) -> dict[str, float]:
    """Return the seconds of each part of our engine's steps on `work`, from a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine.step_profile", str(directory), str(threads)]
        + [WAYS[OURS].value]
        + [str(value) for value in (work.batch, *lengths)],
        check=True,
        capture_output=True,
        text=True,
        cwd=BUILD.parent,
    )
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return parts


def overhead_share(parts: dict[str, float]) -> float:
    """Return the part of a step's time that is not the model's arithmetic."""
    return 1.0 - sum(parts[name] for name in ARITHMETIC) / parts["whole"]


def print_summaries(summaries: Sequence[EngineSummary], console: Console) -> None:
    """Print one row for each engine and batch."""
    table = Table(title="Generated tokens/s, medians over the rounds", box=box.SIMPLE_HEAD)
    columns = ("batch", "engine", "way", "tokens/s", "gearfall / it", "read bound", "as our bf16")
    for column in columns:
        table.add_column(column, justify="left" if column in {"engine", "way"} else "right")
    for each in summaries:
        ratio = "" if each.engine == OURS else _ratio(each.ours_over)
        speed = f"{each.tokens_per_s.median:.1f}"
        bound, same = f"{each.bound_share:.2f}", f"{each.agreement:.2f}"
        table.add_row(str(each.batch), each.engine, each.way, speed, ratio, bound, same)
    console.print(table)


def print_profiles(profiles: dict[int, dict[str, float]], console: Console) -> None:
    """Print each part's share of our engine's time at each batch."""
    table = Table(title="Where gearfall's time goes, % of all steps", box=box.SIMPLE_HEAD)
    table.add_column("part")
    for batch in profiles:
        table.add_column(f"batch {batch}", justify="right")
    for part in next(iter(profiles.values())):
        if part not in {"whole", "steps", "tokens"}:
            shares = (f"{100 * each[part] / each['whole']:.1f}" for each in profiles.values())
            table.add_row(part, *shares)
    overheads = (f"{100 * overhead_share(each):.1f}" for each in profiles.values())
    table.add_row("outside the arithmetic", *overheads)
    step_ms = (f"{1000 * each['whole'] / each['steps']:.2f}" for each in profiles.values())
    table.add_row("ms a step", *step_ms)
    console.print(table)


def _ratio(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


async def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, print and write."""
    threads = arguments.threads
    torch.set_num_threads(threads)
    directory = BUILD / "engine" / "llama-135m"
    source, converted = write_model(directory)
    lengths = (arguments.shortest, arguments.longest)
    works = [make_work(batch, VOCABULARY, *lengths) for batch in arguments.batches]
    kinds, missing = [GENERATE, CONTINUOUS], {}
    llama, reason = llama_cpp(BUILD / "peers-engine")
    if llama is None:
        missing["llama.cpp"] = reason
    else:
        kinds.append(llama)
    kinds = [kind for kind in kinds if kind.name in arguments.peers]
    if arguments.vllm_python is not None:
        kinds.append(vllm(arguments.vllm_python))
    read = read_bytes_per_s(threads)
    async with AsyncExitStack() as stack:
        ours = {
            name: await stack.enter_async_context(our_engine(source, converted, threads, way))
            for name, way in WAYS.items()
        }
        checked = works[min(1, len(works) - 1)]
        _, answers = await ours[OURS_EXACT].run(checked)
        difference = first_difference(source, checked, answers)
        if difference:
            raise RuntimeError(f"gearfall's tokens are not transformers': {difference}")
        console.print(f"{checked.answer_tokens} greedy exact tokens are transformers' in float32.")
        peers, absent = start_peers(kinds, source, threads, directory / "peers.log")
        try:
            runs = await measure(ours, peers, works, arguments.rounds)
        finally:
            for peer in peers:
                peer.stop()
    profiles = {work.batch: profile(directory, threads, work, lengths) for work in works}
    weight_bytes = (source / "model.safetensors").stat().st_size
    summaries = summarize(runs, weight_bytes=weight_bytes, read_bytes_per_s=read)
    print_summaries(summaries, console)
    print_profiles(profiles, console)
    missing |= absent
    for name, why in missing.items():
        console.print(f"Not measured: {name}: {why}", markup=False)
    report = {
        "settings": {"threads": threads, "rounds": arguments.rounds, "lengths": lengths},
        "machine": machine_facts(),
        "versions": dict(our_versions()) | {peer.kind.name: peer.version for peer in peers},
        "missing": missing,
        "weight_bytes": weight_bytes,
        "read_bytes_per_s": read,
        "checked_tokens": checked.answer_tokens,
        "summaries": [asdict(each) for each in summaries],
        "profiles": {str(batch): parts for batch, parts in profiles.items()},
        "runs": [asdict(each) for each in runs],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {arguments.out}")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--shortest", type=int, default=32, help="tokens of prompts and answers")
    parser.add_argument("--longest", type=int, default=256)
    names = ["generate", "continuous", "llama.cpp"]
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM: a peer more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asyncio.run(run(parser.parse_args(), Console(width=100)))
