"""The migration bench's figures."""

from typing import Any

import pytest
from rich.console import Console

from bench.migrate.figures import (
    AUTO,
    KV,
    NONE,
    TOKENS,
    Gaps,
    Sample,
    Stayed,
    judge,
    summarize,
)
from bench.migrate.run import print_report


def sample(mode=TOKENS, *, prompt=128, duration_s=1.0, path="", **fields) -> Sample:
    values: dict[str, Any] = {
        "pause_s": 0.1, "step_s": 0.05, "reported_pause_s": 0.08, "rounds": 2, "moved_bytes": 0,
        "predicted_s": 0.0, "others": Gaps((0.05,), (0.06,)), "target": Gaps(),
    }  # fmt: skip
    taken = path or (TOKENS if mode == AUTO else mode)
    return Sample(
        mode=mode,
        prompt_tokens=prompt,
        round_index=0,
        path=taken,
        duration_s=duration_s,
        **(values | fields),
    )


def test_a_row_counts_pauses_in_the_steps_of_its_own_batch():
    samples = [sample(pause_s=0.1, step_s=0.05), sample(pause_s=0.3, step_s=0.1)]
    [row] = summarize(samples)
    assert (row.samples, row.pause_p50_s, row.pause_p99_s) == (2, 0.1, 0.3)
    assert (row.steps_p50, row.steps_p99) == pytest.approx((2.0, 3.0))
    assert row.prediction_error_p50 is None


def test_a_move_is_not_blamed_for_the_batch_s_growth():
    """On the target steps take 10 ms before and 13 behind: the request would cost that anywhere."""
    grown = Gaps((0.010,) * 99, (0.010,) * 9, (0.013,) * 4, (0.013,) * 50)
    [row] = summarize([sample(target=grown), sample(target=grown)])
    assert row.target is not None
    assert row.target.change == pytest.approx(0.0)
    assert row.target.raw_change == pytest.approx(0.3)
    assert (row.target.before_p50_s, row.target.after_p50_s) == (0.010, 0.013)


@pytest.mark.parametrize(
    ("moving_s", "joined_s", "born_s", "over_born"),
    [
        ((0.010,) * 9, (0.013,) * 4, (0.013,) * 200, 0.0),
        ((0.010,) * 9, (0.0156,) * 4, (0.013,) * 200, 0.2),
        ((0.010,) * 9, (0.0156,) * 4, (0.012,) * 2 + (0.013,) * 98, 0.2),
        # Hardly any of the move was in the larger batch: its times are the mixture's last 1 %.
        ((0.010,) * 999, (0.013,), (0.013,) * 200, 0.0),
        ((0.012,) * 999, (0.013,), (0.013,) * 200, 0.2),
    ],
)
def test_raw_times_on_the_target_are_compared_with_a_request_that_was_born_there(
    moving_s, joined_s, born_s, over_born
):
    moved = sample(KV, target=Gaps((0.010,) * 50, moving_s, joined_s, (0.013,) * 50))
    unmoved = sample(NONE, target=Gaps(born_s[::2], born_s[1::2]))
    by_kv, none = summarize([moved, unmoved])
    assert by_kv.target is not None
    assert by_kv.target.born_p50_s == pytest.approx(0.013)
    assert by_kv.target.control_change == pytest.approx(over_born)
    assert none.target is not None
    assert none.target.control_change is None
    assert by_kv.others.control_change is None


@pytest.mark.parametrize(
    "gaps",
    [
        Gaps((0.010,) * 99, (0.010,) * 9 + (0.016,), (0.013,) * 4, (0.013,) * 50),
        Gaps((0.010,) * 99, (0.010,) * 9, (0.013,) * 4 + (0.0208,), (0.013,) * 50),
    ],
)
def test_one_long_step_on_the_way_or_at_the_end_is_the_move_s(gaps):
    [row] = summarize([sample(target=gaps), sample(target=gaps)])
    assert row.target is not None
    assert row.target.change == pytest.approx(0.6)


def test_rounds_are_compared_each_in_its_own_medians():
    """A machine that is twice as slow in one round is no move's doing."""
    rounds = [Gaps((step,) * 99, (1.2 * step,) * 9) for step in (0.010, 0.020)]
    [row] = summarize([sample(others=each) for each in rounds])
    assert row.others.change == pytest.approx(0.2)


def test_those_on_the_target_are_compared_only_if_there_were_any():
    assert summarize([sample()])[0].target is None
    assert summarize([sample()])[0].others.change == pytest.approx(0.2)


def test_a_prediction_is_held_against_the_time_of_the_path_taken():
    [row] = summarize([sample(KV, predicted_s=0.9, duration_s=1.0)])
    assert row.prediction_error_p50 == pytest.approx(0.1)


def test_a_choice_is_right_when_its_path_was_faster_on_the_median():
    samples = [
        *(sample(TOKENS, duration_s=s) for s in (1.0, 2.0, 9.0)),
        *(sample(KV, duration_s=s) for s in (3.0, 1.5, 1.0)),
        sample(AUTO, path=KV),
        sample(AUTO, path=TOKENS),
        sample(AUTO, path=KV),
        sample(TOKENS, prompt=1024),
        sample(AUTO, prompt=1024),
    ]
    [choices] = judge(samples)
    assert (choices.prompt_tokens, choices.faster) == (128, KV)
    assert (choices.right, choices.made) == (2, 3)
    assert choices.slower_by == pytest.approx(2.0 / 1.5 - 1)


@pytest.mark.parametrize(
    ("path", "own_s", "other_s", "right", "made"),
    [
        (KV, 1.0, 2.0, 1, 1),
        (KV, 2.0, 1.0, 0, 1),
        (TOKENS, 2.0, 1.0, 1, 1),
        (TOKENS, 1.0, 0.0, 0, 0),
    ],
)
def test_of_a_path_that_was_asked_for_the_predictions_are_the_choice(
    path, own_s, other_s, right, made
):
    asked = sample(path, duration_s=1.0, predicted_s=own_s, predicted_other_s=other_s)
    others = [sample(KV, duration_s=1.0), sample(TOKENS, duration_s=5.0), sample(AUTO, path=KV)]
    [choices] = judge([asked, *others, others[0], others[1]])
    assert (choices.right, choices.made) == (1 + right, 1 + made)


def test_a_path_by_which_nothing_moves_is_the_slower_one():
    samples = [sample(KV, duration_s=9.0), sample(AUTO, path=TOKENS), sample(AUTO, path=KV)]
    [choices] = judge(samples, [Stayed(TOKENS, 128, 0, "it took too long")])
    assert (choices.faster, choices.right, choices.made) == (KV, 1, 2)
    assert judge(samples) == []


def test_every_row_and_choice_is_printed():
    samples = [sample(TOKENS), sample(KV, moved_bytes=3 << 20, predicted_s=0.5), sample(AUTO)]
    console = Console(record=True, width=100)
    samples.append(sample(NONE, target=Gaps((0.1,), (0.13,))))
    stayed = [Stayed(TOKENS, 4096, 0, "it took too long")]
    print_report(summarize(samples), judge(samples), stayed, console)
    text = console.export_text()
    for mode in (TOKENS, KV, AUTO, NONE):
        assert text.count(f" {mode} ") >= 3
    assert "+30%" in text
    assert "3.0" in text
    assert "50%" in text
    assert "1 times of" in text
    assert "right in all: 100% of 1" in text
    assert "prompt of 4096 by tokens stayed: it took too long" in text
