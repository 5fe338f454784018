from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, NodeId
from gearfall.core.origin import source_tier
from gearfall.core.records import PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.actions import Unwish, Wish
from gearfall.scheduling.prefetching.forecast import ArrivalHistory, Forecast, note_arrivals
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy, PrefetchScene, plan_prefetch
from tests.gearfall.scheduling.clusters import by_name, by_node, model, node

GB = 10**9
NOW = 10_000_000.0
POLICY = PrefetchPolicy(forecast=Forecast.EWMA, horizon_s=300.0)
NODES = ("node-a", "node-b")


def wanted(jobs, *, ago_s=1.0):
    """A history of so many jobs at one moment."""
    return note_arrivals(ArrivalHistory(), jobs, NOW - ago_s)


def big(name, size_gb=4, **fields):
    return model(name, size_bytes=size_gb * GB, nodes=fields.pop("nodes", NODES), **fields)


def disk(name, *, room_gb=10, resident=(), on_ssd=(), used_gb=0, ssd_free_gb=100):
    made = node(
        name,
        resident=resident,
        on_ssd=on_ssd,
        ssd_bytes_per_s=2e9,
        remote_bytes_per_s=2e8,
        dram_bytes=room_gb * GB,
    )
    return replace(
        made,
        dram_used_bytes=used_gb * GB,
        ssd_capacity_bytes=ssd_free_gb * GB,
    )


def scene(models, nodes, histories, *, wishes=(), hosting=None, hinted=()):
    named = {ModelName(name): history for name, history in histories.items()}
    standing = {(wish.node_id, wish.model): wish for wish in wishes}
    held = {ModelName(name): tuple(map(NodeId, at)) for name, at in (hosting or {}).items()}
    records = by_node(*nodes)
    return PrefetchScene(
        by_name(*models).get,
        records,
        standing,
        tuple(named),
        lambda name: named.get(name, ArrivalHistory()),
        source=lambda each, at: source_tier(each, at, records),
        hosting=lambda name: held.get(name, ()),
        resident=lambda name: [each.node_id for each in nodes if name in each.resident],
        hinted=tuple(map(ModelName, hinted)),
    )


def wish(name, node_id="node-a", *, tier=Tier.DRAM, ago_s=10.0):
    return PrefetchRecord(NodeId(node_id), ModelName(name), tier, "test", NOW - ago_s)


def reasons(actions):
    """Return why each wish was made."""
    return [each.prefetch.reason for each in actions if isinstance(each, Wish)]


def said(actions):
    """Return (node, model, tier) of each wish, and (node, model) of each unwish."""
    return [
        (each.prefetch.node_id, each.prefetch.model, each.prefetch.tier)
        if isinstance(each, Wish)
        else each.key
        for each in actions
    ]


def test_what_is_likely_wanted_goes_to_a_pool_that_has_room():
    nodes = [disk("node-a", used_gb=9, on_ssd=("x",)), disk("node-b", on_ssd=("x",))]
    actions = plan_prefetch(scene([big("x")], nodes, {"x": wanted(5)}), POLICY, NOW)
    assert said(actions) == [("node-b", "x", Tier.DRAM)]
    (reason,) = reasons(actions)
    assert "likely to be wanted within 300 s, which saves 2.00 s" in reason


@pytest.mark.parametrize(
    ("fields", "history"),
    [
        ({}, wanted(0)),
        ({}, wanted(1, ago_s=3000.0)),
        ({"hosting": {"x": ("node-a",)}}, wanted(9)),
        ({"wishes": (wish("x", "node-b"),)}, wanted(9)),
    ],
)
def test_nothing_is_fetched_that_nobody_wants_or_that_is_near(fields, history):
    nodes = [disk("node-a", on_ssd=("x",)), disk("node-b", on_ssd=("x",))]
    assert plan_prefetch(scene([big("x")], nodes, {"x": history}, **fields), POLICY, NOW) == ()


def test_a_model_in_some_pool_is_left_alone():
    nodes = [disk("node-a", resident=("x",), used_gb=4), disk("node-b", on_ssd=("x",))]
    assert plan_prefetch(scene([big("x")], nodes, {"x": wanted(9)}), POLICY, NOW) == ()


def test_it_comes_from_where_it_is_soonest():
    nodes = [disk("node-a"), disk("node-b", on_ssd=("x",))]
    far = big("x", source="http://host/x")
    actions = plan_prefetch(scene([far], nodes, {"x": wanted(5)}), POLICY, NOW)
    assert said(actions) == [("node-b", "x", Tier.DRAM)]


def test_far_bytes_go_to_the_disk_where_the_pool_is_full():
    held = {"held": NODES}
    nodes = [disk("node-a", resident=("held",), used_gb=9)]
    models = [big("x", source="http://host/x"), big("held", 9)]
    found = scene(models, nodes, {"x": wanted(5), "held": wanted(9)}, hosting=held)
    assert said(plan_prefetch(found, POLICY, NOW)) == [("node-a", "x", Tier.SSD)]
    full = scene(
        models,
        [replace(nodes[0], ssd_used_bytes=99 * GB)],
        {"x": wanted(5), "held": wanted(9)},
        hosting=held,
    )
    assert plan_prefetch(full, POLICY, NOW) == ()


@pytest.mark.parametrize(
    ("rival", "hosting", "displaces"),
    [
        (wanted(0), {}, True),
        (wanted(1, ago_s=2000.0), {}, True),
        (wanted(0), {"old": ("node-a",)}, False),
        (wanted(3), {}, False),
        (wanted(9), {}, False),
    ],
)
def test_only_what_is_worth_less_makes_room(rival, hosting, displaces):
    nodes = [disk("node-a", resident=("old",), used_gb=9, on_ssd=("x", "old"))]
    found = scene([big("x"), big("old", 9)], nodes, {"x": wanted(3), "old": rival}, hosting=hosting)
    actions = plan_prefetch(found, POLICY, NOW)
    assert said(actions) == ([("node-a", "x", Tier.DRAM)] if displaces else [])
    assert all("instead of old" in reason for reason in reasons(actions))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"history": wanted(1, ago_s=3000.0)}, "likely"),
        ({"hosting": {"x": ("node-a",)}}, "replica"),
        ({"resident": ("x",)}, "is there"),
        ({"ago_s": 500.0}, "in time"),
        ({"models": ()}, "model is gone"),
        ({"nodes": ()}, "node is gone"),
    ],
)
def test_a_wish_is_taken_back_for_a_reason(fields, reason):
    here = disk("node-a", on_ssd=("x",), resident=fields.get("resident", ()))
    found = scene(
        fields.get("models", (big("x"),)),
        fields.get("nodes", (here,)),
        {"x": fields.get("history", wanted(9))},
        wishes=(wish("x", ago_s=fields.get("ago_s", 10.0)),),
        hosting=fields.get("hosting"),
    )
    unwishes = [each for each in plan_prefetch(found, POLICY, NOW) if isinstance(each, Unwish)]
    assert [each.key for each in unwishes] == ([("node-a", "x")] if reason else [])
    assert not reason or reason in unwishes[0].reason


def test_what_a_draft_will_ask_for_is_wished_for_without_a_history():
    nodes = [disk("node-a", on_ssd=("x", "y"))]
    none = {"x": ArrivalHistory(), "y": ArrivalHistory()}
    models = [big("x"), big("y")]
    assert plan_prefetch(scene(models, nodes, none), POLICY, NOW) == ()
    actions = plan_prefetch(scene(models, nodes, none, hinted=("x",)), POLICY, NOW)
    assert said(actions) == [("node-a", "x", Tier.DRAM)]
    assert reasons(actions) == ["a draft is likely to ask for it, which saves 2.00 s"]


def test_what_a_draft_will_ask_for_takes_the_room_of_what_is_seldom_used():
    nodes = [disk("node-a", on_ssd=("x",), resident=("old",), room_gb=4, used_gb=4)]
    histories = {"x": ArrivalHistory(), "old": ArrivalHistory()}
    found = scene([big("x"), big("old")], nodes, histories, hinted=("x",))
    assert said(plan_prefetch(found, POLICY, NOW)) == [("node-a", "x", Tier.DRAM)]


def test_a_wish_of_middling_worth_stands_though_none_would_be_made():
    nodes = [disk("node-a", on_ssd=("x",))]
    history = wanted(1, ago_s=700.0)
    assert plan_prefetch(scene([big("x")], nodes, {"x": history}), POLICY, NOW) == ()
    standing = scene([big("x")], nodes, {"x": history}, wishes=(wish("x"),))
    assert plan_prefetch(standing, POLICY, NOW) == ()


def test_a_node_is_asked_for_few_at_a_time():
    names = [f"m{n}" for n in range(6)]
    nodes = [disk("node-a", room_gb=100, on_ssd=names)]
    found = scene([big(name) for name in names], nodes, {n: wanted(5) for n in names})
    assert len(plan_prefetch(found, POLICY, NOW)) == POLICY.most_pending


def test_of_many_nodes_other_models_look_at_others():
    names = [f"node-{n}" for n in range(200)]
    models = [f"m{n}" for n in range(16)]
    nodes = [disk(name, on_ssd=models) for name in names]
    found = scene(
        [big(name, nodes=names) for name in models], nodes, {m: wanted(5) for m in models}
    )
    places = {where for where, _, _ in said(plan_prefetch(found, POLICY, NOW))}
    assert len(places) > 8


def test_there_is_a_most_of_wishes():
    names = [f"m{n}" for n in range(40)]
    nodes = [disk(f"node-{n}", on_ssd=names) for n in range(40)]
    models = [big(name, nodes=[each.node_id for each in nodes]) for name in names]
    found = scene(models, nodes, {name: wanted(5) for name in names})
    assert len(plan_prefetch(found, POLICY, NOW)) == POLICY.most_wishes
    few = replace(POLICY, most_standing=3)
    assert len(plan_prefetch(found, few, NOW)) == 3


_fleet = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 9), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=8,
)


@given(_fleet, st.integers(4, 20))
def test_no_pool_is_wished_fuller_than_it_is_and_nothing_dearer_goes(drawn, room_gb):
    """Each drawn model: size, jobs, where it is (0: nowhere, 1: pool a, 2: pool b), held there."""
    models, histories, hosting = [], {}, {}
    resident: dict[str, list[str]] = {name: [] for name in NODES}
    left = dict.fromkeys(NODES, room_gb)
    for number, (size_gb, jobs, where, is_held) in enumerate(drawn):
        name = f"m{number}"
        models.append(big(name, size_gb))
        histories[name] = wanted(jobs)
        if where in (1, 2) and left[NODES[where - 1]] >= size_gb:
            left[NODES[where - 1]] -= size_gb
            resident[NODES[where - 1]].append(name)
            if is_held:
                hosting[name] = (NODES[where - 1],)
    names = [each.name for each in models]
    nodes = [
        disk(
            name,
            room_gb=room_gb,
            resident=resident[name],
            used_gb=room_gb - left[name],
            on_ssd=names,
        )
        for name in NODES
    ]
    size = {each.name: each.size_bytes // GB for each in models}
    actions = plan_prefetch(scene(models, nodes, histories, hosting=hosting), POLICY, NOW)
    assert all(isinstance(each, Wish) for each in actions)
    assert len(set(said(actions))) == len(actions)
    for name in NODES:
        comes = [m for where, m, tier in said(actions) if where == name and tier is Tier.DRAM]
        stays = sum(size[m] for m in resident[name] if m in hosting)
        assert stays + sum(size[m] for m in comes) <= room_gb
        assert not set(comes) & set(resident[name])
