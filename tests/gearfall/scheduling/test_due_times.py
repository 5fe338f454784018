from hypothesis import given
from hypothesis import strategies as st

from gearfall.scheduling.due_times import DueTimes

changes = st.lists(
    st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 20).map(float)), max_size=400
)


@given(changes, st.integers(0, 20).map(float))
def test_the_earliest_of_the_last_times_set_comes_first(sequence, now):
    times: DueTimes[str] = DueTimes()
    expected: dict[str, float] = {}
    for subject, at in sequence:
        times.put(subject, at)
        expected.pop(subject, None)
        if at is not None:
            expected[subject] = at
        assert times.earliest() == min(expected.values(), default=None)
    assert times.as_dict() == expected
    due = {subject for subject, at in expected.items() if at <= now}
    assert times.take(now) == due
    assert times.as_dict() == {s: at for s, at in expected.items() if s not in due}
