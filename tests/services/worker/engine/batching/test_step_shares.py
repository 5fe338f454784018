"""A step's tokens: never too many, all used while somebody wants them, the oldest never starved."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.feedback_levels import enter
from services.worker.engine.batching.sequence import Sequence, Stance
from services.worker.engine.batching.step_shares import share_out


def sequence(number, arrival):
    standing = enter(1, is_batch=False, arrival=arrival, now_s=0.0)
    sampling = SamplingParams(max_tokens=1)
    return Sequence(JobId(str(number)), Epoch(1), [1] * 99, 99, sampling, standing=standing)


@given(
    counts=st.lists(st.integers(0, 60), max_size=9),
    step_tokens=st.integers(1, 40),
    data=st.data(),
)
def test_shares(counts, step_tokens, data):
    arrivals = data.draw(st.permutations(range(len(counts))))
    running = [
        (sequence(number, arrival), count)
        for number, (count, arrival) in enumerate(zip(counts, arrivals, strict=True))
    ]
    chunks = share_out(running, step_tokens, 0)
    shares = {chunk.sequence.job_id: chunk.count for chunk in chunks}
    assert len(shares) == len(chunks)
    assert sum(shares.values()) == min(step_tokens, sum(counts))
    assert all(0 < shares[one.job_id] <= count for one, count in running if one.job_id in shares)
    prefilling = [(one, count) for one, count in running if count > 1]
    room = step_tokens - sum(count == 1 for count in counts)
    if prefilling and room > 0:
        oldest, wanted = min(prefilling, key=lambda entry: entry[0].standing.arrival)
        assert shares[oldest.job_id] >= min(wanted, -(-room // 4))


def test_held_sequences_get_no_more_than_their_share_and_nobody_pays_for_them():
    held, late, free = sequence(0, 0), sequence(1, 1), sequence(2, 2)
    held.stance = late.stance = Stance.HELD
    running = [(held, 5), (late, 30), (free, 1)]

    def shares(held_tokens, step_tokens=40):
        chunks = share_out(running, step_tokens, held_tokens)
        return {chunk.sequence.job_id: chunk.count for chunk in chunks}

    assert shares(3) == {"0": 3, "2": 1}
    assert shares(8) == {"0": 5, "1": 3, "2": 1}
    assert shares(99) == {"0": 5, "1": 30, "2": 1}
    assert shares(0) == {"2": 1}


def test_who_decodes_gets_its_token_first_and_its_guess_behind_prefills():
    guessing, prefilling, decoding = sequence(0, 2), sequence(1, 1), sequence(2, 0)
    guessing.computed = 98
    running = [(guessing, 12), (prefilling, 30), (decoding, 1)]

    def shares(step_tokens):
        chunks = share_out(running, step_tokens, 0)
        return [(chunk.sequence.job_id, chunk.start, chunk.count) for chunk in chunks]

    assert shares(43) == [("0", 98, 12), ("2", 0, 1), ("1", 0, 30)]
    assert shares(36) == [("0", 98, 5), ("2", 0, 1), ("1", 0, 30)]
    assert shares(14) == [("0", 98, 1), ("2", 0, 1), ("1", 0, 12)]
    assert shares(2) == [("0", 98, 1), ("2", 0, 1)]
    assert shares(1) == [("0", 98, 1)]
