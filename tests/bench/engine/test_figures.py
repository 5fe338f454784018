"""The generation bench's figures: ways chosen, ratios paired, shares of the bound."""

import pytest

from bench.engine.figures import OURS, EngineRun, best_ways, summarize
from bench.engine.run import overhead_share
from bench.measuring.spread import Spread


def run_of(index: int, engine: str, way: str, tokens_per_s: float, batch: int = 8) -> EngineRun:
    return EngineRun(index, engine, way, batch, 100, 100 / tokens_per_s)


RUNS = [
    run_of(0, OURS, "it", 100),
    run_of(0, "peer", "slow", 20),
    run_of(0, "peer", "fast", 25),
    run_of(1, OURS, "it", 60),
    run_of(1, "peer", "fast", 20),
    run_of(0, OURS, "it", 10, batch=1),
]


def test_the_fastest_way_counts_at_each_batch():
    assert best_ways(RUNS) == {(OURS, 8): "it", ("peer", 8): "fast", (OURS, 1): "it"}


def test_ratios_are_of_the_same_round():
    found = {(s.engine, s.batch): s for s in summarize(RUNS, weight_bytes=10, read_bytes_per_s=100)}
    peer = found["peer", 8]
    assert peer.way == "fast"
    assert peer.tokens_per_s == Spread(22.5, 20, 25)
    over = peer.ours_over
    assert over is not None
    assert (over.median, over.low, over.high) == pytest.approx((3.5, 3, 4))
    assert found[OURS, 8].tokens_per_s.median == 80
    assert found[OURS, 8].bound_share == pytest.approx(80 * 10 / (8 * 100))
    assert found[OURS, 1].bound_share == pytest.approx(1.0)


def test_a_way_that_won_later_does_not_replace_the_first_rounds():
    runs = [*RUNS, run_of(1, "peer", "slow", 1000)]
    ways = {s.engine: s.way for s in summarize(runs, weight_bytes=1, read_bytes_per_s=1)}
    assert ways["peer"] == "fast"


def test_overhead_is_what_is_not_arithmetic():
    parts = {"projection": 2.0, "mlp": 4.0, "head": 1.0, "attention": 1.0, "row": 1.0}
    assert overhead_share({**parts, "pack": 0.5, "whole": 10.0}) == pytest.approx(0.1)
