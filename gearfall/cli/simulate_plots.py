"""Plots of simulated policies; needs the extra `plots`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gearfall.cli.figure_files import save_figure
from gearfall.simulation.fleet.scenario import Run
from gearfall.simulation.requests import StageOutcome

_LEAST_SHOWN_S = 0.001


def write_plots(directory: Path, title: str, runs: Sequence[Run]) -> list[Path]:
    """Write how startup and time to first token are distributed, as SVG and PNG; return the files.

    One line a policy: the share of requests (up) that took no longer than so many seconds (right).
    """
    written = []
    for name, label, value in _PLOTS:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            seconds = sorted(max(_LEAST_SHOWN_S, value(each)) for each in run.outcomes)
            shares = [(index + 1) / len(seconds) for index in range(len(seconds))]
            axes.step(seconds, shares, where="post", label=run.policy)
        axes.set(xscale="log", xlabel=label, ylabel="share of requests", title=title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        written += save_figure(figure, directory, name)
    return written


_PLOTS: tuple[tuple[str, str, Callable[[StageOutcome], float]], ...] = (
    ("startup", "startup, s", lambda each: each.startup_s),
    ("first-token", "time to first token, s", lambda each: each.first_token_s),
)
