"""What a client asks the router for and what it gets back, the same for both doors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.certainty.escalation import Degraded
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import FinishReason, Priority
from gearfall.core.generation.sampling import MAX_TOP_LOGPROBS
from gearfall.core.generation.streaming import StreamMode, check_hold_tokens
from gearfall.core.generation.usage import StageReport, Usage

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_MESSAGES = 4096
MAX_TIMEOUT_S = 24 * 3600.0
_MAX_ID_CHARACTERS = 128
_MAX_ROLE_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text that the model continues; the tokenizer's special tokens are added."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, written out by the model's chat template."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One client request. Breaking a limit raises InvalidRequest that names the field."""

    model: str
    """A deployment or a registered model."""
    prompts: tuple[Prompt, ...]
    """Answered independently; choice `i` belongs to prompt `i // n`."""
    max_tokens: int | None = None
    """None: what the context leaves, at most 1024. More than the context leaves is cut to that."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    """None: drawn by the router and reported."""
    stop: tuple[str, ...] = ()
    n: int = 1
    """Choices for each prompt."""
    logprobs: bool = False
    top_logprobs: int = 0
    timeout_s: float = 0.0
    """0: the router's default."""
    priority: Priority = Priority.INTERACTIVE
    tenant: str = ""
    """A claim that `check_tenant` passed, behind the digest of its key where there are several."""
    ignore_eos: bool = False
    request_id: str = ""
    """Chosen by the client, or empty."""
    is_whole: bool = False
    """The client takes the answer whole: nothing is shown to it before the end."""
    stream_mode: StreamMode | None = None
    """None: as the deployment has it. It decides streamed and whole answers alike."""
    hold_tokens: int | None = None
    """None: as the deployment has it."""

    def __post_init__(self) -> None:
        _require(0 < len(self.prompts) <= MAX_PROMPTS, "prompt", f"1 to {MAX_PROMPTS} prompts")
        _require(1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}, not {self.n}")
        if self.max_tokens is not None:
            _require(1 <= self.max_tokens < 2**31, "max_tokens", "between 1 and 2^31 - 1")
        _require(
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 2.0,
            "temperature",
            f"between 0 and 2, not {self.temperature}",
        )
        _require(
            math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0,
            "top_p",
            f"above 0 and at most 1, not {self.top_p}",
        )
        _require(0 <= self.top_k < 2**31, "top_k", f"between 0 and 2^31 - 1, not {self.top_k}")
        _require(
            self.seed is None or 0 <= self.seed < 2**64,
            "seed",
            f"between 0 and 2^64 - 1, not {self.seed}",
        )
        _require(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            "top_logprobs",
            f"between 0 and {MAX_TOP_LOGPROBS}, not {self.top_logprobs}",
        )
        _require(
            math.isfinite(self.timeout_s) and 0.0 <= self.timeout_s <= MAX_TIMEOUT_S,
            "timeout_s",
            f"between 0 and {MAX_TIMEOUT_S:.0f}, not {self.timeout_s}",
        )
        if self.hold_tokens is not None:
            check_hold_tokens(self.hold_tokens)
        self._check_texts()

    def _check_texts(self) -> None:
        count = len(self.stop)
        _require(count <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        _require(
            all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop),
            "stop",
            f"strings of 1 to {MAX_STOP_CHARACTERS} characters",
        )
        _require(
            len(self.request_id) <= _MAX_ID_CHARACTERS
            and self.request_id.isascii()
            and (not self.request_id or self.request_id.isprintable()),
            "request_id",
            f"at most {_MAX_ID_CHARACTERS} printable ASCII characters",
        )
        for prompt in self.prompts:
            if isinstance(prompt, ChatPrompt):
                _check_messages(prompt.messages)

    @property
    def choices(self) -> int:
        """Answers of all prompts together."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class TokenText:
    """One chosen token with its log-probability and the most likely alternatives."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    text_offset: int
    """Characters of the answer before this token."""
    top: tuple["TokenText", ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """The choice waits for a model without a ready replica."""

    choice: int
    model: str
    expected_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of one choice; only a Replace takes it back."""

    choice: int
    text: str
    logprobs: tuple[TokenText, ...] = ()
    token_count: int = 0
    """Tokens of the job that this piece covers."""


@dataclass(frozen=True, slots=True)
class Replace:
    """Every delta of the choice so far is void; another stage's follow."""

    choice: int
    model: str
    """Whose text is void."""
    next_model: str
    """Whose text follows."""
    characters: int
    """That are void."""
    logprobs: int
    """Entries that are void."""


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """One choice is whole."""

    choice: int
    finish: FinishReason
    model: str
    """Model that answered."""
    stages: tuple[StageReport, ...]
    """In the order they ran."""
    usage: Usage
    degraded: Degraded | None = None
    """Why a less certain answer was given than the cascade would have given; None: it was not."""


GenerationEvent = Wait | Delta | Replace | ChoiceEnd


def check_tenant(claimed: str) -> str:
    """Return the tenant that a client says it is; raise InvalidRequest for too long a one."""
    most = _MAX_ID_CHARACTERS
    _require(len(claimed) <= most, "tenant", f"at most {most} characters")
    return claimed


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    count = len(messages)
    _require(0 < count <= MAX_MESSAGES, "messages", f"1 to {MAX_MESSAGES} messages")
    for position, message in enumerate(messages):
        length, param = len(message.role), f"messages[{position}].role"
        _require(
            0 < length <= _MAX_ROLE_CHARACTERS, param, f"1 to {_MAX_ROLE_CHARACTERS} characters"
        )


def _require(holds: bool, param: str, rule: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} must be {rule}", param=param)
