"""AUROC against scikit-learn, and the choice of a measure by it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gearfall.core.certainty import MEASURES
from gearfall.demo.certainty import auroc, best_measure


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_auroc_agrees_with_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], dtype=np.float64)
    positive = np.array([label for _, label in rows])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="at least one"):
            auroc(scores, positive)
    else:
        assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_the_preferred_measure_wins_unless_another_is_clearly_better() -> None:
    equal = dict.fromkeys(MEASURES, 0.9)
    assert best_measure([equal]) == "sequence_probability"
    assert best_measure([equal | {"min_margin": 0.904}]) == "sequence_probability"
    assert best_measure([equal | {"min_margin": 0.92}, equal]) == "min_margin"
