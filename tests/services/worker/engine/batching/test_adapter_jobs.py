"""Adapters of one engine: attached, refused, dropped no earlier than their last job."""

from collections.abc import Sequence
from contextlib import ExitStack
from os import dup

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.adapter_jobs import AdapterJobs
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine.model.ops import NativeOps
from services.worker.engine.starting.dock import AdapterDock
from services.worker.engine_link.messages import (
    AdapterReport,
    AttachAdapter,
    CancelJob,
    DropAdapter,
    SubmitJob,
)
from tests.services.worker.counting_model import CountingModel
from tests.services.worker.engine.model.test_adapters import Bench
from tests.services.worker.tiny_adapters import TinyAdapter, merge

TOKENS = 10


class ScriptedHost:
    """An AdapterHost that refuses what is called bad."""

    def __init__(self) -> None:
        self.attached: list[str] = []

    def attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        if message.name == "bad":
            raise CorruptCheckpoint("it is bad")
        if message.adapter not in self.attached:
            self.attached.append(message.adapter)

    def drop(self, adapter: str) -> None:
        self.attached.remove(adapter)


def attach(adapter: str, name: str = "good") -> AttachAdapter:
    return AttachAdapter(adapter=adapter, name=name, manifest_json=b"", config_json=b"")


def submit(job: str, adapter: str, prompt: Sequence[int] = (1, 2), tokens: int = 3) -> SubmitJob:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return SubmitJob(JobId(job), Epoch(1), tuple(prompt), (), sampling, adapter=adapter)


@pytest.fixture
def host() -> ScriptedHost:
    return ScriptedHost()


@pytest.fixture
def engine(host: ScriptedHost) -> Engine:
    batch = Batch(KvBlocks(8), slots=4, step_tokens=16)
    return Engine(CountingModel(8), batch, context_tokens=64, adapters=host)


def test_a_job_before_its_adapter_ends_with_an_error(engine: Engine):
    engine.submit(submit("a", "d1"))
    (run,) = engine.step().runs
    assert (run.finish, "not attached" in run.error) == (FinishReason.ERROR, True)


def test_a_failed_adapter_says_why_to_the_worker_and_to_its_jobs(engine: Engine):
    engine.attach(attach("d1", "bad"), ())
    engine.submit(submit("a", "d1"))
    engine.submit(submit("b", ""))
    assert not engine.is_idle
    step = engine.step()
    assert step.adapters == (AdapterReport("d1", "adapter 'bad' can't be used: it is bad"),)
    by_job = {run.job_id: run for run in step.runs}
    assert by_job[JobId("a")].error == step.adapters[0].error
    assert by_job[JobId("b")].finish is None
    engine.attach(attach("d1"), ())
    assert engine.step().adapters == (AdapterReport("d1"),)


def test_an_adapter_is_dropped_when_its_last_job_has_ended(engine: Engine, host: ScriptedHost):
    engine.attach(attach("d1"), ())
    engine.submit(submit("a", "d1"))
    engine.submit(submit("b", "d1", tokens=5))
    engine.step()
    engine.drop(DropAdapter("d1"))
    assert host.attached == ["d1"]
    while not engine.is_idle:
        engine.step()
        engine.check()
    assert host.attached == []


def test_a_cancelled_job_lets_its_adapter_go(engine: Engine, host: ScriptedHost):
    engine.attach(attach("d1"), ())
    engine.submit(submit("a", "d1"))
    engine.step()
    engine.drop(DropAdapter("d1"))
    engine.cancel(CancelJob(JobId("a"), Epoch(1)))
    assert host.attached == []


def test_a_model_that_takes_none_refuses():
    batch = Batch(KvBlocks(8), slots=4, step_tokens=16)
    engine = Engine(CountingModel(8), batch, context_tokens=64)
    engine.attach(attach("d1"), ())
    assert "takes no adapter" in engine.step().adapters[0].error


ACTIONS = st.tuples(st.sampled_from(["attach", "fail", "drop", "use", "free"]), st.integers(0, 2))


@given(st.lists(ACTIONS, max_size=40))
def test_nothing_is_dropped_while_used_or_kept_when_dropped(actions: list[tuple[str, int]]):
    host, used = ScriptedHost(), set[str]()
    jobs = AdapterJobs(host, lambda adapter: adapter in used)
    for action, number in actions:
        adapter = f"d{number}"
        match action:
            case "attach":
                jobs.attach(attach(adapter), ())
            case "fail":
                jobs.attach(attach(adapter, "bad"), ())
            case "drop":
                jobs.drop(DropAdapter(adapter))
                assert adapter not in host.attached or adapter in used
            case "use":
                if not jobs.find_fault(adapter):
                    used.add(adapter)
            case "free":
                used.discard(adapter)
                jobs.settle()
        jobs.check()
        assert used <= set(host.attached)
        assert all(not jobs.find_fault(each) for each in host.attached)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    with ExitStack() as stack:
        yield Bench("llama", tmp_path_factory.mktemp("base"), stack)


def real_engine(bench: Bench) -> Engine:
    model = bench.build(NativeOps(2))
    for digest in model.adapters.attached:
        model.adapters.drop(digest)
    dock = AdapterDock(model.adapters, bench.checkpoint.manifest_json)
    batch = Batch(KvBlocks(32), slots=8, step_tokens=13)
    return Engine(model, batch, context_tokens=256, adapters=dock)


def take_in(engine: Engine, adapter: TinyAdapter, changes: dict[str, object] | None = None) -> None:
    message = AttachAdapter(
        adapter.digest, adapter.directory.name, adapter.manifest_json, adapter.config_json
    )
    copies = [dup(descriptor) for descriptor in adapter.partition_fds]
    engine.attach(msgspec.structs.replace(message, **(changes or {})), copies)


def run(engine: Engine, jobs: Sequence[SubmitJob]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {job.job_id: [] for job in jobs}
    for job in jobs:
        engine.submit(job)
    while not engine.is_idle:
        for each in engine.step().runs:
            assert not each.error
            answers[each.job_id] += each.token_ids
    return answers


def merged_answer(bench: Bench, prompt: Sequence[int], adapter: TinyAdapter | None) -> list[int]:
    reference = bench.checkpoint.reference()
    if adapter is not None:
        merge(reference, adapter.directory)
    tokens = list(prompt)
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_tokens_equal_the_merged_models_in_one_batch_alone_and_from_the_cache(bench: Bench):
    """One prompt of several blocks for all: a block that crossed adapters would show."""
    prompt = [(7 * place + 3) % 60 for place in range(37)]
    asked: dict[str, TinyAdapter | None] = {
        "none": None, "one": bench.adapters[0], "two": bench.adapters[1],
    }  # fmt: skip
    expected = {job: merged_answer(bench, prompt, adapter) for job, adapter in asked.items()}
    assert len({tuple(answer) for answer in expected.values()}) == len(asked)
    jobs = [
        submit(job, adapter.digest if adapter else "", prompt, TOKENS)
        for job, adapter in asked.items()
    ]
    engine = real_engine(bench)
    for adapter in bench.adapters:
        take_in(engine, adapter)
    assert run(engine, jobs) == expected
    one_by_one: dict[str, list[int]] = {}
    for job in jobs:
        one_by_one |= run(engine, [job])
    assert one_by_one == expected
    engine.check()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"manifest_json": b"{}"}, "manifest"),
        ({"adapter": "0" * 32}, "another one's"),
        ({"config_json": b"["}, "decode"),
    ],
)
def test_a_broken_adapter_costs_nobody_else_anything(
    bench: Bench, changes: dict[str, object], text: str
):
    engine = real_engine(bench)
    take_in(engine, bench.adapters[0], changes)
    (report,) = engine.step().adapters
    assert text in report.error
    prompt = [5, 6, 7]
    assert run(engine, [submit("a", "", prompt, TOKENS)]) == {
        "a": merged_answer(bench, prompt, None)
    }


def test_a_missing_partition_is_an_error(bench: Bench):
    engine = real_engine(bench)
    adapter = bench.adapters[1]
    message = AttachAdapter(adapter.digest, "short", adapter.manifest_json, adapter.config_json)
    engine.attach(message, ())
    assert "0 partitions" in engine.step().adapters[0].error
