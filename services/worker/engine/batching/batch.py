"""Which sequences run and which tokens they compute in the next step. Pure.

    waiting --admit (slot and blocks free, or taken from who comes later)--> running --> gone
       ^                                                                        |
       +------- preempt (blocks ran out, or who comes first takes its slot) ----+

A step computes the next tokens of each running sequence: one while it decodes, a chunk while it
prefills (or recomputes after a preemption). The sequence whose last token is computed in a step
samples one more; with a draft, also one behind each guessed token that is computed with it. Who
comes first is `feedback_levels`' to say.

Nobody is preempted for a guess, and blocks that it had are given back if it was wrong.

Held, pinned and frozen sequences are never preempted. What a running one computed stays known to
the blocks, so that a preempted sequence, or another with the same beginning, finds it again for as
long as nobody needs the room.
"""

from gearfall.core.generation.job import Priority
from services.worker.engine.batching.feedback_levels import charge, enter, lift_if_due
from services.worker.engine.batching.guesses import give_back, take_room
from services.worker.engine.batching.held_share import HeldShare
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks, blocks_for
from services.worker.engine.batching.prefix_keys import extend_keys, root_key
from services.worker.engine.batching.sequence import Chunk, Sequence, SequenceKey, Stance
from services.worker.engine.batching.step_shares import share_out

__all__ = ["Batch", "Chunk", "Sequence", "SequenceKey"]


class Batch:
    """Waiting and running sequences over one pool of KV blocks."""

    def __init__(
        self, blocks: KvBlocks, *, slots: int, step_tokens: int, guess_tokens: int | None = None
    ) -> None:
        """`step_tokens`: most tokens one step computes, so that a prompt delays nobody long.

        With fewer of them than slots, those that come first decode first.

        `guess_tokens`: most tokens of drafts among them, each of which needs a row of logits; None:
        as many as there are.
        """
        assert slots >= 1
        assert step_tokens >= 1
        self.blocks = blocks
        self._slots = slots
        self._step_tokens = step_tokens
        self._guess_tokens = step_tokens if guess_tokens is None else guess_tokens
        self._waiting: dict[SequenceKey, Sequence] = {}
        self._running: dict[SequenceKey, Sequence] = {}
        self._arrivals = 0
        self._now_s = 0.0
        self.held_share = HeldShare()
        self.has_side_pass = False
        """Whether held sequences can be computed beside the steps."""
        self._beside: SequenceKey | None = None
        """Whose blocks are written to beside the steps, here or ended."""

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have none, and no blocks."""
        return len(self._waiting)

    def find(self, key: SequenceKey) -> Sequence | None:
        """Return a sequence, running or waiting; None when it isn't here."""
        return self._running.get(key) or self._waiting.get(key)

    def has_adapter(self, adapter: str) -> bool:
        """Whether a sequence here runs with a LoRA adapter."""
        everyone = (*self._running.values(), *self._waiting.values())
        return any(sequence.adapter == adapter for sequence in everyone)

    def is_running(self, key: SequenceKey) -> bool:
        """Whether a sequence has a slot."""
        return key in self._running

    def submit(self, sequence: Sequence, now_s: float = 0.0) -> None:
        """Queue a sequence. It must fit into the whole pool with one token more."""
        assert blocks_for(len(sequence.tokens)) <= self.blocks.total_blocks
        assert self.find(sequence.key) is None
        self._enlist(sequence, now_s)
        self._waiting[sequence.key] = sequence

    def hold(self, sequence: Sequence, *, reserve_tokens: int, now_s: float) -> str:
        """Give a held sequence a slot and its blocks; return why not, empty when it has them."""
        assert sequence.is_held
        assert self.find(sequence.key) is None
        self._admit()
        if len(self._running) >= self._slots or self._waiting_in_order():
            return "all slots are taken"
        self._enlist(sequence, now_s)
        self._adopt(sequence)
        wanted = blocks_for(len(sequence.tokens) + reserve_tokens)
        if wanted > self.blocks.total_blocks or not self.blocks.extend(
            sequence.key, wanted * BLOCK_TOKENS
        ):
            self.blocks.free(sequence.key)
            return f"its {wanted} blocks of KV cache are not free"
        self._note_cached(sequence)
        self._running[sequence.key] = sequence
        return ""

    def feed(self, sequence: Sequence, token_ids: tuple[int, ...]) -> bool:
        """Append tokens to a held sequence; False, and nothing done, when there is no room."""
        assert sequence.is_held
        if not self._secure(sequence, len(sequence.tokens) + len(token_ids)):
            return False
        for token_id in token_ids:
            _extend(sequence, token_id)
        return True

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Note that keys and values of the first `computed` tokens are in the sequence's blocks."""
        assert sequence.computed <= computed <= len(sequence.tokens)
        known, full = sequence.computed // BLOCK_TOKENS, computed // BLOCK_TOKENS
        sequence.computed = computed
        if full > known:
            extend_keys(sequence.block_keys, sequence.tokens, full)
            for place in range(known, full):
                self.blocks.learn(sequence.key, place, sequence.block_keys[place + 1])

    def change_stance(self, sequence: Sequence, stance: Stance) -> None:
        """Freeze, thaw or release a sequence; it keeps the slot and the blocks that it has."""
        assert stance in {Stance.FREE, Stance.FROZEN}
        sequence.stance = stance
        sequence.standing.progress_s = self._now_s

    def remove(self, key: SequenceKey) -> Sequence | None:
        """Forget a sequence, finished or cancelled; None when it isn't here."""
        sequence = self._running.pop(key, None) or self._waiting.pop(key, None)
        if sequence is not None:
            self.blocks.leave(key)
        return sequence

    def expire(self, now_s: float) -> list[Sequence]:
        """Remove and return the sequences whose deadline has passed; held ones have none here."""
        self._now_s = now_s
        late = [
            sequence
            for sequence in (*self._running.values(), *self._waiting.values())
            if sequence.deadline_s <= now_s and not sequence.is_held
        ]
        for sequence in late:
            self.remove(sequence.key)
        return late

    def cancel(self, key: SequenceKey) -> None:
        """Forget a sequence with its blocks, pinned or not, ended or not. Idempotent.

        Blocks that are written to beside the steps are let go of when that has ended.
        """
        self.remove(key)
        if key != self._beside:
            self.blocks.unpin(key)

    def plan_step(self, now_s: float = 0.0) -> list[Chunk]:
        """Admit what fits and return the next step's chunks, decodes first; blocks are set aside.

        Empty only when nothing can run before something is submitted, fed, thawed or unpinned.
        """
        self._now_s = now_s
        for sequence in self._in_order(self._running):
            if sequence.wanted and self.is_running(sequence.key):
                self._secure(sequence, len(sequence.tokens))
        self._admit()
        return self._share_out()

    def plan_beside(self, tokens: int, now_s: float) -> Chunk | None:
        """Return at most so many tokens of a held sequence to compute beside the steps, in time.

        Until `end_beside` no step computes any of that sequence, and its blocks stay. None when
        there is nothing to compute so, or nobody decodes who would wait for it in a step.
        """
        self._now_s = now_s
        able = [each for each in self._running.values() if self._is_for_beside(each)]
        able = [each for each in able if self._computable(each) > 0]
        if not able or not self._has_neighbours():
            return None
        sequence = min(able, key=lambda each: (each.whole_by_s, each.standing.arrival))
        tokens = self.held_share.fit_pass(tokens, sequence.whole_by_s - now_s)
        chunk = Chunk(sequence, sequence.computed, min(tokens, self._computable(sequence)))
        sequence.is_beside = True
        self._beside = sequence.key
        self.blocks.pin(sequence.key)
        return chunk

    def end_beside(self, chunk: Chunk) -> None:
        """Note that the chunk's keys and values are in the cache, if the sequence is still here."""
        sequence = chunk.sequence
        sequence.is_beside = False
        self._beside = None
        if self.find(sequence.key) is sequence:
            self.commit(chunk)
        self.blocks.unpin(sequence.key)

    def commit(self, chunk: Chunk) -> None:
        """Note that a planned chunk's keys and values are in the cache, guessed ones apart."""
        assert chunk.start == chunk.sequence.computed
        end = min(chunk.start + chunk.count, len(chunk.sequence.tokens))
        self.advance(chunk.sequence, end)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Append a sampled token."""
        _extend(sequence, token_id)
        charge(sequence.standing, self._now_s)

    def accept(self, sequence: Sequence) -> None:
        """Note that all tokens but the last were computed, those behind them guessed wrong."""
        self.advance(sequence, len(sequence.tokens) - 1)
        self.blocks.shrink(sequence.key, len(sequence.tokens))

    def check(self) -> None:
        """Assert the invariants between sequences and blocks."""
        self.blocks.check()
        assert len(self._running) <= self._slots
        assert not self._running.keys() & self._waiting.keys()
        for key, sequence in self._running.items():
            assert key == sequence.key
            assert len(self.blocks.table(key)) >= blocks_for(sequence.computed)
            assert sequence.pending >= 1
            assert not sequence.draft or sequence.guessed > 0
            answer = tuple(sequence.tokens[sequence.prompt_tokens :])
            assert not sequence.draft or sequence.draft[: len(answer)] == answer
        for key, sequence in self._waiting.items():
            assert key == sequence.key
            assert sequence.computed == 0
            assert not self.blocks.table(key)
            assert not sequence.is_held

    def _enlist(self, sequence: Sequence, now_s: float) -> None:
        """Give a new sequence its place among the others and its first key.

        Blocks are let go of that are left of a job with the same name.
        """
        self.blocks.unpin(sequence.key)
        self._arrivals += 1
        sequence.standing = enter(
            len(sequence.tokens) + sequence.guessed,
            is_batch=sequence.priority is Priority.BATCH,
            arrival=self._arrivals,
            now_s=now_s,
        )
        sequence.block_keys = [root_key(sequence.tenant, sequence.adapter)]

    def _in_order(self, sequences: dict[SequenceKey, Sequence]) -> list[Sequence]:
        return sorted(sequences.values(), key=lambda sequence: sequence.standing.order)

    def _waiting_in_order(self) -> list[Sequence]:
        """Those that wait for room, not for a thaw."""
        return [s for s in self._in_order(self._waiting) if s.stance is not Stance.FROZEN]

    def _is_preemptable(self, sequence: Sequence) -> bool:
        return sequence.stance is Stance.FREE and not self.blocks.is_pinned(sequence.key)

    def _preempt(self, sequence: Sequence) -> None:
        """Give up a sequence's slot and blocks; what it computed is looked for when it is back."""
        del self._running[sequence.key]
        self.blocks.free(sequence.key)
        sequence.computed = 0
        self._waiting[sequence.key] = sequence

    def _secure(self, sequence: Sequence, tokens: int) -> bool:
        """Extend a running sequence to `tokens`; those that come later give way, it last of all.

        False when it could not be: it was preempted itself, or stays and computes what it can.
        """
        if tokens <= len(self.blocks.table(sequence.key)) * BLOCK_TOKENS:
            return True
        while not self.blocks.extend(sequence.key, tokens):
            last = max(
                filter(self._is_preemptable, self._running.values()),
                key=lambda other: other.standing.order,
                default=None,
            )
            if last is None or last.standing.order < sequence.standing.order:
                return False
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _admit(self) -> None:
        """Admit in order while there is room; who comes first is never passed by another."""
        for sequence in self._waiting.values():
            lift_if_due(sequence.standing, self._now_s)
        for sequence in self._waiting_in_order():
            if not self._make_room(sequence):
                return
            self._running[sequence.key] = self._waiting.pop(sequence.key)

    def _make_room(self, sequence: Sequence) -> bool:
        """Set blocks aside for a waiting sequence, preempting those whom it outranks if it must.

        One block more than it needs, its guess included, keeps it from being preempted right after
        its prefill. That is not asked for a sequence that would then never fit.
        """
        self._adopt(sequence)
        hoped = len(sequence.tokens) + sequence.guessed + BLOCK_TOKENS
        wanted = min(blocks_for(hoped), self.blocks.total_blocks)
        missing = wanted - len(self.blocks.table(sequence.key))
        victims = self._find_victims(sequence, missing)
        if victims is None:
            self.blocks.free(sequence.key)
            sequence.computed = 0
            return False
        for victim in victims:
            self._preempt(victim)
        is_extended = self.blocks.extend(sequence.key, len(sequence.tokens))
        assert is_extended
        self._note_cached(sequence)
        return True

    def _find_victims(self, sequence: Sequence, blocks: int) -> list[Sequence] | None:
        """Return whom to preempt for a slot and so many blocks, None if that is not enough."""
        free_slots = self._slots - len(self._running)
        free_blocks = self.blocks.free_blocks
        victims: list[Sequence] = []
        outranked = (
            other
            for other in reversed(self._in_order(self._running))
            if self._is_preemptable(other) and sequence.standing.rank < other.standing.rank
        )
        while free_slots + len(victims) < 1 or free_blocks < blocks:
            victim = next(outranked, None)
            if victim is None:
                return None
            victims.append(victim)
            freed = self.blocks.count_freed(victim.key for victim in victims)
            free_blocks = self.blocks.free_blocks + freed
        return victims

    def _share_out(self) -> list[Chunk]:
        running, guess_tokens = [], self._guess_tokens
        for sequence in self._in_order(self._running):
            guess = take_room(self.blocks, sequence, guess_tokens, self._step_tokens)
            guess_tokens -= guess
            running.append((sequence, self._computable(sequence) + guess))
        if self._has_neighbours():
            running = [(one, 0 if self._is_for_beside(one) else count) for one, count in running]
        held_tokens = self.held_share.find(running, self._now_s)
        chunks = share_out(running, self._step_tokens, held_tokens)
        give_back(self.blocks, running, chunks)
        return chunks

    def _has_neighbours(self) -> bool:
        """Whether anybody computes here for whom a held sequence would make steps longer."""
        return any(each.wanted > 0 and not each.is_held for each in self._running.values())

    def _is_for_beside(self, sequence: Sequence) -> bool:
        """Whether a sequence is computed beside the steps while others are computed in them."""
        if not self.has_side_pass or sequence.stance is not Stance.HELD or sequence.adapter:
            return False
        return self.held_share.can_wait(sequence.wanted, sequence.whole_by_s - self._now_s)

    def _computable(self, sequence: Sequence) -> int:
        """Tokens of a running sequence that could be computed now, given its blocks."""
        room = len(self.blocks.table(sequence.key)) * BLOCK_TOKENS - sequence.computed
        return min(sequence.wanted, room)

    def _adopt(self, sequence: Sequence) -> None:
        """Take over the known blocks of a sequence's beginning, its last token left to compute."""
        full = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        extend_keys(sequence.block_keys, sequence.tokens, full)
        found = self.blocks.adopt(sequence.key, sequence.block_keys[1 : full + 1])
        sequence.computed = found * BLOCK_TOKENS

    def _note_cached(self, sequence: Sequence) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)


def _extend(sequence: Sequence, token_id: int) -> None:
    """Append a token, which may show that the draft is wrong, or be behind its end."""
    index = sequence.next_index
    sequence.tokens.append(token_id)
    draft = sequence.draft
    if draft and (draft[index] != token_id or index + 1 == len(draft)):
        sequence.draft = ()
