"""What an engine writes of its steps, and what is read of it again."""

import os
import select
import time
from pathlib import Path

import pytest

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine.step_log import (
    STEP_LOG_VARIABLE,
    StepLog,
    open_step_log,
    read_step_logs,
)
from services.worker.engine_link.messages import SubmitJob
from tests.services.worker.counting_model import CountingModel


def opened(directory: Path) -> StepLog:
    log = open_step_log({STEP_LOG_VARIABLE: str(directory)})
    assert log is not None
    return log


def test_nothing_is_written_where_nobody_asks():
    assert open_step_log({}) is None


def test_steps_are_read_as_they_were_written_and_a_cut_one_is_left_out(tmp_path):
    log, before_s = opened(tmp_path), time.monotonic()
    log.begin()
    while time.thread_time() - log.begun_core_s < 0.002:
        pass
    log.end(7, 0.25)
    log.begin()
    log.end(1, 0.5)
    (path,) = tmp_path.iterdir()
    first, second = read_step_logs(tmp_path)[os.getpid()]
    assert (first.tokens, first.step_s) == (7, 0.25)
    assert (second.tokens, second.step_s) == (1, 0.5)
    assert 0.002 <= first.core_s <= first.end_s - before_s
    assert before_s <= first.end_s <= second.end_s <= time.monotonic()
    path.write_bytes(path.read_bytes()[:-1])
    assert read_step_logs(tmp_path) == {os.getpid(): (first,)}
    assert read_step_logs(tmp_path, first.end_s) == {os.getpid(): ()}


def test_time_that_a_step_waits_is_no_processor_time(tmp_path):
    log, waited_s = opened(tmp_path), 0.05
    log.begin()
    select.select([], [], [], waited_s)
    log.end(1, waited_s)
    ((step,),) = read_step_logs(tmp_path).values()
    assert step.core_s == pytest.approx(0.0, abs=waited_s / 2)


def test_an_engine_notes_its_steps_that_computed_something(tmp_path):
    batch, log = Batch(KvBlocks(64), slots=4, step_tokens=32), opened(tmp_path)
    engine = Engine(CountingModel(64), batch, context_tokens=64, step_log=log)
    engine.step()
    params = SamplingParams(max_tokens=3, temperature=0.0)
    engine.submit(SubmitJob(JobId("a"), Epoch(1), (5,) * 7, (), params))
    while not engine.is_idle:
        engine.step()
    ((*steps,),) = read_step_logs(tmp_path).values()
    assert [each.tokens for each in steps] == [7, 1, 1]
    assert all(0.0 < each.step_s < 60.0 for each in steps)
