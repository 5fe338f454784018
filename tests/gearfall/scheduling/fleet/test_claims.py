from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.scheduling.fleet.claims import Claim, Claims

ONE, TWO = ModelName("one"), ModelName("two")
A, B = WorkerId("a"), WorkerId("b")
N, M = NodeId("n"), NodeId("m")


def test_a_site_has_one_claim_and_a_worker_may_have_several():
    claims = Claims()
    assert claims.put(ONE, None, Claim({A: 10}, 0.0, 60.0)) == {A}
    assert claims.put(TWO, None, Claim({A: 20, B: 20}, 0.0, 50.0)) == {A, B}
    assert claims.on(A) == {ONE: 10, TWO: 20}
    assert claims.put(ONE, None, Claim({B: 10}, 1.0, 61.0)) == {A, B}, "both rows change"
    assert (claims.on(A), claims.on(B)) == ({TWO: 20}, {TWO: 20, ONE: 10})
    assert claims.earliest_end() == 50.0


def test_what_is_wanted_on_two_nodes_is_claimed_on_both():
    claims = Claims()
    claims.put(ONE, N, Claim({A: 10}, 0.0, 60.0))
    claims.put(ONE, M, Claim({B: 10}, 0.0, 60.0))
    assert claims.workers_of(ONE) == {A, B}
    assert claims.drop(ONE, N) == {A}
    assert claims.of(ONE, N) is None
    assert claims.of(ONE, M) == Claim({B: 10}, 0.0, 60.0)
    assert claims.keep(ONE, {N, None}) == {B}, "it is wanted there no more"
    assert claims.workers_of(ONE) == set()


def test_two_claims_of_a_model_on_one_worker_are_for_one_replica():
    claims = Claims()
    claims.put(ONE, None, Claim({A: 10, B: 10}, 0.0, 60.0))
    claims.put(ONE, N, Claim({A: 12}, 0.0, 60.0))
    assert claims.on(A) == {ONE: 12}
    assert claims.drop(ONE, N) == {A}
    assert claims.on(A) == {ONE: 10}, "the other one still stands"
    claims.put(ONE, N, Claim({A: 12}, 0.0, 60.0))
    assert claims.drop_at(ONE, {A}) == {A, B}, "the replica is there, for both"
    assert claims.on(A) == claims.on(B) == {}


def test_a_claim_ends_by_itself():
    claims = Claims()
    claims.put(ONE, N, Claim({A: 10}, 0.0, 60.0))
    claims.put(ONE, None, Claim({B: 10}, 0.0, 70.0))
    assert claims.drop_expired(59.9) == set()
    assert claims.drop_expired(60.0) == {A}
    assert claims.of(ONE, N) is None
    assert (claims.on(A), claims.on(B)) == ({}, {ONE: 10})
    assert claims.drop(ONE, N) == set()
    assert claims.drop_expired(70.0) == {B}


models, sites = st.sampled_from((ONE, TWO)), st.sampled_from((None, N, M))
workers = st.sets(st.sampled_from((A, B)), min_size=1)
steps = st.one_of(
    st.tuples(st.just("put"), models, sites, workers, st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.just("drop"), models, sites),
    st.tuples(st.just("keep"), models, st.sets(sites)),
    st.tuples(st.just("drop_at"), models, workers),
    st.tuples(st.just("drop_expired"), st.integers(1, 9)),
)


def played(claims: Claims, stands, name, values):
    """Do one step; return the workers it named and the plain table of claims behind it."""
    match name, values:
        case "put", (model, site, there, size, until):
            made = Claim(dict.fromkeys(there, size), 0.0, float(until))
            return claims.put(model, site, made), {**stands, (model, site): made}
        case "drop", (model, site):
            touched = claims.drop(model, site)
            return touched, without(stands, lambda key, _: key == (model, site))
        case "keep", (model, kept):
            touched = claims.keep(model, kept)
            return touched, without(stands, lambda key, _: key[0] == model and key[1] not in kept)
        case "drop_at", (model, there):
            touched = claims.drop_at(model, there)
            return touched, without(
                stands, lambda key, each: key[0] == model and there & {*each.bytes_by_worker}
            )
        case _, (now,):
            touched = claims.drop_expired(float(now))
            return touched, without(stands, lambda _, each: each.until_unix_s <= now)


def without(stands, goes):
    return {key: each for key, each in stands.items() if not goes(key, each)}


def claimed_on(stands, worker_id):
    found: dict[str, int] = {}
    for (model, _), claim in stands.items():
        if worker_id in claim.bytes_by_worker:
            found[model] = max(found.get(model, 0), claim.bytes_by_worker[worker_id])
    return found


@given(st.lists(steps, max_size=20))
def test_workers_say_what_stands_and_every_change_names_them(taken):
    claims, stands = Claims(), dict[Any, Claim]()
    for name, *values in taken:
        before = {each: dict(claims.on(each)) for each in (A, B)}
        touched, stands = played(claims, stands, name, values)
        for each in (A, B):
            assert claims.on(each) == claimed_on(stands, each)
            assert each in touched or claims.on(each) == before[each]
        ends = [claim.until_unix_s for claim in stands.values()]
        assert claims.earliest_end() == min(ends, default=None)
        for model in (ONE, TWO):
            assert [claims.of(model, site) for site in (None, N, M)] == [
                stands.get((model, site)) for site in (None, N, M)
            ]
