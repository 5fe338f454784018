"""The committed checkpoints: they load, answer, know when they are wrong, and match the report."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gearfall.demo.answering import answer_all, load_model
from gearfall.demo.arithmetic import Split, ask, draw_mixed, is_correct
from gearfall.demo.catalogue import (
    CHECKPOINTS,
    MODELS,
    checkpoint_path,
    checkpoint_paths,
    deployment_path,
)
from gearfall.demo.evaluate import evaluate, model_result
from gearfall.demo.report import deployment_json

EASY = [ask(21, "+", 14), ask(9, "+", 8), ask(86, "-", 32), ask(340, "+", 25), ask(77, "-", 5)]


@pytest.fixture(scope="module")
def report() -> Any:
    return json.loads((CHECKPOINTS / "report.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_answers_easy_questions_right(name: str) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(checkpoint_path(name))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(name))
    assert model.dtype == torch.bfloat16
    for question in EASY:
        prompt = tokenizer(question.prompt, return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(**prompt, max_new_tokens=10)[0]
        assert tokenizer.decode(generated, skip_special_tokens=True) == (
            question.prompt + question.answer
        )


@pytest.mark.parametrize("name", MODELS)
def test_answering_in_a_batch_is_answering_alone(name: str) -> None:
    model = load_model(checkpoint_path(name))
    questions = draw_mixed(40, Split.TEST, Random(11), {2: 1.0, 3: 1.0})
    together = answer_all(model, questions)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = answer_all(model, [question])
        assert sum(alone.logprobs) == pytest.approx(sum(answer.logprobs), abs=0.2)
        assert answer.tokens_processed == len(question.prompt) + len(answer.logprobs)
        assert all(margin >= 0 for margin in answer.margins)


def test_the_report_holds_for_other_questions(report: Any) -> None:
    questions = draw_mixed(400, Split.TEST, Random(12), {2: 1.0, 4: 1.0, 6: 1.0})
    for name, stated in zip(MODELS, report["models"], strict=True):
        answers = answer_all(load_model(checkpoint_path(name)), questions)
        by_level = [stated["accuracy_by_level"][level] for level in "246"]
        measured = model_result(name, questions, answers)
        assert measured.accuracy == pytest.approx(sum(by_level) / 3, abs=0.08)
        correct = sum(is_correct(q, a.text) for q, a in zip(questions, answers, strict=True))
        assert measured.accuracy == correct / len(questions)


def test_size_buys_accuracy(report: Any) -> None:
    small, medium, large = report["models"]
    assert small["accuracy"] + 0.1 < medium["accuracy"] < large["accuracy"] - 0.01
    assert 5 * small["mean_flops"] < medium["mean_flops"] < large["mean_flops"] / 2


def test_certainty_predicts_correctness(report: Any) -> None:
    for model in report["models"]:
        assert model["auroc"][report["certainty"]] > 0.88


def test_the_cascade_keeps_the_accuracy_at_less_cost(report: Any) -> None:
    cascade = min((each["test"] for each in report["cascades"]), key=lambda test: test["cost"])
    large = report["models"][-1]
    assert [stage["model"] for stage in cascade["stages"]] == list(MODELS)
    assert cascade["quality"] >= large["accuracy"] - report["tolerance"]
    assert cascade["cost"] < 0.45 * large["mean_flops"]


def test_the_deployment_is_the_cheapest_reported_cascade(report: Any) -> None:
    deployment = json.loads(deployment_path().read_text())
    assert deployment["certainty"] == report["certainty"]
    chosen = min((each["planned"] for each in report["cascades"]), key=lambda each: each["cost"])
    assert deployment["stages"] == chosen["stages"]
    assert [stage["model"] for stage in deployment["stages"]] == list(checkpoint_paths())


def test_a_small_evaluation_runs_whole() -> None:
    report = evaluate(CHECKPOINTS, seed=1, count=300)
    assert report.models[0].accuracy < report.models[-1].accuracy
    assert [stage.model for stage in report.cascades[0].planned.stages][-1] == MODELS[-1]
    assert deployment_json(report)["stages"][-1]["threshold"] is None


def test_the_weights_are_small() -> None:
    files = [path for path in Path(CHECKPOINTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
