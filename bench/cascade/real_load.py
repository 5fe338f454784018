"""Sends a trace's questions to a running cluster when they are due, and notes their ends."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cascade.real_cluster import RealCluster
from bench.cascade.real_figures import Outcome, Part
from bench.cascade.real_work import MAX_TOKENS, Ask
from gearfall.client.request import GenerateCall
from gearfall.core.errors import Unavailable
from gearfall.demo.arithmetic import Question, is_correct
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import router_pb2, router_pb2_grpc

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """One run of one system."""

    outcomes: tuple[Outcome, ...]
    device_s: float
    """CPU time of the workers meanwhile."""
    begun_s: float
    """When the first request was due at the earliest, on the monotonic clock."""


async def replay(
    cluster: RealCluster, system: str, asks: Sequence[Ask], questions: Sequence[Question]
) -> Replayed:
    """Send each question when it is due, whatever became of the others; return when all ended."""
    begun_device_s, begun_s = cluster.device_seconds(), time.perf_counter()
    async with open_channel(cluster.address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        async with asyncio.TaskGroup() as tasks:
            sent = [
                tasks.create_task(_ask(stub, system, ask, questions[ask.question], begun_s))
                for ask in asks
            ]
    outcomes = tuple(task.result() for task in sent)
    return Replayed(outcomes, cluster.device_seconds() - begun_device_s, begun_s)


async def _ask(
    stub: "router_pb2_grpc.RouterAsyncStub",
    system: str,
    ask: Ask,
    question: Question,
    begun_s: float,
) -> Outcome:
    due_s = begun_s + ask.at_s
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    call = GenerateCall(system, question.prompt, {"max_tokens": MAX_TOKENS, "temperature": 0.0})
    text, gear, end = "", "", None
    # Whole: that is what is timed, and what a cascade's caller waits for.
    for message in (await stub.Answer(call.to_pb(), timeout=TIMEOUT_S)).events:
        match message.WhichOneof("event"):
            case "start":
                gear = message.start.gear
            case "delta":
                text += message.delta.text
            case "end":
                end = message.end
    if end is None:
        raise Unavailable(f"{system} ended an answer without saying how")
    return _outcome(ask, time.perf_counter() - due_s, is_correct(question, text), gear, end)


def _outcome(
    ask: Ask, total_s: float, is_right: bool, gear: str, end: router_pb2.GenerateEnd
) -> Outcome:
    return Outcome(
        at_s=ask.at_s,
        question=ask.question,
        total_s=total_s,
        quality=float(is_right),
        cost=end.usage.cost_flops,
        stages=len(end.stages),
        model=end.model,
        gear=int(gear.rpartition("/")[2] or 0),
        queued_s=sum(stage.queued_s for stage in end.stages),
        engine_s=sum(stage.duration_s - stage.queued_s for stage in end.stages),
        draft_tokens=sum(stage.draft_tokens for stage in end.stages),
        accepted_draft_tokens=sum(stage.accepted_draft_tokens for stage in end.stages),
        parts=tuple(
            Part(stage.model, stage.queued_s, stage.duration_s - stage.queued_s)
            for stage in end.stages
        ),
    )
