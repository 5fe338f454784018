from hypothesis import given
from hypothesis import strategies as st

from services.worker.replicas.restarts import LONGEST_DELAY_S, restart_delay_s


def test_the_first_restart_comes_at_once_then_the_pause_doubles():
    assert [restart_delay_s(n) for n in range(6)] == [0.0, 0.0, 0.25, 0.5, 1.0, 2.0]


@given(st.integers(0, 10_000))
def test_the_pause_grows_and_is_bounded(failures):
    assert restart_delay_s(failures) <= restart_delay_s(failures + 1) <= LONGEST_DELAY_S
