"""The figures of simulated policies as a table: a column for each policy, ratios to the first."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from gearfall.simulation.fleet.figures import Figures


def figures_table(figures: Sequence[Figures], slo_s: float) -> Table:
    """Return the table; in brackets how many times the first policy's figure."""
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for each in figures:
        table.add_column(each.policy, justify="right")
    for name, cell in (*_seconds(figures[0]), *_counts(slo_s)):
        table.add_row(name, *(cell(each) for each in figures))
    return table


Cell = Callable[[Figures], str]


def _seconds(first: Figures) -> tuple[tuple[str, Cell], ...]:
    def against_first(field: str) -> Cell:
        base_s = float(getattr(first, field))

        def cell(each: Figures) -> str:
            seconds = float(getattr(each, field))
            ratio = f" ({seconds / base_s:.2f})" if base_s > 0 else ""
            return f"{seconds:.2f}{ratio}"

        return cell

    return (
        ("startup p50 s", against_first("startup_p50_s")),
        ("startup p99 s", against_first("startup_p99_s")),
        ("waited p99 s", against_first("waited_p99_s")),
        ("first token p50 s", against_first("first_token_p50_s")),
        ("first token p99 s", against_first("first_token_p99_s")),
    )


def _counts(slo_s: float) -> tuple[tuple[str, Cell], ...]:
    return (
        (f"first token after {slo_s:g} s", lambda each: f"{100 * each.slo_missed:.1f} %"),
        ("unfinished", lambda each: str(each.arrived - each.finished)),
        ("stopped (one at most)", lambda each: f"{each.preempted} ({each.most_preempted})"),
        ("moved alive", lambda each: str(each.moved)),
        ("starts", lambda each: str(each.starts)),
        ("GB from remote", lambda each: f"{each.remote_bytes / 1e9:.0f}"),
        ("GB from SSD", lambda each: f"{each.ssd_bytes / 1e9:.0f}"),
        ("GB to devices", lambda each: f"{each.device_bytes / 1e9:.0f}"),
        ("accelerator hours", lambda each: f"{each.accelerator_hours:.2f}"),
    )
