"""The figures of simulated policies as a table."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from gearfall.simulation.figures import Figures


def figures_table(figures: Sequence[Figures], slo_s: float) -> Table:
    """Return one row a policy; ratios are to the first."""
    table = Table(box=box.SIMPLE)
    for name in (
        *("policy", "startup p50 s", "p99", "x first", "waited p99", "x first"),
        *("first token p50 s", "p99", f"> {slo_s:g} s", "preempted (most)", "moved"),
        *("starts", "GB remote", "SSD", "device", "accelerator h"),
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for each in figures:
        table.add_row(*_cells(each, figures[0]))
    return table


def _cells(each: Figures, first: Figures) -> tuple[str, ...]:
    unfinished = each.arrived - each.finished
    return (
        each.policy + (f" ({unfinished} unfinished)" if unfinished else ""),
        f"{each.startup_p50_s:.2f}",
        f"{each.startup_p99_s:.2f}",
        _ratio(each.startup_p99_s, first.startup_p99_s),
        f"{each.waited_p99_s:.2f}",
        _ratio(each.waited_p99_s, first.waited_p99_s),
        f"{each.first_token_p50_s:.2f}",
        f"{each.first_token_p99_s:.2f}",
        f"{100 * each.slo_missed:.1f} %",
        f"{each.preempted} ({each.most_preempted})" if each.preempted else "0",
        str(each.moved),
        str(each.starts),
        f"{each.remote_bytes / 1e9:.0f}",
        f"{each.ssd_bytes / 1e9:.0f}",
        f"{each.device_bytes / 1e9:.0f}",
        f"{each.accelerator_hours:.2f}",
    )


def _ratio(seconds: float, first_s: float) -> str:
    return f"{seconds / first_s:.2f}" if first_s > 0 else "-"
