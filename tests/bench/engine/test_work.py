"""The generation bench's requests."""

import pytest

from bench.engine.work import groups_by_length, make_work


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_work_is_the_same_each_time_and_within_its_range(batch):
    work = make_work(batch, 100, 32, 256)
    assert work == make_work(batch, 100, 32, 256)
    assert len(work.requests) == max(batch, 2)
    for request in work.requests:
        assert 32 <= len(request.prompt) <= 256
        assert 32 <= request.answer_tokens <= 256
        assert all(3 <= token < 100 for token in request.prompt)


def test_lengths_are_mixed_and_prompts_and_answers_differ_in_order():
    work = make_work(32, 100, 32, 256)
    prompts = [len(request.prompt) for request in work.requests]
    answers = [request.answer_tokens for request in work.requests]
    assert sorted(prompts) == sorted(answers)
    assert len(set(prompts)) == 32
    assert prompts != answers
    assert work.prompt_tokens == work.answer_tokens == sum(answers)
    assert abs(work.answer_tokens / 32 - 144) < 1


def test_groups_hold_everyone_once_with_alike_lengths():
    work = make_work(8, 100, 32, 256)
    groups = groups_by_length(work, 3)
    assert [len(group) for group in groups] == [3, 3, 2]
    assert sorted(place for group in groups for place in group) == list(range(8))
    ends = [max(work.requests[place].answer_tokens for place in group) for group in groups]
    starts = [min(work.requests[place].answer_tokens for place in group) for group in groups]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
