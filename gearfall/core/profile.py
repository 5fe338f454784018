"""A profile: how fast models compute and how well they answer, as `gearfall profile` writes it.

One JSON document; docs/cascades.md describes it for other programs that write such files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import msgspec

from gearfall.core.certainty.agreement import parse_rule
from gearfall.core.certainty.self_consistency import DEFAULT_TEMPERATURE, check_temperature
from gearfall.core.errors import InvalidRequest

FORMAT_VERSION = 1
MAX_PROFILE_BYTES = 1 << 30
MAX_TOKENS = 10**8
"""Of a prompt or an answer."""
LOGPROBS = (-10_000.0, 0.001)
"""What a log-probability may be; rounding brings that of a sure token a little above 0."""
MARGINS = (-500.0, 10_000.0)
"""What a margin may be; below 0 where the token was not the most likely."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How a replica computes. A decode step with n jobs takes step_s + (n - 1) step_s_per_job."""

    prefill_s_per_token: float
    step_s: float
    step_s_per_job: float
    steps: tuple[tuple[int, float], ...] = ()
    """(jobs at once, seconds a step) as measured."""
    job_s: float = 0.0
    """That the worker computes for a job beside its tokens."""
    request_s: float = 0.0
    """Of a job's way to its first step and back while nobody computes."""
    wake_s: float = 0.0
    """More of it, each way, while the worker computes."""
    tell_s: float = 0.0
    """Of a step, what telling its tokens takes; nothing while they may wait to be told together."""


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """An answer that was drawn at random beside the usual one."""

    answer_key: str
    """As that of `Generation`."""
    quality: float
    cost: float
    output_tokens: int
    probability: float
    """Of the answer by its model, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One model's answer to one query."""

    quality: float
    """In [0, 1]: 1 right, 0 wrong."""
    cost: float
    prompt_tokens: int
    output_tokens: int
    logprobs: tuple[float, ...] = ()
    """Of each token, nats."""
    margins: tuple[float, ...] = ()
    """log p(token) - log p(second most likely) of each token."""
    certainty: float | None = None
    """Where only this is known, without log-probabilities: an imported profile."""
    latency_s: float = 0.0
    answer_key: str = ""
    """`agreement.answer_key` of the text by the profile's rule; empty where the text is unknown."""
    token_ids: tuple[int, ...] = ()
    """Of the text; what ended the answer is not among them. Empty where they are unknown."""
    drawn: tuple[DrawnAnswer, ...] = ()
    """For self-consistency, in the order of their seeds; empty where none were drawn."""


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """One model; `generations` has one entry a query, in the queries' order."""

    name: str
    digest: str = ""
    """Of the checkpoint; empty for an imported profile."""
    memory_bytes: int = 0
    """Of one replica: weights, keys and values, process."""
    slots: int = 0
    speeds: dict[str, Speed] = field(default_factory=dict)
    """By device kind."""
    start_s: dict[str, float] = field(default_factory=dict)
    """By the tier that the bytes were in."""
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """All models over the same queries."""

    made_unix_s: float
    cost_unit: str
    queries: tuple[str, ...]
    """Names of the queries."""
    models: tuple[ProfiledModel, ...]
    format_version: int = FORMAT_VERSION
    agreement_rule: str = "exact"
    """By which `answer_key`s were made."""
    drawn_temperature: float = DEFAULT_TEMPERATURE
    """Of all drawn answers."""

    def model(self, name: str) -> ProfiledModel:
        """Return one model. Raises InvalidRequest naming those that are there."""
        for each in self.models:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.models)
        raise InvalidRequest(f"model {name} is not in the profile; it has {known}", param="model")


def parse_profile(text: str | bytes) -> Profile:
    """Return the profile that a file holds. Raises InvalidRequest saying what to change."""
    if len(text) > MAX_PROFILE_BYTES:
        raise InvalidRequest(f"a profile has at most {MAX_PROFILE_BYTES} bytes", param="profile")
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no profile: {error}", param="profile") from error
    check_profile(profile)
    return profile


def profile_text(profile: Profile) -> bytes:
    """Return the profile as the file that `parse_profile` reads."""
    return msgspec.json.encode(profile)


def check_profile(profile: Profile) -> None:
    """Raise InvalidRequest for a profile that nothing could be planned from."""
    if profile.format_version != FORMAT_VERSION:
        raise _broken("format_version", f"{profile.format_version}; this reads {FORMAT_VERSION}")
    if not profile.models:
        raise _broken("models", "there is none")
    parse_rule(profile.agreement_rule, param="profile.agreement_rule")
    check_temperature(profile.drawn_temperature, "profile.drawn_temperature")
    _check_unique("queries", profile.queries)
    _check_unique("models", [each.name for each in profile.models])
    for model in profile.models:
        where = f"models.{model.name}"
        if len(model.generations) != len(profile.queries):
            raise _broken(
                f"{where}.generations",
                f"{len(model.generations)} for {len(profile.queries)} queries; each query needs an "
                "answer of every model",
            )
        for name, speed in model.speeds.items():
            for at in (each.name for each in fields(speed) if each.name != "steps"):
                _check_number(f"{where}.speeds.{name}.{at}", getattr(speed, at))
            _check_steps(f"{where}.speeds.{name}", speed)
        for tier, seconds in model.start_s.items():
            _check_number(f"{where}.start_s.{tier}", seconds)
        for query, generation in zip(profile.queries, model.generations, strict=True):
            _check_generation(f"{where}, query {query}", generation)


def _check_steps(where: str, speed: Speed) -> None:
    if speed.step_s <= 0:
        raise _broken(f"{where}.step_s", "must be above 0")
    steps = speed.steps
    for at, (jobs, seconds) in enumerate(steps):
        _check_number(f"{where}.steps.{at}", seconds)
        if seconds <= 0 or jobs <= max((before for before, _ in steps[:at]), default=0):
            raise _broken(f"{where}.steps", f"{list(steps)}; rising jobs, each time above 0")
    if speed.tell_s >= min((seconds for _, seconds in steps), default=speed.step_s):
        raise _broken(f"{where}.tell_s", "must be below every step's time")


def _check_generation(where: str, each: Generation) -> None:
    _check_number(f"{where}: quality", each.quality, most=1.0)
    _check_number(f"{where}: cost", each.cost)
    _check_number(f"{where}: latency_s", each.latency_s)
    if each.cost <= 0:
        raise _broken(f"{where}: cost", f"{each.cost:g}; it must be above 0")
    if each.prompt_tokens < 0 or each.output_tokens < 0:
        raise _broken(f"{where}: tokens", "must not be negative")
    if max(each.prompt_tokens, each.output_tokens) > MAX_TOKENS:
        raise _broken(f"{where}: tokens", f"must be at most {MAX_TOKENS}")
    if len(each.logprobs) != len(each.margins):
        raise _broken(where, f"{len(each.logprobs)} logprobs and {len(each.margins)} margins")
    _check_range(f"{where}: logprobs", each.logprobs, *LOGPROBS)
    _check_range(f"{where}: margins", each.margins, *MARGINS)
    for number, drawn in enumerate(each.drawn):
        _check_drawn(f"{where}: drawn[{number}]", drawn)
    if each.certainty is not None:
        _check_number(f"{where}: certainty", each.certainty, most=1.0)
        if each.logprobs:
            raise _broken(where, "both logprobs and a certainty: leave one of them out")
    elif not each.logprobs and each.output_tokens:
        raise _broken(where, "neither logprobs nor a certainty: one of them is needed")


def _check_drawn(where: str, each: DrawnAnswer) -> None:
    if not each.answer_key:
        raise _broken(f"{where}.answer_key", "empty; nothing can be compared with it")
    _check_number(f"{where}.quality", each.quality, most=1.0)
    _check_number(f"{where}.cost", each.cost)
    _check_number(f"{where}.probability", each.probability, most=1.0)
    if not 0 <= each.output_tokens <= MAX_TOKENS:
        raise _broken(f"{where}.output_tokens", f"must be in 0 to {MAX_TOKENS}")


def _check_unique(where: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _broken(where, f"{twice} is there twice")


def _check_number(where: str, value: float, most: float = math.inf) -> None:
    if not math.isfinite(value) or not 0.0 <= value <= most:
        allowed = f"in 0 to {most:g}" if most < math.inf else "finite and not negative"
        raise _broken(where, f"{value}; it must be {allowed}")


def _check_range(where: str, values: Sequence[float], least: float, most: float) -> None:
    for value in values:
        if not least <= value <= most:
            raise _broken(where, f"{value:g}; each must be in {least:g} to {most:g}")


def _broken(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"profile, {where}: {what}", param="profile")
