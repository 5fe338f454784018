"""What clients see of a cascade's answer in each stream mode, at both doors."""

import itertools
import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gearfall.client import AsyncClient, Replaced, TextDelta
from gearfall.client.request import Options
from gearfall.core.errors import Internal, InvalidRequest
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.streaming import Streaming, StreamMode
from services.router.generation import (
    ChoiceEnd,
    Delta,
    GenerationRequest,
    Replace,
    TextPrompt,
)
from services.router.text.token_bytes import byte_level_alphabet
from tests.services.router.char_models import BOS, EOS
from tests.services.router.rig import Answer, Outcome, Rig, running_rig

UNSURE_END = (-0.01, -0.01, -0.01, -0.01, -0.01, -9.0)
"""Only the token that ends "wrong" says that it is: nothing of it can be stopped early."""


def byte_files() -> dict[str, bytes]:
    """A tokenizer with one token for each byte: a character has up to four of them."""
    vocabulary = {BOS: 0, EOS: 1}
    vocabulary |= {letter: 2 + byte for letter, byte in byte_level_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = {"bos_token": BOS, "eos_token": EOS}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def byte_ids(text: str) -> tuple[int, ...]:
    return tuple(2 + byte for byte in text.encode())


def shown(outcome: Outcome) -> list[object]:
    """Texts and replaces in order."""
    return [
        each.text if isinstance(each, Delta) else each
        for each in outcome.events
        if isinstance(each, (Delta, Replace))
    ]


async def test_a_draft_is_shown_and_replaced(rig):
    rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=StreamMode.DRAFT)
    assert shown(outcome) == [*"wrong", Replace(0, "small", "large", 5, 0), *"right"]
    assert outcome.text() == "right"
    small, large = outcome.ends[0].stages
    assert (small.stopped_early, small.completion_tokens) == (False, 6)
    assert large.is_accepted
    decisions = [each.decision for each in _events_of_last(rig)]
    assert decisions.count("replaced") == 1


async def test_a_certain_draft_stays(rig):
    rig.worker(small=Answer("sure", logprob=-0.01))
    outcome = await rig.ask("both", stream_mode=StreamMode.DRAFT)
    assert shown(outcome) == [*"sure"]
    assert outcome.ends[0].model == "small"


async def test_a_draft_stays_while_the_next_model_is_silent(rig):
    worker = rig.worker(small=Answer("wrong", logprobs=UNSURE_END))
    running = await rig.router.service.start(_request("both", StreamMode.DRAFT))
    batches, text = running.batches(), ""
    while len(worker.jobs) == 0 or text != "wrong":
        text += "".join(each.text for each in await anext(batches) if isinstance(each, Delta))
    upper = rig.worker("worker-b", large=Answer("right"))
    events = [event async for batch in batches for event in batch]
    assert isinstance(events[0], Replace)
    assert len(upper.jobs) == 1


@pytest.mark.parametrize(
    ("mode", "is_whole", "gathers"),
    [
        (StreamMode.BUFFER, False, [True, False]),
        (StreamMode.BUFFER, True, [True, True]),
        (StreamMode.DRAFT, False, [False, False]),
        (StreamMode.EARLY, False, [False, False]),
        (StreamMode.DRAFT, True, [True, True]),
    ],
)
async def test_tokens_are_gathered_where_nobody_sees_them_yet(rig, mode, is_whole, gathers):
    worker = rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=mode, is_whole=is_whole)
    assert outcome.text() == "right"
    assert [job.gather_s > 0 for job in worker.jobs] == gathers


async def test_every_choice_has_its_own_replaces(rig):
    rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=StreamMode.DRAFT, n=3)
    assert [outcome.text(choice) for choice in range(3)] == ["right"] * 3
    replaces = [each for each in outcome.events if isinstance(each, Replace)]
    assert sorted(each.choice for each in replaces) == [0, 1, 2]


@pytest.mark.parametrize("is_certain", [True, False])
@pytest.mark.parametrize("mode", StreamMode)
async def test_the_text_is_that_of_an_answer_given_whole(mode, is_certain):
    """Characters of several tokens, stop strings across them, log-probabilities in their places."""
    draft = byte_ids("größer als ☃日本? nein ßo")
    end = -0.001 if is_certain else -9.0
    small = Answer(token_ids=draft, logprob=end, logprobs=(-0.001,) * 20)
    async with running_rig() as rig:
        rig.files.files = byte_files()
        await rig.add_model("small")
        await rig.add_model("large")
        await rig.deploy("both", ("small", 0.5), ("large", None))
        rig.worker(small=small, large=Answer(token_ids=byte_ids("kleiner, ☃本 wie 😀 ß.")))
        # Its beginning is certain, whatever comes of the end: `early` decides on that.
        answers = "small" if is_certain or mode is StreamMode.EARLY else "large"
        for stop, logprobs in itertools.product([(), ("☃本",), ("ß.", "ßo")], [False, True]):
            streamed = await rig.ask("both", stream_mode=mode, stop=stop, logprobs=logprobs)
            whole = await rig.ask(answers, stop=stop, logprobs=logprobs)
            assert streamed.text() == whole.text()
            assert _tokens(streamed) == _tokens(whole)
            assert bool(_tokens(whole)) == logprobs
            assert streamed.ends[0].finish == whole.ends[0].finish
            assert streamed.ends[0].model == answers


async def test_a_certain_beginning_streams_before_the_answer_is_whole(rig):
    worker = rig.worker(small=Answer("wrong", logprobs=UNSURE_END))
    worker.hold_at = 3
    running = await rig.router.service.start(_request("both", StreamMode.EARLY, hold_tokens=3))
    batches = running.batches()
    first = await anext(batches)
    assert "".join(each.text for each in first) == "wro"
    worker.gate.set()
    rest = [event async for batch in batches for event in batch]
    assert "".join(each.text for each in rest if isinstance(each, Delta)) == "ng"
    end = rest[-1]
    assert isinstance(end, ChoiceEnd)
    (report,) = end.stages
    assert report.is_accepted
    assert 0.0 < (report.certainty or 0.0) < 0.5, "what was released is never taken back"


async def test_an_uncertain_beginning_stops_the_job_at_once(rig):
    worker = rig.worker(small=Answer("wrong", logprobs=(-0.3, -0.3, -0.3)))
    worker.hold_at = 3
    rig.worker("worker-b", large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=StreamMode.EARLY, hold_tokens=3, max_tokens=50)
    assert shown(outcome) == [*"right"]
    assert [stop.job_id for stop in worker.stops] == [worker.jobs[0].job_id]
    report = outcome.ends[0].stages[0]
    assert (report.stopped_early, report.completion_tokens, report.spared_tokens) == (True, 3, 47)


@pytest.mark.parametrize("mode", [StreamMode.BUFFER, StreamMode.DRAFT])
async def test_a_hopeless_draft_is_stopped(rig, mode):
    worker = rig.worker(small=Answer("wrong", logprobs=(-0.1, -9.0)))
    worker.hold_at = 2
    rig.worker("worker-b", large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=mode, max_tokens=20)
    assert outcome.text() == "right"
    assert [stop.job_id for stop in worker.stops] == [worker.jobs[0].job_id]
    report = outcome.ends[0].stages[0]
    assert (report.stopped_early, report.completion_tokens, report.spared_tokens) == (True, 2, 18)
    assert 0.0 < (report.certainty or 0.0) < 0.5
    # The piece that came with the hopeless token was not shown any more.
    draft = ["w", Replace(0, "small", "large", 1, 0)] if mode is StreamMode.DRAFT else []
    assert shown(outcome) == [*draft, *"right"]


async def test_drafts_are_finished_where_the_deployment_wants_them(rig):
    streaming = Streaming(finishes_drafts=True)
    await rig.deploy("verifying", ("small", 0.5), ("large", None), streaming=streaming)
    rig.worker(small=Answer("wrong", logprobs=(-9.0,)), large=Answer("right"))
    outcome = await rig.ask("verifying")
    report = outcome.ends[0].stages[0]
    assert (report.stopped_early, report.completion_tokens) == (False, 6)
    assert outcome.text() == "right"


async def test_the_deployments_mode_holds_for_requests_that_name_none(rig):
    streaming = Streaming(StreamMode.DRAFT)
    await rig.deploy("drafting", ("small", 0.5), ("large", None), streaming=streaming)
    rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    assert Replace(0, "small", "large", 5, 0) in (await rig.ask("drafting")).events
    plain = await rig.ask("drafting", stream_mode=StreamMode.BUFFER)
    assert shown(plain) == [*"right"]


async def test_a_worker_that_dies_in_the_middle_of_a_draft_repeats_nothing(rig):
    worker = rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    worker.die_at = {3: 1}
    outcome = await rig.ask("both", stream_mode=StreamMode.DRAFT)
    dead_twice = [Replace(0, "small", "large", 5, 0)]
    assert [each for each in shown(outcome) if each in dead_twice] == dead_twice
    assert outcome.text() == "right"


async def test_a_worker_that_dies_behind_a_beginning_changes_nothing(rig):
    worker = rig.worker(small=Answer("wrong", logprobs=UNSURE_END))
    worker.die_at = {2: 1, 4: 1}
    outcome = await rig.ask("both", stream_mode=StreamMode.EARLY, hold_tokens=3)
    assert outcome.text() == "wrong"
    (report,) = outcome.ends[0].stages
    assert (report.epochs, report.completion_tokens) == (3, 6)


async def test_an_engine_that_fails_behind_a_beginning_fails_the_request(rig):
    broken = Answer("wrong", finish=FinishReason.ERROR, error="engine says no", logprob=-0.01)
    rig.worker(small=broken, large=Answer("right"))
    with pytest.raises(Internal, match="engine says no"):
        await rig.ask("both", stream_mode=StreamMode.EARLY, hold_tokens=3)


async def test_a_draft_whose_engine_fails_is_replaced(rig):
    broken = Answer("wr", finish=FinishReason.ERROR, error="engine says no", logprob=-0.01)
    rig.worker(small=broken, large=Answer("right"))
    outcome = await rig.ask("both", stream_mode=StreamMode.DRAFT)
    assert shown(outcome) == ["w", "r", Replace(0, "small", "large", 2, 0), *"right"]


async def test_metrics_count_replaced_drafts_and_early_stops(rig, http):
    rig.worker(small=Answer("wrong", logprobs=(-0.1, -9.0)), large=Answer("right"))
    await rig.ask("both", stream_mode=StreamMode.DRAFT, max_tokens=20)
    lines = (await http.get("/metrics")).text.splitlines()
    labels = '{model="both",stage="small"}'
    assert f"gearfall_drafts_replaced_total{labels} 1.0" in lines
    assert f"gearfall_early_stops_total{labels} 1.0" in lines
    (spared,) = (line for line in lines if line.startswith("gearfall_spared_tokens_total{"))
    assert float(spared.split()[-1]) > 0


@pytest.mark.parametrize("is_chat", [True, False])
async def test_the_official_client_takes_a_draft_and_its_replacement(rig, client, is_chat):
    rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    ask = {"model": "both", "stream": True, "extra_body": {"stream_mode": "draft"}}
    if is_chat:
        messages = [{"role": "user", "content": "hi"}]
        stream = await client.chat.completions.create(messages=messages, logprobs=True, **ask)
    else:
        stream = await client.completions.create(prompt="hi", logprobs=1, **ask)
    text, replaces = "", []
    tokens: list[Any] = []
    async for chunk in stream:
        said = (chunk.model_extra or {}).get("gearfall", {})
        if "replace" in said:
            replaces.append(said["replace"])
            assert (len(text), len(tokens)) == (5, 5)
            text, tokens = "", []
        (choice,) = chunk.choices
        text += (choice.delta.content if is_chat else choice.text) or ""
        if choice.logprobs:
            tokens += choice.logprobs.content or [] if is_chat else choice.logprobs.tokens
    assert text == "right"
    assert [token.token if is_chat else token for token in tokens] == list("right")
    assert replaces == [
        {"index": 0, "model": "small", "next_model": "large", "characters": 5, "logprobs": 5}
    ]
    assert said["stages"][0]["stopped_early"] is False


@pytest.mark.parametrize("mode", ["buffer", "early", "draft"])
async def test_the_official_client_gets_the_same_whole_answer(rig, client, mode):
    rig.worker(small=Answer("wrong", logprob=-0.3), large=Answer("right"))
    answer = await client.chat.completions.create(
        model="both",
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"stream_mode": mode} | ({"hold_tokens": 2} if mode == "early" else {}),
    )
    assert answer.choices[0].message.content == ("wrong" if mode == "early" else "right")


async def test_the_python_client_gets_replaced_events_and_folds_them(rig):
    rig.worker(small=Answer("wrong", logprobs=UNSURE_END), large=Answer("right"))
    async with AsyncClient(rig.router.grpc_address) as client:
        ask: Options = {"stream_mode": StreamMode.DRAFT, "logprobs": True}
        events = [event async for event in client.stream("both", "hi", **ask)]
        answer = await client.generate("both", "hi", **ask)
    at = next(i for i, each in enumerate(events) if isinstance(each, Replaced))
    assert events[at] == Replaced(0, "small", "large", 5, 5)
    behind = [each.text for each in events[at:] if isinstance(each, TextDelta)]
    assert "".join(behind) == answer.text == "right"
    assert [each.token for each in answer.choices[0].logprobs] == list("right")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"stream_mode": "eager"}, "stream_mode", "buffer, early, draft"),
        ({"stream_mode": 3}, "stream_mode", "Expected `str | null`"),
        ({"stream_mode": "early", "hold_tokens": 0}, "hold_tokens", "between 1 and 4096"),
        ({"stream_mode": "early", "hold_tokens": 4097}, "hold_tokens", "between 1 and 4096"),
        ({"stream_mode": "early", "hold_tokens": 1.5}, "hold_tokens", "Expected `int | null`"),
        ({"hold_tokens": 4}, "hold_tokens", "no effect with stream_mode buffer"),
        ({"stream_mode": "draft", "hold_tokens": 4}, "hold_tokens", "no effect"),
    ],
)
async def test_bad_modes_are_refused(rig, http, fields, param, says):
    body = {"model": "both", "messages": [{"role": "user", "content": "hi"}], **fields}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert says in reply.json()["error"]["message"]
    assert rig.router.service.running_requests == 0


async def test_bad_modes_are_refused_by_the_other_door(rig):
    async with AsyncClient(rig.router.grpc_address) as client:
        with pytest.raises(InvalidRequest, match="'eager' is not a valid StreamMode"):
            await client.generate("both", "hi", stream_mode="eager")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="between 1 and 4096"):
            await client.generate("both", "hi", stream_mode=StreamMode.EARLY, hold_tokens=0)


def _request(model, mode, **fields):
    return GenerationRequest(model, (TextPrompt("hi"),), stream_mode=mode, **fields)


def _tokens(outcome: Outcome) -> list[object]:
    return [token for each in outcome.deltas() for token in each.logprobs]


def _events_of_last(rig: Rig):
    request_id = next(reversed(rig.router.service.request_log._events))
    return rig.router.service.request_log.events(request_id)
