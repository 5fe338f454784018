"""The front-door bench's report: a table to read and one JSON document."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from bench.figures import (
    FLOOR,
    AddedLatency,
    Cell,
    CellSummary,
    Ratio,
    Run,
    Spread,
    added_latencies,
    ratios,
    summarize,
)


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
    """Print what a reader wants to know; every figure is a median, with its range over rounds."""
    console.print(_load_table(report.summaries))
    console.print(_added_table(report.added))
    if report.ratios:
        console.print(_ratio_table(report.ratios))
    if report.peer_missing:
        console.print(f"No peer in this run: {report.peer_missing}", markup=False)
    if report.failures:
        console.print(f"{report.failures} failures: these figures are of no use.")


def _load_table(summaries: Iterable[CellSummary]) -> Table:
    columns = ("requests/s", "p50 ms", "p95 ms", "p99 ms", "CPU ms/request", "failed")
    table = _table("Front door: median of rounds (lowest to highest)", columns)
    ordered = sorted(summaries, key=lambda each: (each.cell.is_stream, each.cell.users))
    for summary in ordered:
        table.add_row(
            _cell_text(summary.cell),
            summary.target,
            _spread_text(summary.requests_per_s),
            _spread_text(summary.p50_ms),
            _spread_text(summary.p95_ms),
            _spread_text(summary.p99_ms),
            _cpu_text(summary.cpu_ms_per_request),
            str(summary.failures),
            end_section=summary is ordered[-1],
        )
    return table


def _added_table(added: Iterable[AddedLatency]) -> Table:
    table = _table(f"Added to the p50 of {FLOOR}, one user", ("added ms",))
    for each in added:
        table.add_row(_cell_text(Cell(each.is_stream, 1)), each.target, _spread_text(each.added_ms))
    return table


def _ratio_table(found: Iterable[Ratio]) -> Table:
    table = _table("Compared round by round", ("requests/s", "p50"))
    for each in found:
        table.add_row(
            _cell_text(each.cell),
            f"{each.target} / {each.over}",
            _spread_text(each.requests_per_s),
            _spread_text(each.p50_ms),
        )
    return table


def _table(title: str, figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("load")
    table.add_column("target")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _cell_text(cell: Cell) -> str:
    users = "1 user" if cell.users == 1 else f"{cell.users} users"
    return f"{'stream' if cell.is_stream else 'whole'}, {users}"


def _spread_text(figure: Spread) -> str:
    return f"{_short(figure.median)} ({_short(figure.low)} to {_short(figure.high)})"


def _cpu_text(by_process: Mapping[str, float]) -> str:
    busy = sorted(by_process.items(), key=lambda item: -item[1])
    shown = " ".join(f"{name} {ms:.2f}" for name, ms in busy if ms >= 0.05)
    return f"{sum(by_process.values()):.2f}: {shown}" if by_process else "unknown"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
