"""Reliability diagrams; need the extra `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gearfall.cli.figure_files import save_figure
from gearfall.gears.signals import SignalReport

SHOWN = ("whole answer", "least gap of two", "logistic", "logistic, isotonic")


def write_reliability(directory: Path, reports: Mapping[str, Sequence[SignalReport]]) -> list[Path]:
    """Write a diagram a model: share of right answers (up) by stated certainty (right)."""
    written = []
    for model, found in reports.items():
        shown = [each for each in found if each.signal in SHOWN]
        figure = Figure(figsize=(3.2 * len(shown), 3.6), layout="constrained")
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for each, each_axes in zip(shown, axes, strict=True):
            _draw(each_axes, each)
        axes[0].set_ylabel("share right")
        figure.suptitle(f"{model}: {shown[0].reliability.queries} queries that fitted nothing")
        written += save_figure(figure, directory, f"reliability-{model}")
    return written


def _draw(axes: Axes, report: SignalReport) -> None:
    bins = report.reliability.bins
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([mean for mean, _, _ in bins], [share for _, share, _ in bins], marker="o")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="certainty")
    known = report.reliability
    axes.set_title(f"{report.signal}\nAUROC {known.auroc:.3f}, ECE {known.ece:.3f}", fontsize=9)
    axes.grid(visible=True, alpha=0.3)
