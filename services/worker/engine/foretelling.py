"""First tokens of jobs that wait for a model, computed in its first pass before anybody has them.

The pass that answers the canary reads every weight; so would the first pass of the job that had the
model started. Both in one cost one reading. What comes of it stays here until the job is submitted,
which a worker does only after the engine was ready. Until then the job is nobody's: another worker
may claim it, and the token is never asked for.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from services.worker.engine.batching.batch import Batch, Chunk
from services.worker.engine.batching.sequence import Sequence, SequenceKey
from services.worker.engine.model.sampler import Draw, Logits, Sampled, sample_rows
from services.worker.engine_link.messages import SubmitJob


class Foretelling:
    """Owner of the tokens that were computed ahead, one a job."""

    def __init__(self, batch: Batch, admit: Callable[[SubmitJob], Sequence | None]) -> None:
        """`admit` returns the sequence of a job, None for one of which nothing is to be computed.

        The batch is empty but for what is foretold from `begin` to `end`.
        """
        self._batch = batch
        self._admit = admit
        self._jobs: dict[SequenceKey, SubmitJob] = {}
        self._tokens: dict[SequenceKey, Sampled] = {}

    def begin(self, jobs: Many[SubmitJob]) -> list[Chunk]:
        """Return what one step computes of the jobs."""
        for job in jobs:
            key = (job.job_id, job.epoch)
            sequence = None if job.adapter or key in self._jobs else self._admit(job)
            if sequence is not None:
                self._jobs[key] = job
                self._batch.submit(sequence)
        return self._batch.plan_step()

    def end(self, chunks: Many[Chunk], logits: Logits) -> None:
        """Keep the tokens, and known blocks of keys and values; the batch is empty again.

        `logits`: one row for each chunk that samples.
        """
        for chunk in chunks:
            self._batch.commit(chunk)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        draws = [Draw(sequence.sampling, sequence.next_index) for sequence in sampling]
        for sequence, sampled in zip(sampling, sample_rows(logits, draws), strict=True):
            if sampled is not None:
                self._tokens[sequence.key] = sampled
        for key in self._jobs:
            self._batch.remove(key)

    def take(self, job: SubmitJob, sequence: Sequence) -> Sampled | None:
        """Return the token that follows what a submitted job has, if it is known; once."""
        foretold = self._jobs.pop(sequence.key, None)
        sampled = self._tokens.pop(sequence.key, None)
        if foretold != job:
            return None
        # Its own blocks, found again: nothing that another request had computed for it.
        sequence.cached_tokens = 0
        return sampled
