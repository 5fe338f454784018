"""Summaries of logits: right against float64, the same bits on every path, no bad pointer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.infra.kernels import cpu_kernels
from gearfall.infra.kernels.cpu_logits import summarize

VARIANTS = cpu_kernels.variants()
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 2047, 2048, 2049, 5000])


def rows_of(seed, rows, length, *, step=0.25):
    """Rows with many equal values, so that there are ties."""
    drawn = np.random.default_rng(seed).standard_normal((rows, length), dtype=np.float32)
    return np.round(drawn * 6 / step) * np.float32(step)


def ones(rows):
    return np.ones(rows, dtype=np.float32)


def bits(summaries):
    return [
        getattr(summaries, name).tobytes()
        for name in ("best", "largest", "second", "total", "sharpened_total")
    ]


@given(
    st.integers(0, 2**32 - 1), LENGTHS, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from(VARIANTS)
)
def test_summaries_are_those_of_float64(seed, length, sharpness, variant):
    logits = rows_of(seed, 3, length)
    found = summarize(logits, ones(3) * np.float32(sharpness), variant=variant)
    wide = logits.astype(np.float64)
    below = wide - wide.max(axis=1, keepdims=True)
    assert found.best.tolist() == logits.argmax(axis=1).tolist()
    assert found.largest.tolist() == logits.max(axis=1).tolist()
    others = np.where(np.arange(length) == found.best[:, None], -np.inf, wide)
    assert found.second.tolist() == others.max(axis=1).tolist()
    np.testing.assert_allclose(found.total, np.exp(below).sum(axis=1), rtol=3e-6)
    np.testing.assert_allclose(
        found.sharpened_total, np.exp(below * sharpness).sum(axis=1), rtol=3e-6
    )


@given(st.integers(0, 2**32 - 1), LENGTHS)
def test_a_rows_summary_has_the_same_bits_everywhere(seed, length):
    logits = rows_of(seed, 4, length, step=1e-4)
    sharpness = np.array([1.0, 1.25, 0.5, 2.0], dtype=np.float32)
    together = summarize(logits, sharpness)
    for variant in VARIANTS:
        assert bits(summarize(logits, sharpness, variant=variant)) == bits(together)
    assert bits(summarize(logits, sharpness, threads=3)) == bits(together)
    shifted = np.empty((4, length + 3), dtype=np.float32)[:, 3:]
    shifted[:] = logits
    assert bits(summarize(shifted, sharpness)) == bits(together)
    for row in range(4):
        alone = summarize(logits[row : row + 1], sharpness[row : row + 1])
        assert bits(alone) == [
            part[row : row + 1].tobytes()
            for part in (
                together.best,
                together.largest,
                together.second,
                together.total,
                together.sharpened_total,
            )
        ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 17, 2050, 2999])
def test_rows_that_are_not_numbers_have_no_best(variant, bad, place):
    logits = rows_of(1, 3, 3000)
    logits[1, place] = bad
    found = summarize(logits, ones(3), variant=variant)
    assert (found.best < 0).tolist() == [False, True, False]
    assert (found.largest[1], found.total[1]) == (1.0, 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_minus_infinity_is_a_number_but_not_for_all(variant):
    logits = np.full((2, 40), -np.inf, dtype=np.float32)
    logits[0, 39] = -3.0
    found = summarize(logits, ones(2), variant=variant)
    assert found.best.tolist() == [39, -1]
    assert (found.second[0], found.total[0]) == (-np.inf, 1.0)


@pytest.mark.parametrize(
    ("logits", "sharpness", "threads"),
    [
        (np.zeros((2, 0), np.float32), ones(2), 1),
        (np.zeros((2, 3), np.float32), ones(1), 1),
        (np.zeros((2, 3), np.float32), ones(2).astype(np.float64), 1),
        (np.zeros((2, 3), np.float64), ones(2), 1),
        (np.zeros((2, 6), np.float32)[:, ::2], ones(2), 1),
        (np.zeros(3, np.float32), ones(3), 1),
        (np.zeros((2, 3), np.float32), ones(2), 0),
    ],
)
def test_other_shapes_are_refused(logits, sharpness, threads):
    with pytest.raises(ValueError, match=r"wanted|must"):
        summarize(logits, sharpness, threads=threads)


def test_no_rows_have_no_summaries():
    assert summarize(np.zeros((0, 5), np.float32), ones(0)).best.shape == (0,)
