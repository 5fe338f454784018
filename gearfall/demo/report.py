"""The evaluation's result as values, as JSON and as tables for people."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gearfall.gears.search import Cascade


@dataclass(frozen=True, slots=True)
class ModelResult:
    """What one model does alone on the test set."""

    model: str
    parameters: int
    """All parameters, with the tied embedding counted once."""
    flops_per_token: int
    weight_bytes_per_token: int
    mean_flops: float
    """Mean cost of a question: 2 x non-embedding parameters x tokens processed."""
    accuracy: float
    accuracy_by_level: dict[int, float]
    accuracy_by_operator: dict[str, float]
    auroc: dict[str, float]
    """By certainty measure: how well it tells this model's right answers from its wrong ones."""


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """A cascade that certifiably loses no more than the tolerance, and what became of it."""

    planned: Cascade
    """On the calibration questions that tested it."""
    test: Cascade


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the evaluation found."""

    seed: int
    calibration_questions: int
    test_questions: int
    tolerance: float
    """Accuracy that a cascade may lose against the largest model."""
    delta: float
    """Chance that one of the cascades loses more."""
    certainty: str
    """The measure that the cascades use."""
    models: tuple[ModelResult, ...]
    cascades: tuple[CascadeResult, ...]
    """Best first; a cascade of the largest model alone is among them."""

    @property
    def chosen(self) -> CascadeResult:
        """The cheapest, which `gearfall up --demo` deploys."""
        return min(self.cascades, key=lambda each: each.planned.cost)


def deployment_json(report: Report) -> dict[str, Any]:
    """The chosen cascade as a deployment."""
    return {
        "name": "arith",
        "certainty": report.certainty,
        "stages": [
            {"model": stage.model, "threshold": stage.threshold}
            for stage in report.chosen.planned.stages
        ],
    }


def print_report(report: Report, console: Console) -> None:
    """Print a table of the models, one of their certainty and one of the cascades."""
    console.print(_model_table(report))
    console.print(_certainty_table(report))
    console.print(_cascade_table(report))


def _model_table(report: Report) -> Table:
    table = Table(title=f"Models on {report.test_questions} held-out questions")
    levels = list(report.models[0].accuracy_by_level)
    for heading in ("model", "size", "MFLOP", "exact", *(f"{n}d" for n in levels)):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in report.models:
        table.add_row(
            result.model.removeprefix("arith-"),
            f"{_mega(result.parameters)}M",
            _mega(result.mean_flops),
            _percent(result.accuracy),
            *(_percent(result.accuracy_by_level[level]) for level in levels),
        )
    return table


def _certainty_table(report: Report) -> Table:
    table = Table(title="AUROC: does certainty tell right answers from wrong ones?")
    for heading in ("model", *report.models[0].auroc):
        table.add_column(heading.replace("_", " "), justify="right")
    for result in report.models:
        table.add_row(result.model, *(f"{value:.3f}" for value in result.auroc.values()))
    return table


def _cascade_table(report: Report) -> Table:
    table = Table(
        title=f"Cascades by {report.certainty} that lose at most {report.tolerance:g} with "
        f"probability {1 - report.delta:g}, on the test questions"
    )
    for heading in ("cascade", "thresholds", "exact", "MFLOP", "of largest", "reached"):
        table.add_column(heading, justify="right")
    largest = report.models[-1]
    for each in report.cascades:
        stages = each.test.stages
        table.add_row(
            " > ".join(stage.model.removeprefix("arith-") for stage in stages),
            ", ".join(f"{stage.threshold:.3f}" for stage in stages if stage.threshold is not None),
            _percent(each.test.quality),
            _mega(each.test.cost),
            _percent(each.test.cost / largest.mean_flops),
            ", ".join(_percent(share) for share in each.test.reached),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _mega(flops: float) -> str:
    return f"{flops / 1e6:.2f}"
