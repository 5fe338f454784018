"""Jobs to queue and short ways to queue them, for the tests of the JobQueue port."""

from collections.abc import Sequence
from dataclasses import replace

from gearfall.core.generation.job import Job, Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName, RequestId, RouterId
from gearfall.core.ports import JobQueue, QueuedJob

MODEL = ModelName("tiny")


def job(number: int, model: ModelName = MODEL) -> Job:
    return Job(
        job_id=JobId(f"job-{number}"),
        request_id=RequestId(f"request-{number}"),
        model=model,
        epoch=Epoch(3),
        router_id=RouterId("router-1"),
        router_address="127.0.0.1:1234",
        prompt_token_ids=(1, 2, number),
        generated_token_ids=(7,),
        sampling=SamplingParams(max_tokens=9, temperature=0.5, seed=2**64 - 1),
        deadline_unix_s=1.5e9,
        priority=Priority.BATCH,
        tenant="a",
        enqueued_unix_s=1.25e9,
    )


def chat(number: int) -> Job:
    return replace(job(number), priority=Priority.INTERACTIVE)


async def append(queue: JobQueue, count: int) -> list[str]:
    return [await queue.append(job(number)) for number in range(count)]


async def claim(
    queue: JobQueue, consumer: str, max_jobs: int = 100, block_s: float = 0.0
) -> Sequence[QueuedJob]:
    return await queue.claim(MODEL, consumer, max_jobs=max_jobs, block_s=block_s)


def ids(entries: Sequence[QueuedJob]) -> list[str]:
    return [entry.entry_id for entry in entries]
