from hypothesis import given
from hypothesis import strategies as st

from gearfall.scheduling.fleet.claims import Claim
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.placement_search import Search, may_be_free
from tests.gearfall.scheduling.clusters import assignment
from tests.gearfall.scheduling.small_world import POLICY
from tests.gearfall.scheduling.test_small_world import MODELS, SOME, WORKERS, clusters


@SOME
@given(
    clusters(),
    st.sets(st.tuples(st.sampled_from(MODELS), st.sampled_from(WORKERS)), max_size=8),
    st.sets(st.tuples(st.sampled_from(MODELS), st.sampled_from(WORKERS)), max_size=3),
)
def test_the_look_before_the_search_misses_nothing(records, held, claimed):
    fleet = Fleet()
    for kind, record in records:
        fleet.put(kind, record)
    for name, worker_id in held:
        fleet.put("assignments", assignment(name, worker_id))
    for name, worker_id in claimed:
        size_bytes = fleet.needed_bytes(fleet.records.models[name], 2, 1)
        fleet.claims.put(name, None, Claim({worker_id: size_bytes}, 1.0, 60.0))
    fleet.refresh(POLICY, 1.0)
    for name in MODELS:
        want = Want(fleet.records.models[name], Urgency.KEEP, 1.0, rules=fleet.rules_of(name))
        if Search(fleet, want).free():
            assert may_be_free(fleet, want)
