from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.errors import InvalidRequest
from gearfall.gears.placement import Host, Placeable, place_models

GB = 10**9


def hosts(count: int, memory=10 * GB, replicas=4) -> list[Host]:
    return [Host(f"w{n}", f"n{n // 2}", memory, replicas) for n in range(count)]


def placeable(name, memory=GB, speed=100.0, workers=8) -> Placeable:
    return Placeable(name, memory, {f"w{n}": speed for n in range(workers)})


def test_load_is_spread_until_every_worker_is_equally_busy():
    found = place_models(hosts(4), [placeable("a")], [{"a": 200.0}])
    assert found.utilisation[0] == pytest.approx(0.5, rel=1e-2)
    assert {(each.node, each.count) for each in found.replicas} == {("n0", 2), ("n1", 2)}
    assert found.shares[0]["a"] == {"n0": pytest.approx(0.5), "n1": pytest.approx(0.5)}


def test_replicas_that_help_nothing_are_not_placed():
    found = place_models(hosts(1), [placeable("a"), placeable("b")], [{"a": 10.0}])
    assert found.by_worker == (("w0", "a"),)


def test_every_gears_models_are_there_at_once():
    models = [placeable("small", GB, 1000.0), placeable("large", 9 * GB, 50.0)]
    gears = [{"small": 10.0, "large": 10.0}, {"small": 1500.0}]
    found = place_models(hosts(2), models, gears)
    assert {model for _, model in found.by_worker} == {"small", "large"}
    assert found.utilisation[1] == pytest.approx(0.75, rel=1e-2)


def test_a_load_beyond_the_cluster_is_said_as_utilisation():
    found = place_models(hosts(2), [placeable("a")], [{"a": 500.0}])
    assert found.utilisation[0] == pytest.approx(2.5, rel=1e-2)


@pytest.mark.parametrize(
    ("workers", "models", "demand", "says"),
    [
        ([], [placeable("a")], [{"a": 1.0}], "needs workers"),
        (hosts(1, 0), [placeable("a")], [{"a": 1.0}], "can hold nothing"),
        (hosts(1), [placeable("a", 11 * GB)], [{"a": 1.0}], "largest worker has"),
        (hosts(1), [placeable("a", -1)], [{"a": 1.0}], "needs -1 bytes"),
        (hosts(1), [placeable("a", speed=0.0)], [{"a": 1.0}], "profile it there"),
        (hosts(1), [placeable("a")], [{"b": 1.0}], "known models"),
        (hosts(1), [placeable("a")], [{"a": float("nan")}], "finite loads"),
        (
            hosts(1),
            [placeable("a", 6 * GB), placeable("b", 6 * GB)],
            [{"a": 1.0, "b": 1.0}],
            "do not fit together: one replica of each needs 12000000000 bytes",
        ),
    ],
)
def test_what_can_not_be_placed_is_refused_with_what_is_missing(workers, models, demand, says):
    with pytest.raises(InvalidRequest, match=says):
        place_models(workers, models, demand)


def one_of_each_fits(models: list[Placeable], workers: list[Host]) -> bool:
    """Every way to give each model one worker, by trial: what the refusal is held against."""
    return any(
        all(
            sum(model.memory_bytes for model, at in zip(models, places, strict=True) if at is each)
            <= each.memory_bytes
            and sum(at is each for at in places) <= each.max_replicas
            for each in workers
        )
        for places in product(workers, repeat=len(models))
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(4, 12), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 5), st.floats(10.0, 500.0)), min_size=1, max_size=3),
    st.lists(st.lists(st.floats(0.0, 1000.0), min_size=3, max_size=3), min_size=1, max_size=3),
)
def test_memory_is_never_exceeded_and_every_load_is_somewhere(sizes, kinds, loads):
    workers = [Host(f"w{n}", f"n{n}", size * GB, 2) for n, size in enumerate(sizes)]
    models = [placeable(f"m{n}", size * GB, speed) for n, (size, speed) in enumerate(kinds)]
    demand = [{m.name: load for m, load in zip(models, gear, strict=False)} for gear in loads]
    needed = [model for model in models if any(gear[model.name] > 0.0 for gear in demand)]
    too_large = any(model.memory_bytes > max(sizes) * GB for model in models)
    if too_large or not one_of_each_fits(needed, workers):
        with pytest.raises(InvalidRequest, match=r"largest worker has|do not fit together"):
            place_models(workers, models, demand)
        return
    found = place_models(workers, models, demand)
    memory = {model.name: model.memory_bytes for model in models}
    for worker in workers:
        held = [model for name, model in found.by_worker if name == worker.name]
        assert sum(memory[model] for model in held) <= worker.memory_bytes
        assert len(set(held)) == len(held) <= worker.max_replicas
    at = {(each.node, each.model) for each in found.replicas}
    for gear, shares in enumerate(found.shares):
        wanted = {name for name, load in demand[gear].items() if load > 0.0}
        assert set(shares) == wanted
        for model, by_node in shares.items():
            assert sum(by_node.values()) == pytest.approx(1.0)
            assert all((node, model) in at for node in by_node)
