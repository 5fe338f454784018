from hypothesis import given
from hypothesis import strategies as st

from services.worker.jobs.share_credit import MOST_CREDIT, ShareCredit


def test_it_earns_its_share_of_what_comes_and_pays_for_what_it_takes():
    credit = ShareCredit()
    credit.note_arrivals(100, 0.25)
    assert (credit.credit, credit.is_ahead, credit.most_jobs) == (0.0, False, 1)
    credit.note_arrivals(110, 0.25)
    assert (credit.credit, credit.most_jobs) == (2.5, 3)
    credit.note_taken(3)
    seen = [credit.is_ahead]  # by half a job, which is no lead
    credit.note_taken(1)
    seen.append(credit.is_ahead)
    credit.note_arrivals(112, 0.25)
    seen.append(credit.is_ahead)
    assert seen == [False, True, False]


def test_a_queue_that_lost_its_data_costs_nothing():
    credit = ShareCredit()
    credit.note_arrivals(1000, 0.5)
    credit.note_arrivals(3, 0.5)
    credit.note_arrivals(5, 0.5)
    assert credit.credit == 1.0


def test_what_was_forgotten_is_not_made_up_for():
    credit = ShareCredit()
    credit.note_arrivals(10, 0.5)
    credit.note_taken(9)
    credit.forget()
    credit.note_arrivals(500, 0.5)
    assert (credit.credit, credit.is_ahead) == (0.0, False)


@given(st.lists(st.one_of(st.integers(0, 10**6), st.integers(-100, -1)), max_size=50))
def test_whatever_comes_it_stays_in_bounds_and_may_take_one(events):
    """Numbers are counts of arrivals, negative ones jobs that it took."""
    credit = ShareCredit()
    for event in events:
        if event < 0:
            credit.note_taken(-event)
        else:
            credit.note_arrivals(event, 0.3)
        assert -MOST_CREDIT <= credit.credit <= MOST_CREDIT
        assert 1 <= credit.most_jobs <= MOST_CREDIT
        assert not credit.is_ahead or credit.most_jobs == 1


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), st.integers(20, 200))
def test_workers_that_look_after_every_job_never_drift_from_their_shares(weights, jobs):
    """One job at a time, taken by whoever is furthest behind."""
    shares = [each / sum(weights) for each in weights]
    known, taken = [ShareCredit() for _ in shares], [0] * len(shares)
    for each in known:
        each.note_arrivals(0, 0.0)
    for number in range(1, jobs + 1):
        for each, share in zip(known, shares, strict=True):
            each.note_arrivals(number, share)
        first = max(range(len(shares)), key=lambda at: known[at].credit)
        assert not known[first].is_ahead
        known[first].note_taken(1)
        taken[first] += 1
    for count, share in zip(taken, shares, strict=True):
        assert abs(count - share * jobs) <= len(shares)
