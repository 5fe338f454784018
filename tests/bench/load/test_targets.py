"""Every round counts: one that misses its bound misses the target."""

import pytest

from bench.load.report import FRESH, MIB, OURS, Sample
from bench.load.targets import Verdict, verdicts

GB = 10**9
LOAD_FILE, PRETRAINED = "safetensors load_file", "transformers from_pretrained"


def cold(loader: str, index: int, seconds: float, load_s: float = 0.0) -> Sample:
    phases_s = {"load": load_s or seconds}
    return Sample(loader, "cold", GB, index, seconds, phases_s, peak_bytes=6 * MIB)


def round_of(index: int, ours_s: float) -> list[Sample]:
    return [
        cold("raw io_uring", index, 0.5),
        cold("raw threads", index, 0.4),
        cold(OURS, index, ours_s + 0.01, ours_s),
        cold(FRESH, index, 0.5, 0.5),
        cold("run:ai streamer", index, 0.6 if index else 0.5),
        cold("tensorizer", index, 0.55),
        cold(LOAD_FILE, index, 1.2),
        cold(PRETRAINED, index, 1.0),
    ]


def by_name(samples: list[Sample]) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts(samples)}


def test_ratios_are_taken_round_by_round():
    found = by_name([*round_of(0, 0.4), *round_of(1, 0.42)])
    of_raw = found["cold load of the raw read's bandwidth"]
    assert of_raw.rounds == pytest.approx((1.0, 0.952), abs=1e-3)
    assert of_raw.is_met
    assert found["the same into fresh memory"].rounds == pytest.approx((0.8, 0.8))
    peer = found["fastest peer, cold / gearfall"]
    assert peer.rounds == pytest.approx((0.5 / 0.41, 0.55 / 0.43))
    assert peer.detail == "fastest: run:ai streamer tensorizer"
    assert found[f"{LOAD_FILE}, cold / gearfall"].is_met
    assert not found[f"{PRETRAINED}, cold / gearfall"].is_met


def test_one_round_below_the_bound_misses_it():
    found = by_name([*round_of(0, 0.4), *round_of(1, 0.43)])
    of_raw = found["cold load of the raw read's bandwidth"]
    assert not of_raw.is_met
    assert of_raw.line().endswith("1 0.93 (>= 0.95 missed)")


def test_upper_bounds():
    attached = [
        Sample(OURS, "resident", 4 * GB, index, 0.1, {"lease": 0.001, "map": ms / 1e3}, 6 * MIB)
        for index, ms in enumerate((0.5, 1.0))
    ]
    found = by_name(attached)
    assert found["attach of a resident model, ms"].rounds == pytest.approx((1.5, 2.0))
    assert found["attach of a resident model, ms"].is_met
    assert found["memory beyond the pool, MiB"].rounds == (6.0, 6.0)
    slow = Sample(OURS, "resident", 4 * GB, 2, 0.1, {"lease": 0.001, "map": 0.004}, 64 * MIB)
    found = by_name([*attached, slow])
    assert not found["attach of a resident model, ms"].is_met
    assert not found["memory beyond the pool, MiB"].is_met


def test_what_was_not_measured_has_no_verdict():
    assert by_name([cold("raw threads", 0, 0.4), cold(OURS, 0, 0.41, 0.4)]).keys() == {
        "cold load of the raw read's bandwidth",
        "memory beyond the pool, MiB",
    }
    assert verdicts([]) == []
