"""Measures the family on held-out questions, chooses the cascade and writes the report.

`python -m gearfall.demo.evaluate` reproduces report.json and deployment.json from the checkpoints.
The planner (`gearfall.gears`) chooses on the calibration set alone; every figure for people is from
the test set. Neither set was trained on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console

from gearfall.core.certainty.certainty import MEASURES
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.demo.answering import Answer, answer_all, load_model
from gearfall.demo.arithmetic import (
    OPERATORS,
    Question,
    Split,
    by_level,
    draw_distinct,
    is_correct,
)
from gearfall.demo.catalogue import CHECKPOINTS, MODELS
from gearfall.demo.family import SIZES
from gearfall.demo.report import CascadeResult, ModelResult, Report, deployment_json, print_report
from gearfall.demo.tokenizer import VOCABULARY
from gearfall.gears.answers import FloatArray, ModelAnswers
from gearfall.gears.calibrate import reliability
from gearfall.gears.rungs import QualityTarget, find_rungs
from gearfall.gears.search import Cascade
from gearfall.gears.search import evaluate as replay_cascade

QUESTIONS = 3000
"""Of the test set; twice as many calibrate."""
TOLERANCE = 0.01
DELTA = 0.05
MEASURE = "sequence_probability"


def evaluate(checkpoints: Path, *, seed: int = 0, count: int = QUESTIONS) -> Report:
    """Answer about 2 `count` calibration and `count` test questions with every model.

    `checkpoints` holds one directory for each model.
    """
    rng = Random(seed)  # noqa: S311 (a sample, not a secret)
    calibration = draw_distinct(2 * count, Split.CALIBRATION, rng)
    test = draw_distinct(count, Split.TEST, rng)
    known, unseen, results = [], [], []
    for name in MODELS:
        model = load_model(checkpoints / name)
        known.append(columns(name, calibration, answer_all(model, calibration)))
        answers = answer_all(model, test)
        unseen.append(columns(name, test, answers))
        results.append(model_result(name, test, answers))
    order = np.random.default_rng(seed).permutation(len(calibration))
    rungs = find_rungs(known, order, QualityTarget(None, TOLERANCE, DELTA))
    by_name = {each.model: each for each in unseen}
    return Report(
        seed=seed,
        calibration_questions=len(calibration),
        test_questions=len(test),
        tolerance=TOLERANCE,
        delta=DELTA,
        certainty=MEASURE,
        models=tuple(results),
        cascades=tuple(
            CascadeResult(rung.cascade, _on_test(rung.cascade.stages, by_name)) for rung in rungs
        ),
    )


def _on_test(stages: Sequence[Stage], answers: dict[ModelName, ModelAnswers]) -> Cascade:
    limits = [stage.threshold for stage in stages if stage.threshold is not None]
    return replay_cascade([answers[stage.model] for stage in stages], limits)


def columns(model: str, questions: Sequence[Question], answers: Sequence[Answer]) -> ModelAnswers:
    """A model's answers as the planner reads them, with certainty by MEASURE."""
    tokens = np.array([answer.tokens_processed for answer in answers], dtype=np.float64)
    return ModelAnswers(
        ModelName(model),
        _correct(questions, answers),
        _certainty(MEASURE, answers),
        tokens * SIZES[model].flops_per_token,
    )


def aurocs(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """AUROC of every certainty measure for one model's answers."""
    right = _correct(questions, answers)
    return {name: reliability(_certainty(name, answers), right).auroc for name in MEASURES}


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
    """Write report.json and deployment.json."""
    for name, value in (
        ("deployment.json", deployment_json(report)),
        ("report.json", asdict(report)),
    ):
        text = json.dumps(value, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _correct(questions: Sequence[Question], answers: Sequence[Answer]) -> FloatArray:
    pairs = zip(questions, answers, strict=True)
    return np.array([float(is_correct(question, answer.text)) for question, answer in pairs])


def _certainty(measure: str, answers: Sequence[Answer]) -> FloatArray:
    return np.array([MEASURES[measure](each.logprobs, each.margins) for each in answers])


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate from the command line; prints tables and writes beside the checkpoints."""
    parser = argparse.ArgumentParser(prog="gearfall.demo.evaluate", description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--out", type=Path, help="directory for the JSON files, if another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="in the test set")
    options = parser.parse_args(arguments)
    report = evaluate(options.checkpoints, seed=options.seed, count=options.questions)
    print_report(report, Console())
    write_report(report, options.out or options.checkpoints)


if __name__ == "__main__":
    main()
