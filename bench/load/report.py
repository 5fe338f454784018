"""What the rounds of the loading bench say together. Pure: samples in, rows out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from bench.measuring.spread import Spread, spread

OURS = "gearfall"
FRESH = "gearfall, fresh memory"
"""The same without memory that the store has kept ready."""
RAW = ("raw io_uring", "raw threads")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One loader, once. `seconds` until every byte was there and every page touched."""

    loader: str
    condition: str
    """cold, warm or resident."""
    size_bytes: int
    round_index: int
    seconds: float
    phases_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    """Most memory beyond the model's own bytes."""
    touch_faults: int = 0
    """Page faults of the touch."""


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one loader under one condition."""

    loader: str
    condition: str
    size_bytes: int
    seconds: Spread
    gb_per_s: float
    over_ours: Spread | None
    """Its time over gearfall's in the same round: above 1 gearfall is faster."""
    phases_s: dict[str, float]
    """Medians."""
    peak_mib: float
    touch_faults: int


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Return one row for each loader, condition and size, fastest first within a condition."""
    groups: dict[tuple[int, str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.size_bytes, sample.condition, sample.loader), []).append(sample)
    rows = [_row(key, group, groups.get((*key[:2], OURS), ())) for key, group in groups.items()]
    return sorted(rows, key=lambda row: (row.size_bytes, row.condition, row.seconds.median))


def _row(key: tuple[int, str, str], group: Sequence[Sample], ours: Sequence[Sample]) -> Row:
    size_bytes, condition, loader = key
    seconds = spread(sample.seconds for sample in group)
    ours_s = {sample.round_index: sample.seconds for sample in ours}
    ratios = [
        sample.seconds / ours_s[sample.round_index]
        for sample in group
        if sample.round_index in ours_s
    ]
    names = dict.fromkeys(name for sample in group for name in sample.phases_s)
    return Row(
        loader,
        condition,
        size_bytes,
        seconds,
        size_bytes / seconds.median / 1e9,
        spread(ratios) if ratios else None,
        {name: spread(s.phases_s[name] for s in group).median for name in names},
        max(sample.peak_bytes for sample in group) / MIB,
        max(sample.touch_faults for sample in group),
    )


def of_ceiling(samples: Sequence[Sample], size_bytes: int) -> Spread | None:
    """Return the cold load's bandwidth over the faster raw read's of the same round."""
    ceilings: dict[int, float] = {}
    loads: dict[int, float] = {}
    for sample in samples:
        if sample.size_bytes != size_bytes or sample.condition != "cold":
            continue
        if sample.loader in RAW:
            known = ceilings.get(sample.round_index, sample.seconds)
            ceilings[sample.round_index] = min(known, sample.seconds)
        elif sample.loader == OURS:
            loads[sample.round_index] = sample.phases_s["load"]
    ratios = [ceilings[index] / loads[index] for index in loads if index in ceilings]
    return spread(ratios) if ratios else None


def table(rows: Sequence[Row]) -> Table:
    """Return what is printed."""
    found = Table(box=box.SIMPLE)
    for name in ("GB", "condition", "loader"):
        found.add_column(name, no_wrap=True)
    for name in ("s", "range", "GB/s", "x gearfall", "range", "MiB beyond"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        s, ratio = row.seconds, row.over_ours
        found.add_row(
            f"{row.size_bytes / 1e9:.2f}",
            row.condition,
            row.loader,
            f"{s.median:.3f}",
            f"{s.low:.3f}-{s.high:.3f}",
            f"{row.gb_per_s:.2f}",
            f"{ratio.median:.2f}" if ratio else "",
            f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else "",
            "" if row.loader in RAW else f"{row.peak_mib:.0f}",
        )
    return found


def phase_lines(rows: Sequence[Row]) -> list[str]:
    """Return gearfall's phases, a line for each size and condition."""
    return [
        f"{row.size_bytes / 1e9:.2f} GB {row.condition}, {row.loader}: "
        + ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in row.phases_s.items())
        + f"; {row.touch_faults} page faults in the touch"
        for row in rows
        if row.loader in {OURS, FRESH}
    ]
