"""The picture of `bench.cascade real`: load, p95, gears and quality over time, by system."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.cascade.real_figures import Moment, Run, moments
from bench.cascade.real_report import PIECE_S

_PANELS: tuple[tuple[str, Callable[[Moment], float]], ...] = (
    ("requests a second", lambda each: each.per_s),
    ("p95, seconds", lambda each: each.p95_s),
    ("gear", lambda each: each.gear),
    ("share right", lambda each: each.quality),
)


def draw(runs: Sequence[Run], p95_s: float, path: Path) -> None:
    """Draw the first round of each system."""
    from matplotlib.figure import Figure  # the extra `plots` brings it

    figure = Figure(figsize=(9, 11), layout="constrained")
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for run in (run for run in runs if run.round_index == 0):
        seen = moments(run.outcomes, PIECE_S)
        times = [each.at_s for each in seen]
        for panel, (label, value) in zip(panels, _PANELS, strict=True):
            panel.plot(times, [value(each) for each in seen], label=run.system, linewidth=1.4)
            panel.set_ylabel(label)
    panels[1].axhline(p95_s, color="black", linestyle=":", linewidth=1.0, label="asked for")
    panels[1].set_yscale("log")
    panels[1].legend(fontsize="small")
    panels[-1].set_xlabel("seconds of the replay")
    figure.savefig(path, dpi=110)
