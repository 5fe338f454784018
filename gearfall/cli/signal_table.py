"""The table of all signals: what each tells of right and wrong answers, and what it is worth."""

from collections.abc import Mapping, Sequence

from gearfall.cli.render import console, print_table
from gearfall.gears.signals import LOSS, SignalReport


def print_signals(reports: Mapping[str, Sequence[SignalReport]]) -> None:
    """Print one row a signal and model."""
    print_table(
        "signals, on queries that fitted nothing",
        ("model", "signal", "AUROC>", "ECE>", "Brier>", "cost>"),
        [
            (
                model,
                each.signal,
                f"{each.reliability.auroc:.3f}",
                f"{each.reliability.ece:.3f}",
                f"{each.reliability.brier:.3f}",
                "-" if each.cost_share is None else f"{each.cost_share:.0%}",
            )
            for model, found in reports.items()
            for each in found
        ],
    )
    console.print(
        f"cost: of the cheapest cascade of that model and the best one that loses at most {LOSS:g} "
        "to the best one, over the best one's; thresholds chosen on the same queries",
        highlight=False,
    )
