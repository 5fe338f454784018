"""Which sequences run and which tokens they compute in the next step. Pure.

    waiting --admit (slot and blocks free)--> running --finish/cancel--> gone
       ^                                        |
       +------- preempt (blocks ran out) -------+

A sequence's tokens are prompt and answer in one list; `computed` of them have their keys and
values in the cache. A step computes the next tokens of each running sequence: one while it decodes,
a chunk while it prefills (or recomputes after a preemption). The sequence whose last token is
computed in a step samples one more.
"""

from collections import deque
from dataclasses import dataclass, field

from gearfall.core.ids import Epoch, JobId
from gearfall.core.sampling import SamplingParams
from services.worker.kv_blocks import BLOCK_TOKENS, KvBlocks, blocks_for

SequenceKey = tuple[JobId, Epoch]


@dataclass(slots=True)
class Sequence:
    """One job in this engine. Only `Batch` and the engine loop change it."""

    job_id: JobId
    epoch: Epoch
    tokens: list[int]
    """Prompt, then answer."""
    prompt_tokens: int
    sampling: SamplingParams
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    arrival: int = field(default=0, compare=False)
    """Order of submission; the youngest gives way."""

    @property
    def key(self) -> SequenceKey:
        """What tells this sequence from all others."""
        return self.job_id, self.epoch

    @property
    def next_index(self) -> int:
        """Index of the next generated token; 0 is the first."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be sampled, at least 1."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of them is the sequence's last, so that its logits are needed."""
        return self.start + self.count == len(self.sequence.tokens)


class Batch:
    """Waiting and running sequences over one pool of KV blocks."""

    def __init__(self, blocks: KvBlocks, *, slots: int, step_tokens: int) -> None:
        """`step_tokens`: most tokens one step computes, so that a prompt delays nobody long."""
        assert slots >= 1
        assert step_tokens >= 1
        self.blocks = blocks
        self._slots = slots
        self._step_tokens = step_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by arrival, oldest first
        self._arrivals = 0

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit into the whole pool with one token more."""
        assert blocks_for(len(sequence.tokens)) <= self.blocks.total_blocks
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._waiting.append(sequence)

    def remove(self, key: SequenceKey) -> Sequence | None:
        """Forget a sequence, finished or cancelled; None when it isn't here."""
        for sequences in (self._running, self._waiting):
            for sequence in sequences:
                if sequence.key == key:
                    sequences.remove(sequence)
                    self.blocks.free(key)
                    return sequence
        return None

    def plan_step(self) -> list[Chunk]:
        """Admit what fits and return the next step's chunks, decodes first; blocks are set aside.

        Empty only when nothing runs and nothing waits.
        """
        self._secure_decodes()
        self._admit()
        room = self._step_tokens
        chunks = []
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            count = min(sequence.pending, room)
            if count > 0:
                chunks.append(Chunk(sequence, sequence.computed, count))
                room -= count
        return chunks

    def commit(self, chunk: Chunk) -> None:
        """Note that a planned chunk's keys and values are in the cache."""
        assert chunk.start == chunk.sequence.computed
        chunk.sequence.computed += chunk.count

    def check(self) -> None:
        """Assert the invariants between sequences and blocks."""
        self.blocks.check()
        assert len(self._running) <= self._slots
        arrivals = [sequence.arrival for sequence in self._running]
        assert arrivals == sorted(arrivals)
        for sequence in self._running:
            held = len(self.blocks.table(sequence.key))
            assert held >= blocks_for(sequence.computed)
            assert sequence.pending >= 1
        for sequence in self._waiting:
            assert sequence.computed == 0

    def _secure_decodes(self) -> None:
        """Extend running sequences to their tokens, oldest first; the youngest give way."""
        for sequence in tuple(self._running):
            while sequence in self._running and not self.blocks.extend(
                sequence.key, len(sequence.tokens)
            ):
                self._preempt(self._running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Give up a sequence's blocks; it is computed again when it is admitted again."""
        self._running.remove(sequence)
        self.blocks.free(sequence.key)
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _admit(self) -> None:
        """Admit in order of arrival while a slot, the tokens' blocks and one block more are free.

        The one block more keeps a sequence from being preempted right after its prefill. It is not
        asked of a sequence that would then never fit.
        """
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting[0]
            wanted = blocks_for(len(sequence.tokens) + BLOCK_TOKENS)
            if min(wanted, self.blocks.total_blocks) > self.blocks.free_blocks:
                return
            is_extended = self.blocks.extend(sequence.key, len(sequence.tokens))
            assert is_extended
            self._running.append(self._waiting.popleft())
