"""The front-door bench's report: a table to read and one JSON document."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from bench.front_door.figures import (
    FLOOR,
    AddedLatency,
    Cell,
    CellSummary,
    Ratio,
    Run,
    added_latencies,
    ratios,
    summarize,
)
from bench.measuring.spread import Spread


@dataclass(frozen=True, slots=True)
class Report:
    """All that one run of the bench found out."""

    settings: Mapping[str, object]
    machine: Mapping[str, object]
    versions: Mapping[str, Mapping[str, str]]
    """Of gearfall and of the peers' environment."""
    peer_missing: str
    """Why there is no peer; empty when there is one."""
    summaries: tuple[CellSummary, ...]
    added: tuple[AddedLatency, ...]
    ratios: tuple[Ratio, ...]
    """gearfall over the peer."""
    restarts: int
    """Processes that died on the way."""
    runs: tuple[Run, ...]

    @property
    def failures(self) -> int:
        """Wrong answers of all runs, and processes that died: 0 in a sound run."""
        return self.restarts + sum(summary.failures for summary in self.summaries)


def build_report(
    runs: Sequence[Run],
    *,
    settings: Mapping[str, object],
    machine: Mapping[str, object],
    versions: Mapping[str, Mapping[str, str]],
    peer_missing: str,
    restarts: int,
    ours: str,
    peer: str,
) -> Report:
    """Sum up the runs; `ours` and `peer` name the targets of the ratios."""
    return Report(
        settings=settings,
        machine=machine,
        versions=versions,
        peer_missing=peer_missing,
        summaries=summarize(runs),
        added=added_latencies(runs),
        ratios=ratios(runs, ours, peer),
        restarts=restarts,
        runs=tuple(runs),
    )


def report_to_json(report: Report) -> dict[str, object]:
    """Return the report as JSON values."""
    return {"failures": report.failures, **asdict(report)}


def print_report(report: Report, console: Console) -> None:
    """Print what a reader wants to know; every figure is a median over the rounds."""
    console.print(_load_table(report.summaries))
    console.print(_added_table(report.added))
    if report.ratios:
        console.print(_ratio_table(report.ratios))
    if report.peer_missing:
        console.print(f"No peer in this run: {report.peer_missing}", markup=False)
    if report.failures:
        console.print(f"{report.failures} failures: these figures are of no use.")


def _load_table(summaries: Iterable[CellSummary]) -> Table:
    title = "Front door: medians over the rounds; CPU of the whole target, per answer"
    figures = ("answers/s", "p50 ms", "p95 ms", "p99 ms", "CPU ms", "wrong")
    table = _table(title, "load", "target", *figures)
    for summary in sorted(summaries, key=_place):
        table.add_row(
            _cell_text(summary.cell),
            summary.target,
            _short(summary.requests_per_s.median),
            _short(summary.p50_ms.median),
            _short(summary.p95_ms.median),
            _short(summary.p99_ms.median),
            _cpu_text(summary.cpu_ms_per_request),
            str(summary.failures),
        )
    return table


def _added_table(added: Iterable[AddedLatency]) -> Table:
    table = _table(
        f"Added to the p50 of {FLOOR}, one user", "load", "target", "added ms", "(range)"
    )
    for each in added:
        load = _cell_text(Cell(each.is_stream, 1))
        table.add_row(load, each.target, *_spread_texts(each.added_ms))
    return table


def _ratio_table(found: Sequence[Ratio]) -> Table:
    title = f"{found[0].target} / {found[0].over}, compared round by round"
    table = _table(title, "load", "answers/s", "(range)", "p50", "(range)")
    for each in found:
        row = (*_spread_texts(each.requests_per_s), *_spread_texts(each.p50_ms))
        table.add_row(_cell_text(each.cell), *row)
    return table


def _place(summary: CellSummary) -> tuple[bool, int, str]:
    return summary.cell.is_stream, summary.cell.users, summary.target


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # all columns fit a terminal of 80
        pad_edge=False,
    )
    for name in columns:
        justify: JustifyMethod = "left" if name in {"load", "target"} else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def _cell_text(cell: Cell) -> str:
    users = "1 user" if cell.users == 1 else f"{cell.users} users"
    return f"{'stream' if cell.is_stream else 'whole'}, {users}"


def _spread_texts(figure: Spread) -> tuple[str, str]:
    return _short(figure.median), f"({_short(figure.low)} to {_short(figure.high)})"


def _cpu_text(by_process: Mapping[str, float]) -> str:
    """Return the sum over the target's processes; which process took what is in the JSON."""
    return f"{sum(by_process.values()):.2f}" if by_process else "unknown"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
