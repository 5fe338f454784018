"""gearfall's engine as a worker runs it: forked by the zygote, fed and heard over its socket."""

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bench.engine.model import CANARY_FILE
from bench.engine.work import Request, Work
from gearfall.core.checkpoint.manifest import parse_manifest
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.job import TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine_link.messages import StartEngine, StopEngine, SubmitJob
from services.worker.processes.zygote_client import EngineProcess, Zygote

KV_TOKENS = 32 * 512 + 512
SLOTS = 32


class OurEngine:
    """One engine process and the works it answers."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._steps = aiter(process)
        self._works = 0

    async def run(self, work: Work) -> tuple[float, list[list[int]]]:
        """Answer all requests, at most `work.batch` at a time; return seconds and answers."""
        self._works += 1
        jobs = [self._job(request, number) for number, request in enumerate(work.requests)]
        seconds, runs = await self.answer(jobs, work.batch)
        return seconds, [[token for run in each for token in run.token_ids] for each in runs]

    async def answer(
        self, jobs: Sequence[SubmitJob], batch: int
    ) -> tuple[float, list[list[TokenRun]]]:
        """Answer all jobs, at most `batch` at a time; return seconds and each job's runs."""
        begun = time.perf_counter()
        runs: dict[JobId, list[TokenRun]] = {job.job_id: [] for job in jobs}
        waiting, running = deque(jobs), 0
        while waiting or running:
            while waiting and running < batch:
                self._process.send(waiting.popleft())
                running += 1
            for run in (await anext(self._steps)).runs:
                if run.error:
                    raise RuntimeError(run.error)
                runs[run.job_id].append(run)
                running -= run.finish is not None
        return time.perf_counter() - begun, list(runs.values())

    def _job(self, request: Request, number: int) -> SubmitJob:
        sampling = SamplingParams(
            max_tokens=request.answer_tokens, temperature=0.0, ignore_eos=True
        )
        # A tenant of its own: nobody finds the blocks of an earlier round.
        job_id = JobId(f"{self._works}-{number}")
        return SubmitJob(job_id, Epoch(1), request.prompt, (), sampling, tenant=job_id)


@asynccontextmanager
async def our_engine(
    source: Path, converted: Path, threads: int, arithmetic: Arithmetic
) -> AsyncIterator[OurEngine]:
    """Run an engine process over the converted model."""
    manifest_json = (converted / "manifest.json").read_bytes()
    descriptors: list[int] = []
    zygote = Zygote()
    await zygote.start()
    try:
        partitions = parse_manifest(manifest_json).partitions
        descriptors += [_in_memory(converted / partition.file) for partition in partitions]
        start = StartEngine(
            model="bench",
            manifest_json=manifest_json,
            config_json=(source / "config.json").read_bytes(),
            generation_config_json=b"",
            device="cpu",
            threads=threads,
            slots=SLOTS,
            kv_tokens=KV_TOKENS,
            canary_json=(converted / CANARY_FILE).read_bytes(),
            arithmetic=arithmetic,
        )
        process = await zygote.spawn(start, descriptors)
        ready = await process.ready()
        assert ready.arithmetic == arithmetic.value
        yield OurEngine(process)
        process.send(StopEngine())
        await process.wait_exit()
    finally:
        await zygote.stop()
        for descriptor in descriptors:
            os.close(descriptor)


def _in_memory(path: Path) -> int:
    """Return a descriptor of memory with a file's bytes, as the store's pool would give it."""
    descriptor = os.memfd_create(path.name)
    left = path.stat().st_size
    with path.open("rb") as file:
        while left:
            left -= os.sendfile(descriptor, file.fileno(), None, left)
    return descriptor
