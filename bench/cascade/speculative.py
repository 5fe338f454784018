"""What a draft is worth to the model above: `python -m bench.cascade speculative`.

Answers of the real engine, in a process of its own, without a draft and with it, in rounds that mix
all kinds of drafts. Two works:

- long answers of random models, with drafts of which a chosen share is right, from the front;
- the demo family's questions that its smallest model is not certain of, answered by its largest
  with the smallest one's answers as drafts: whole, and as far as they are when nothing can make
  them certain any more.

Every answer is compared with the one without a draft, token for token.
"""

import argparse
import asyncio
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.cascade.draft_work import Timed, Worth, break_even, draft_with_prefix, worth_of
from bench.engine.model import LLAMA_135M, LLAMA_360M, VOCABULARY, convert_model, write_model
from bench.engine.ours import OurEngine, our_engine
from bench.measuring.machine import machine_facts, our_versions
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.job import TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from gearfall.demo.answering import MAX_ANSWER_TOKENS
from gearfall.demo.catalogue import MODELS, checkpoint_path, demo_questions, deployment_path
from gearfall.demo.tokenizer import BOS_ID, EOS_ID
from gearfall.demo.tokenizer import VOCABULARY as LETTERS
from services.worker.engine_link.messages import SubmitJob

BUILD = Path(__file__).parents[2] / "build"
RESULTS = Path(__file__).parents[1] / "results" / "cascade_speculative.json"
TARGET = 1.3
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
MOSTLY_RIGHT = "90% right"
WIDTH = 120
"""Of the table, so that no column is cut where the output is not a terminal."""
PROMPT_TOKENS = 96
SHAPES = {"135M": LLAMA_135M, "360M": LLAMA_360M}
_NUMBERS = count()

Drafts = Mapping[str, Sequence[tuple[int, ...]]]
"""By kind: one for each question."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Questions that are put to a model again and again."""

    model: str
    batch: int
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON. 1 when an answer with a draft was another."""
    parser = argparse.ArgumentParser(prog="bench.cascade speculative", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=192, help="of a long answer")
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--questions", type=int, default=600, help="to the demo family")
    parser.add_argument("--arithmetic", choices=[a.value for a in Arithmetic], default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    worths = asyncio.run(_measure(flags))
    table, evens = _table(worths), _break_evens(worths)
    Console(width=WIDTH).print(table, *_words(worths, evens), sep="\n", highlight=False)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(flags).items() if name != "out"},
        "worths": [asdict(each) for each in worths],
        "break_even": {f"{model}, batch {batch}": at for (model, batch), at in evens.items()},
    }
    flags.out.parent.mkdir(exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=1))
    return 1 if any(each.differing_rounds for each in worths) else 0


async def _measure(flags: argparse.Namespace) -> list[Worth]:
    arithmetic, worths = Arithmetic(flags.arithmetic), []
    for name in flags.models:
        source, converted = write_model(BUILD / "engine" / f"llama-{name.lower()}", SHAPES[name])
        async with our_engine(source, converted, flags.threads, arithmetic) as engine:
            for batch in flags.batches:
                worths += await _long_answers(engine, name, batch, flags)
    if flags.questions:
        worths += await _escalated(arithmetic, flags)
    return worths


async def _long_answers(
    engine: OurEngine, name: str, batch: int, flags: argparse.Namespace
) -> list[Worth]:
    drawn = random.Random(f"{name} {batch}")
    prompts = tuple(
        tuple(drawn.randrange(3, VOCABULARY) for _ in range(PROMPT_TOKENS)) for _ in range(batch)
    )
    sampling = SamplingParams(max_tokens=flags.tokens, temperature=0.0, ignore_eos=True)
    ask = Ask(name, batch, prompts, sampling)
    _, answers = await _answer(engine, ask, [()] * batch)
    kinds = {
        f"{share:.0%} right": [
            draft_with_prefix(_tokens(runs), share, VOCABULARY) for runs in answers
        ]
        for share in SHARES
    }
    return await _compare(engine, ask, kinds, flags.rounds)


async def _escalated(arithmetic: Arithmetic, flags: argparse.Namespace) -> list[Worth]:
    """The demo's: what the smallest model rejects goes to the largest."""
    drawn = demo_questions(flags.questions)
    prompts = tuple((BOS_ID, *(LETTERS[each] for each in asked.prompt)) for asked in drawn)
    sampling = SamplingParams(
        max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop_token_ids=(EOS_ID,)
    )
    threshold = json.loads(deployment_path().read_text())["stages"][0]["threshold"]
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small, large = [
            await stack.enter_async_context(_demo_engine(model, scratch, arithmetic, flags.threads))
            for model in (MODELS[0], MODELS[-1])
        ]
        _, answers = await _answer(
            small, Ask(MODELS[0], 32, prompts, sampling), [()] * len(prompts)
        )
        rejected = [
            (prompt, runs)
            for prompt, runs in zip(prompts, answers, strict=True)
            if math.exp(math.fsum(_logprobs(runs))) < threshold
        ]
        kinds = {
            "the whole draft": [_tokens(runs) for _, runs in rejected],
            "the draft, stopped early": [_stopped(runs, threshold) for _, runs in rejected],
        }
        worths = []
        for batch in flags.batches:
            asked = tuple(prompt for prompt, _ in rejected)
            ask = Ask(f"{MODELS[-1]}, {len(asked)} questions", batch, asked, sampling)
            worths += await _compare(large, ask, kinds, flags.rounds)
    return worths


def _demo_engine(
    model: str, scratch: Path, arithmetic: Arithmetic, threads: int
) -> AbstractAsyncContextManager[OurEngine]:
    source, converted = checkpoint_path(model), scratch / model / "converted"
    convert_model(source, converted)
    return our_engine(source, converted, threads, arithmetic)


async def _compare(engine: OurEngine, ask: Ask, kinds: Drafts, rounds: int) -> list[Worth]:
    """Time each kind of drafts in every round, beside the same questions without."""
    nothing: list[tuple[int, ...]] = [()] * len(ask.prompts)
    await _answer(engine, ask, nothing)
    found: dict[str, list[Timed]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        order = [*kinds][number % len(kinds) :] + [*kinds][: number % len(kinds)]
        plain = [await _answer(engine, ask, nothing)]
        timed = {}
        for at, kind in enumerate(order):
            timed[kind] = await _answer(engine, ask, kinds[kind])
            if at == len(order) // 2:
                plain.append(await _answer(engine, ask, nothing))
        plain_seconds = median(seconds for seconds, _ in plain)
        for kind, (seconds, runs) in timed.items():
            found[kind].append(_timed(seconds, plain_seconds, runs, plain[0][1]))
    return [worth_of(ask.model, ask.batch, kind, timed) for kind, timed in found.items()]


def _timed(
    seconds: float,
    plain_seconds: float,
    answers: Sequence[Sequence[TokenRun]],
    plain: Sequence[Sequence[TokenRun]],
) -> Timed:
    everything = [run for runs in answers for run in runs]
    return Timed(
        seconds,
        plain_seconds,
        sum(len(run.token_ids) for run in everything),
        sum(run.draft_tokens for run in everything),
        sum(run.accepted_draft_tokens for run in everything),
        [_tokens(runs) for runs in answers] == [_tokens(runs) for runs in plain],
    )


async def _answer(
    engine: OurEngine, ask: Ask, drafts: Sequence[tuple[int, ...]]
) -> tuple[float, list[list[TokenRun]]]:
    jobs = []
    for prompt, draft in zip(ask.prompts, drafts, strict=True):
        # A tenant of its own: nobody finds the blocks of an earlier round.
        job_id = JobId(str(next(_NUMBERS)))
        job = SubmitJob(job_id, Epoch(1), prompt, (), ask.sampling, tenant=job_id)
        jobs.append(job if not draft else _with_draft(job, draft))
    return await engine.answer(jobs, ask.batch)


def _with_draft(job: SubmitJob, draft: tuple[int, ...]) -> SubmitJob:
    return SubmitJob(
        job.job_id,
        job.epoch,
        job.prompt_token_ids,
        (),
        job.sampling,
        tenant=job.tenant,
        draft_token_ids=draft,
    )


def _tokens(runs: Sequence[TokenRun]) -> tuple[int, ...]:
    return tuple(token for run in runs for token in run.token_ids)


def _logprobs(runs: Sequence[TokenRun]) -> list[float]:
    return [logprob for run in runs for logprob in run.logprobs]


def _stopped(runs: Sequence[TokenRun], threshold: float) -> tuple[int, ...]:
    """Return the tokens up to the one with which the answer's probability is too low for good."""
    tokens, logprobs = _tokens(runs), _logprobs(runs)
    for end in range(1, len(tokens)):
        if math.exp(math.fsum(logprobs[:end])) < threshold:
            return tokens[:end]
    return tokens


def _break_evens(worths: Sequence[Worth]) -> dict[tuple[str, int], float | None]:
    places = {(each.model, each.batch): None for each in worths if each.model in SHAPES}
    return {
        place: break_even([each for each in worths if (each.model, each.batch) == place])
        for place in places
    }


def _words(worths: Sequence[Worth], evens: Mapping[tuple[str, int], float | None]) -> list[str]:
    words = [
        f"{model}, batch {batch}: a draft saves time from "
        + ("no share" if at is None else f"{at:.1%}")
        + " of the answer on"
        for (model, batch), at in evens.items()
    ]
    mostly = [each for each in worths if each.model in SHAPES and each.drafts == MOSTLY_RIGHT]
    for each in mostly:
        said = "met" if each.ratio.median >= TARGET else "missed"
        words.append(f"{each.model}, batch {each.batch}, {MOSTLY_RIGHT}: >= {TARGET} times {said}")
    differing = sum(each.differing_rounds for each in worths)
    return [*words, f"{differing} rounds with another answer than without a draft"]


def _table(worths: Sequence[Worth]) -> Table:
    table = Table(title="Time without a draft over time with it, round by round")
    for name in ("model", "batch", "drafts", "ratio", "range", "steps saved", "accepted"):
        table.add_column(name, no_wrap=True)
    for each in worths:
        table.add_row(
            each.model,
            str(each.batch),
            each.drafts,
            f"{each.ratio.median:.2f}",
            f"{each.ratio.low:.2f} to {each.ratio.high:.2f}",
            f"{each.accepted_share:.0%}",
            f"{each.accepted_tokens} of {each.draft_tokens}",
        )
    return table
