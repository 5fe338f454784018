from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.claims import Claim, Claims

ONE, TWO = ModelName("one"), ModelName("two")
A, B = WorkerId("a"), WorkerId("b")


def test_a_model_has_one_claim_and_a_worker_may_have_several():
    claims = Claims()
    assert claims.put(ONE, Claim({A: 10}, 0.0, 60.0)) == {A}
    assert claims.put(TWO, Claim({A: 20, B: 20}, 0.0, 50.0)) == {A, B}
    assert claims.on(A) == {ONE: 10, TWO: 20}
    assert claims.put(ONE, Claim({B: 10}, 1.0, 61.0)) == {A, B}, "both rows change"
    assert (claims.on(A), claims.on(B)) == ({TWO: 20}, {TWO: 20, ONE: 10})
    assert claims.earliest_end() == 50.0


def test_a_claim_ends_by_itself():
    claims = Claims()
    claims.put(ONE, Claim({A: 10}, 0.0, 60.0))
    assert claims.drop_expired(59.9) == set()
    assert claims.drop_expired(60.0) == {A}
    assert claims.of(ONE) is None
    assert claims.on(A) == {}
    assert claims.drop(ONE) == set()
