"""Where a step's time goes: the engine's own parts around a clock, in a process of its own.

The arithmetic is timed inside the native pass; packing, sampling, planning and the messages around
it here. A JSON line is printed: seconds by part and the steps that they were spent in.
"""

import json
import mmap
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.engine.model import CANARY_FILE, VOCABULARY
from bench.engine.ours import KV_TOKENS
from bench.engine.work import Work, make_work
from gearfall.core.checkpoint.manifest import parse_manifest
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.canary import parse_canary
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine import engine as engine_module
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks, blocks_for
from services.worker.engine.batching.packing import pack_step
from services.worker.engine.engine import Engine
from services.worker.engine.main import STEP_TOKENS
from services.worker.engine.model.engine_model import EngineModel, build_model
from services.worker.engine.model.ops import ops_for
from services.worker.engine.model.sampler import Rows
from services.worker.engine.starting.canary import run_canary
from services.worker.engine.stream import EngineStream
from services.worker.engine_link.messages import SubmitJob


class Clocks:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with its time added to `part`."""

        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - begun

        return run


def profile(model: EngineModel, work: Work) -> dict[str, float]:
    """Answer `work`; return the seconds of each part, `steps` and `tokens`."""
    clocks = Clocks()
    batch = Batch(KvBlocks(blocks_for(KV_TOKENS)), slots=work.batch, step_tokens=STEP_TOKENS)
    timed: Any = batch
    timed.plan_step = clocks.timed("plan", batch.plan_step)
    engine = Engine(model, batch, context_tokens=2048)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs, _clocks_on(clocks, model):
        stream = EngineStream(ours)
        send = clocks.timed("messages", stream.send)
        receive = clocks.timed("messages", stream.receive)
        for number, request in enumerate(work.requests):
            sampling = SamplingParams(
                max_tokens=request.answer_tokens, temperature=0.0, ignore_eos=True
            )
            engine.submit(SubmitJob(JobId(str(number)), Epoch(1), request.prompt, (), sampling))
        before = _native(model)
        begun, steps, unseen_s = time.perf_counter(), 0, 0.0
        while not engine.is_idle:
            receive(wait=False)
            send(engine.step())
            steps += 1
            paused = time.perf_counter()
            theirs.recv(1 << 20)
            unseen_s += time.perf_counter() - paused
        whole_s = time.perf_counter() - begun - unseen_s
    return _parts(clocks, before, _native(model), whole_s) | {
        "steps": steps,
        "tokens": work.answer_tokens,
    }


def _parts(
    clocks: Clocks, before: dict[str, float], after: dict[str, float], whole_s: float
) -> dict[str, float]:
    arithmetic = {part: after[part] - before[part] for part in after}
    around = clocks.seconds["forward"] - sum(arithmetic.values())
    named = {part: clocks.seconds[part] for part in ("pack", "sample", "plan", "messages")}
    rest = whole_s - clocks.seconds["forward"] - sum(named.values())
    return {**arithmetic, "around the call": around, **named, "rest": rest, "whole": whole_s}


def _native(model: EngineModel) -> dict[str, float]:
    assert model.native is not None
    return dict(model.native.seconds())


@contextmanager
def _clocks_on(clocks: Clocks, model: EngineModel) -> Iterator[None]:
    """The engine's calls and the model's forward pass, timed."""
    timed: Any = model
    timed.forward = clocks.timed("forward", type(model).forward.__get__(model))
    packing = mock.patch.object(engine_module, "pack_step", clocks.timed("pack", pack_step))
    reading = mock.patch.object(Rows, "__init__", clocks.timed("sample", Rows.__init__))
    choosing = mock.patch.object(Rows, "sample", clocks.timed("sample", Rows.sample))
    with packing, reading, choosing:
        yield


def _build(source: Path, converted: Path, threads: int, arithmetic: Arithmetic) -> EngineModel:
    manifest = parse_manifest((converted / "manifest.json").read_bytes())
    mappings = []
    for partition in manifest.partitions:
        memory = mmap.mmap(-1, partition.size_bytes)
        memory.write((converted / partition.file).read_bytes())
        mappings.append(memory)
    model = build_model(
        manifest,
        mappings,
        (source / "config.json").read_bytes(),
        ops=ops_for("cpu", threads),
        device=torch.device("cpu"),
        kv_blocks=blocks_for(KV_TOKENS),
    )
    run_canary(model, parse_canary((converted / CANARY_FILE).read_bytes()))
    model.use(arithmetic)
    return model


def main() -> None:
    """Print the profile of one batch."""
    directory, threads, arithmetic, batch, shortest, longest = sys.argv[1:]
    source, converted = Path(directory) / "source", Path(directory) / "converted"
    model = _build(source, converted, int(threads), Arithmetic(arithmetic))
    work = make_work(int(batch), VOCABULARY, int(shortest), int(longest))
    profile(model, work)  # the cache's memory is touched for the first time
    print(json.dumps(profile(model, work)))


if __name__ == "__main__":
    main()
