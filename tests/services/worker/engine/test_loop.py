"""The engine's loop over a real socket pair: commands between steps, no write that blocks it."""

import socket
import threading

import msgspec
import pytest

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine.loop import EngineLoop
from services.worker.engine.stream import EngineStream
from services.worker.engine_link.frames import encode_frame, receive_frame
from services.worker.engine_link.messages import (
    CancelJob,
    ProbeEngine,
    StepDone,
    StopEngine,
    SubmitJob,
)
from tests.services.worker.counting_model import CountingModel, answer


class Worker:
    """The other end of the loop, which runs in a thread of its own."""

    def __init__(self, **stream_arguments):
        self.sock, engine_sock = socket.socketpair()
        self.sock.settimeout(20)
        self._engine_sock = engine_sock
        batch = Batch(KvBlocks(16), slots=4, step_tokens=32)
        self.model = CountingModel(16)
        self.engine = Engine(self.model, batch, context_tokens=200)
        self.thread = threading.Thread(
            target=EngineLoop(self.engine, EngineStream(engine_sock, **stream_arguments)).run,
            daemon=True,
        )
        self.thread.start()

    def send(self, message):
        self.sock.sendall(encode_frame(msgspec.msgpack.encode(message)))

    def submit(self, name, prompt, max_tokens):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.send(SubmitJob(JobId(name), Epoch(1), tuple(prompt), (), sampling))

    def receive(self):
        frame = receive_frame(self.sock)
        return None if frame is None else msgspec.msgpack.decode(frame[0], type=StepDone)

    def answers(self, count):
        """Read until `count` jobs have finished."""
        found: dict[str, list[int]] = {}
        finished = 0
        while finished < count:
            for run in self.receive().runs:
                found.setdefault(run.job_id, []).extend(run.token_ids)
                finished += run.finish is not None
        return found

    def close(self):
        self.sock.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self._engine_sock.close()


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_jobs_are_answered_one_message_a_step(worker):
    for number in range(4):
        worker.submit(str(number), [number + 1, 5], 6)
    assert worker.answers(4) == {str(n): answer([n + 1, 5], 6) for n in range(4)}


def test_a_bad_job_is_answered_by_an_idle_engine(worker):
    worker.submit("bad", [10_000], 5)
    (run,) = worker.receive().runs
    assert "vocabulary" in run.error
    worker.submit("good", [1], 2)
    assert worker.answers(1) == {"good": answer([1], 2)}


def test_an_idle_engine_answers_a_probe_once(worker):
    worker.send(ProbeEngine())
    assert worker.receive().runs == ()
    worker.submit("a", [1], 1)
    (run,) = worker.receive().runs
    assert run.finish is not None


def test_cancel_stops_the_steps(worker):
    worker.submit("a", [1], 190)
    assert worker.receive().running_jobs == 1
    worker.send(CancelJob(JobId("a"), Epoch(1)))
    worker.submit("b", [2], 1)
    while (step := worker.receive()).runs[-1].job_id != "b":
        assert step.runs[0].job_id == "a"
    assert step.running_jobs == 0


def test_stop_ends_the_loop_after_what_was_said(worker):
    worker.submit("a", [1], 3)
    worker.answers(1)
    worker.send(StopEngine())
    worker.thread.join(20)
    assert not worker.thread.is_alive()


def test_the_end_of_the_worker_ends_the_loop_in_mid_work(worker):
    worker.submit("a", [1], 190)
    worker.receive()
    worker.sock.close()
    worker.thread.join(20)
    assert not worker.thread.is_alive()


def test_a_slow_reader_chokes_the_engine_and_loses_nothing():
    worker = Worker(max_backlog_bytes=2000)
    worker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for number in range(12):
        worker.submit(str(number), [number + 1], 150)
    assert worker.answers(12) == {str(n): answer([n + 1], 150) for n in range(12)}
    worker.close()
