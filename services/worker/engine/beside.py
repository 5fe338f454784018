"""What is done for held jobs beside the steps, so that nobody's step is longer for it.

    held sequence --begin: chunk in flight, its blocks stay--> computed --collect--> advanced
                                                                        +-> dropped, if it left

One token of a long sequence makes a step of a small batch longer by half, as it attends to all that
is before it; beside the steps it costs those that decode what the machine's cores share. Blocks
whose keys and values come from elsewhere are touched there: else the first step that reads them
maps their pages, which takes a quarter of a step of four rows for 4,096 tokens.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Protocol

from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.packing import PackedStep, pack_step
from services.worker.engine.batching.sequence import Chunk, SequenceKey

CHUNK_TOKENS = 64
"""Most tokens of one pass: with more its products gain nothing, and who waits for its end waits
longer."""


class SidePass(Protocol):
    """A thread of its own that computes forward passes."""

    def begin(self, step: PackedStep) -> None:
        """Compute a step that wants no logits; return at once."""
        ...

    def wait(self, timeout_s: float) -> float | None:
        """Return the seconds of processor time that it took, None if it takes longer than that."""
        ...

    def touch(self, blocks: Many[int]) -> None:
        """Have the memory of these blocks be there and mapped; return at once."""
        ...

    def close(self) -> None:
        """End the thread."""
        ...


class Beside:
    """Owner of the chunk that is computed beside the steps; without a side pass there is none."""

    def __init__(self, batch: Batch, clock: Callable[[], float]) -> None:
        self._batch = batch
        self._clock = clock
        self._side_pass: SidePass | None = None
        self._chunk: Chunk | None = None
        self._begun_s = 0.0

    def use(self, side_pass: SidePass) -> None:
        """Compute with it from now on."""
        self._side_pass = side_pass
        self._batch.has_side_pass = True

    def close(self) -> None:
        """Compute nothing more beside the steps. Idempotent."""
        if self._side_pass is not None:
            self._side_pass.close()

    def touch(self, key: SequenceKey) -> None:
        """Have the memory of a sequence's blocks be mapped before a step reads them."""
        if self._side_pass is not None:
            self._side_pass.touch(tuple(self._batch.blocks.table(key)))

    @property
    def is_busy(self) -> bool:
        """Whether a chunk is in flight."""
        return self._chunk is not None

    def has(self, key: SequenceKey) -> bool:
        """Whether it is that sequence's, or was when it left."""
        return self._chunk is not None and self._chunk.sequence.key == key

    def collect(self, timeout_s: float = 0.0) -> tuple[Chunk, float] | None:
        """Take in the chunk in flight if it is computed, or will be within that time.

        Returns it with its seconds of processor time. Raises what the pass raised.
        """
        if self._chunk is None or self._side_pass is None:
            return None
        computed_s = self._side_pass.wait(timeout_s)
        if computed_s is None:
            return None
        chunk, self._chunk = self._chunk, None
        self._batch.held_share.note_beside(chunk.count, self._clock() - self._begun_s)
        self._batch.end_beside(chunk)
        return chunk, computed_s

    def begin(self, now_s: float) -> Chunk | None:
        """Begin with what the batch has for it; return that, None if there is nothing to begin."""
        if self._side_pass is None or self._chunk is not None:
            return None
        chunk = self._batch.plan_beside(CHUNK_TOKENS, now_s)
        if chunk is not None:
            self._side_pass.begin(pack_step([chunk], self._batch.blocks))
            self._chunk, self._begun_s = chunk, self._clock()
        return chunk
