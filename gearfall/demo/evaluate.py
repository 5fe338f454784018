"""Measures the family on held-out questions, chooses the cascade and writes the report.

`python -m gearfall.demo.evaluate` reproduces report.json and deployment.json from the checkpoints.
Certainty measure and thresholds are chosen on the calibration set alone; every figure for people is
from the test set. Neither set was trained on.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console

from gearfall.core.certainty import MEASURES
from gearfall.demo.answering import Answer, answer_all, load_model
from gearfall.demo.arithmetic import (
    OPERATORS,
    Question,
    Split,
    by_level,
    draw_distinct,
    is_correct,
)
from gearfall.demo.cascade import Record, choose_thresholds, replay
from gearfall.demo.catalogue import CHECKPOINTS, MODELS
from gearfall.demo.certainty import Bools, auroc, best_measure
from gearfall.demo.family import SIZES
from gearfall.demo.report import (
    CascadeResult,
    ModelResult,
    Report,
    deployment_json,
    print_report,
    report_json,
)
from gearfall.demo.tokenizer import VOCABULARY

QUESTIONS = 3000
TOLERANCE = 0.01


def evaluate(checkpoints: Path, *, seed: int = 0, count: int = QUESTIONS) -> Report:
    """Answer about `count` calibration and `count` test questions with every model of the family.

    `checkpoints` holds one directory for each model.
    """
    rng = Random(seed)  # noqa: S311 (a sample, not a secret)
    calibration = draw_distinct(count, Split.CALIBRATION, rng)
    test = draw_distinct(count, Split.TEST, rng)
    calibration_answers: dict[str, tuple[Answer, ...]] = {}
    test_answers: dict[str, tuple[Answer, ...]] = {}
    for name in MODELS:
        model = load_model(checkpoints / name)
        calibration_answers[name] = answer_all(model, calibration)
        test_answers[name] = answer_all(model, test)
    measure = best_measure([aurocs(calibration, calibration_answers[m]) for m in MODELS[:-1]])
    cascades = _cascades(
        {m: record(m, calibration, calibration_answers[m], measure) for m in MODELS},
        {m: record(m, test, test_answers[m], measure) for m in MODELS},
    )
    return Report(
        seed=seed,
        calibration_questions=len(calibration),
        test_questions=len(test),
        tolerance=TOLERANCE,
        certainty=measure,
        models=tuple(model_result(name, test, test_answers[name]) for name in MODELS),
        cascades=cascades,
    )


def record(
    model: str, questions: Sequence[Question], answers: Sequence[Answer], measure: str
) -> Record:
    """A model's answers as arrays over the questions, with certainty by `measure`."""
    certainty = [MEASURES[measure](a.logprobs, a.margins) for a in answers]
    tokens = np.array([answer.tokens_processed for answer in answers], dtype=np.float64)
    return Record(
        model=model,
        certainty=np.array(certainty, dtype=np.float64),
        correct=_correct(questions, answers),
        flops=tokens * SIZES[model].flops_per_token,
    )


def aurocs(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """AUROC of every certainty measure for one model's answers."""
    correct = _correct(questions, answers)
    return {
        name: auroc(np.array([f(a.logprobs, a.margins) for a in answers]), correct)
        for name, f in MEASURES.items()
    }


def model_result(
    name: str, questions: Sequence[Question], answers: Sequence[Answer]
) -> ModelResult:
    """Accuracy, cost and certainty of one model alone."""
    size = SIZES[name]
    correct = _correct(questions, answers)
    levels = by_level(questions)
    operators = {
        sign: [i for i, question in enumerate(questions) if sign in question.prompt]
        for sign in OPERATORS
    }
    return ModelResult(
        model=name,
        parameters=size.body_parameters + len(VOCABULARY) * size.width,
        flops_per_token=size.flops_per_token,
        weight_bytes_per_token=size.weight_bytes_per_token,
        mean_flops=size.flops_per_token * float(np.mean([a.tokens_processed for a in answers])),
        accuracy=float(correct.mean()),
        accuracy_by_level={n: float(correct[where].mean()) for n, where in levels.items()},
        accuracy_by_operator={s: float(correct[where].mean()) for s, where in operators.items()},
        auroc=aurocs(questions, answers),
    )


def write_report(report: Report, directory: Path) -> None:
    """Write report.json and deployment.json; ValueError if the cascade is not accurate enough."""
    for name, value in (
        ("deployment.json", deployment_json(report)),
        ("report.json", report_json(report)),
    ):
        text = json.dumps(value, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _cascades(calibration: dict[str, Record], test: dict[str, Record]) -> tuple[CascadeResult, ...]:
    """Every cascade of at least two models, longest first."""
    lengths = range(len(MODELS), 1, -1)
    chains = itertools.chain.from_iterable(itertools.combinations(MODELS, n) for n in lengths)
    return tuple(_cascade(chain, calibration, test) for chain in chains)


def _cascade(
    models: tuple[str, ...], calibration: dict[str, Record], test: dict[str, Record]
) -> CascadeResult:
    known = [calibration[model] for model in models]
    reference = calibration[MODELS[-1]]
    thresholds = choose_thresholds(known, reference, tolerance=TOLERANCE)
    if thresholds is None:
        return CascadeResult(models, None, None, None)
    return CascadeResult(
        models=models,
        thresholds=thresholds,
        calibration=replay(known, thresholds, reference),
        test=replay([test[model] for model in models], thresholds, test[MODELS[-1]]),
    )


def _correct(questions: Sequence[Question], answers: Sequence[Answer]) -> Bools:
    pairs = zip(questions, answers, strict=True)
    return np.array([is_correct(question, answer.text) for question, answer in pairs])


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate from the command line; prints tables and writes beside the checkpoints."""
    parser = argparse.ArgumentParser(prog="gearfall.demo.evaluate", description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--out", type=Path, help="directory for the JSON files, if another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="in each of the two sets")
    options = parser.parse_args(arguments)
    report = evaluate(options.checkpoints, seed=options.seed, count=options.questions)
    print_report(report, Console())
    write_report(report, options.out or options.checkpoints)


if __name__ == "__main__":
    main()
