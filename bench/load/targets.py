"""What loading shall reach, held against every round. Pure: samples in, verdicts out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.load.report import FRESH, MIB, OURS, RAW, Sample


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target on one model."""

    name: str
    size_bytes: int
    bound: float
    is_least: bool
    """Whether every round shall reach the bound; else none shall exceed it."""
    rounds: tuple[float, ...]
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Whether every round is on the right side."""
        return all(
            found >= self.bound if self.is_least else found < self.bound for found in self.rounds
        )

    def line(self) -> str:
        """Return it as a line of text."""
        relation = ">=" if self.is_least else "<"
        rounds = " ".join(f"{found:.3g}" for found in self.rounds)
        verdict = "met" if self.is_met else "missed"
        return (
            f"{self.size_bytes / 1e9:.2f} GB, {self.name}: {rounds} "
            f"({relation} {self.bound:g} {verdict}){self.detail and f'; {self.detail}'}"
        )


_Seconds = Mapping[str, float]
_Ratio = Callable[[_Seconds], float | None]


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """Return every target that the samples say something about, by size."""
    found = []
    for size_bytes in sorted({sample.size_bytes for sample in samples}):
        mine = [sample for sample in samples if sample.size_bytes == size_bytes]
        found += [*_cold(mine, size_bytes), *_attach(mine, size_bytes), *_memory(mine, size_bytes)]
    return [verdict for verdict in found if verdict.rounds]


def _cold(samples: Sequence[Sample], size_bytes: int) -> list[Verdict]:
    rounds: dict[int, dict[str, float]] = {}
    for sample in samples:
        if sample.condition == "cold":
            seconds = rounds.setdefault(sample.round_index, {})
            seconds[sample.loader] = sample.seconds
            if sample.loader in {OURS, FRESH}:
                # The raw reads neither attach nor touch.
                seconds[f"{sample.loader} alone"] = sample.phases_s["load"]

    def verdict(name: str, bound: float, ratio: _Ratio, detail: str = "") -> Verdict:
        values = (ratio(seconds) for _, seconds in sorted(rounds.items()))
        known = tuple(value for value in values if value is not None)
        return Verdict(name, size_bytes, bound, True, known, detail)

    peers = " ".join(_fastest_peer(seconds) or "none" for _, seconds in sorted(rounds.items()))
    return [
        verdict("cold load of the raw read's bandwidth", 0.95, _of_raw(OURS)),
        verdict("the same into fresh memory", 0.95, _of_raw(FRESH)),
        verdict(
            "fastest peer, cold / gearfall", 1.0, _over_ours(_fastest_peer), f"fastest: {peers}"
        ),
        *(
            verdict(f"{name}, cold / gearfall", 2.5, _over_ours(partial(_named, name)))
            for name in ("safetensors load_file", "transformers from_pretrained")
        ),
    ]


def _of_raw(loader: str) -> _Ratio:
    def ratio(seconds: _Seconds) -> float | None:
        raw = [seconds[name] for name in RAW if name in seconds]
        ours = seconds.get(f"{loader} alone")
        return min(raw) / ours if raw and ours else None

    return ratio


def _over_ours(choose: Callable[[_Seconds], str | None]) -> _Ratio:
    def ratio(seconds: _Seconds) -> float | None:
        theirs, ours = seconds.get(choose(seconds) or ""), seconds.get(OURS)
        return theirs / ours if theirs and ours else None

    return ratio


def _named(name: str, _seconds: _Seconds) -> str | None:
    return name


def _fastest_peer(seconds: _Seconds) -> str | None:
    ours = {OURS, FRESH, *RAW, f"{OURS} alone", f"{FRESH} alone"}
    peers = [name for name in seconds if name not in ours]
    return min(peers, key=lambda name: seconds[name], default=None)


def _attach(samples: Sequence[Sample], size_bytes: int) -> list[Verdict]:
    ms = tuple(
        1e3 * (sample.phases_s["lease"] + sample.phases_s["map"])
        for sample in samples
        if (sample.loader, sample.condition) == (OURS, "resident")
    )
    return [Verdict("attach of a resident model, ms", size_bytes, 5.0, False, ms)]


def _memory(samples: Sequence[Sample], size_bytes: int) -> list[Verdict]:
    mib = tuple(sample.peak_bytes / MIB for sample in samples if sample.loader == OURS)
    return [Verdict("memory beyond the pool, MiB", size_bytes, 64.0, False, mib)]
