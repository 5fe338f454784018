"""One job's tokens in an engine, and the part of them that a step computes. Pure."""

from dataclasses import dataclass, field
from enum import Enum

from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.feedback_levels import Standing, enter

SequenceKey = tuple[JobId, Epoch]

NO_DEADLINE_S = float("inf")


class Stance(Enum):
    """What a step may do with a sequence."""

    FREE = "free"
    """Compute and sample."""
    HELD = "held"
    """Compute all but its last token, sample nothing: another worker still owns the job."""
    HELD_BY_KV = "held by kv"
    """Nothing: the worker puts its keys and values into its blocks."""
    FROZEN = "frozen"
    """Nothing: the job is about to go elsewhere."""


@dataclass(slots=True)
class Sequence:
    """One job in this engine. Only `Batch` changes it.

        tokens:    prompt . . . . . . . . | answer . . . . . .
        computed:  ----------------------------------->|
        pending:                                       |------
        draft:                              - - - - - - - - - - - - - -
        guessed:                                              |- - - -

    The last token is pending until a step computes it and samples the next. With it a step may
    compute guessed ones: what it samples behind each of them shows whether the next is right.
    """

    job_id: JobId
    epoch: Epoch
    tokens: list[int]
    """Prompt, then answer."""
    prompt_tokens: int
    sampling: SamplingParams
    tenant: str = ""
    adapter: str = ""
    """LoRA adapter, empty for none."""
    priority: Priority = Priority.INTERACTIVE
    deadline_s: float = NO_DEADLINE_S
    """On the clock of the steps."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached_tokens: int | None = None
    """Prompt tokens whose keys and values were found there; None before it first got blocks."""
    stance: Stance = Stance.FREE
    whole_by_s: float = NO_DEADLINE_S
    """While it is held: when its tokens are to be computed, on the clock of the steps."""
    is_beside: bool = False
    """Whether tokens of it are computed beside the steps: none in them."""
    standing: Standing = field(
        default_factory=lambda: enter(0, is_batch=False, arrival=0, now_s=0.0), compare=False
    )
    draft: tuple[int, ...] = ()
    """A guess at the answer from its first token on, the answer so far included; empty as soon as
    the answer is another or goes further."""
    block_keys: list[bytes] = field(default_factory=list, compare=False)
    """Root key, then the key of each full block so far asked for; see `prefix_keys`."""

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

    @property
    def guessed(self) -> int:
        """Tokens of the draft that are not tokens of the answer yet."""
        return len(self.draft) - self.next_index if self.draft else 0

    @property
    def wanted(self) -> int:
        """Tokens that a step with endless room would compute, guessed ones apart."""
        if self.is_beside:
            return 0
        match self.stance:
            case Stance.FREE:
                return self.pending
            case Stance.HELD:
                return self.pending - 1
        return 0

    @property
    def is_held(self) -> bool:
        """Whether another worker still owns the job."""
        # Asked many times a step: a set would hash three names in Python.
        return self.stance is Stance.HELD or self.stance is Stance.HELD_BY_KV


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence and its guess, computed in one step.

    To be asked before anything is appended to the sequence.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the sequence's last token is among them, so that its logits are needed."""
        return self.rows > 0

    @property
    def rows(self) -> int:
        """How many of the last ones need logits: the sequence's last and all that are guessed."""
        return max(0, self.start + self.count - len(self.sequence.tokens) + 1)

    @property
    def guess(self) -> tuple[int, ...]:
        """Those that are guessed."""
        index = self.sequence.next_index
        return self.sequence.draft[index : index + max(0, self.rows - 1)]

    @property
    def token_ids(self) -> list[int]:
        """All of them."""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.guess]
