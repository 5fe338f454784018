"""`gearfall ps`: replicas, with the timeline of each start."""

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, bytes_text, console, print_json, print_table, seconds_text
from gearfall.infra.net.convert import timeline_from_pb
from gearfall.pb import common_pb2


def ps(server: Server = "", as_json: AsJson = False) -> None:
    """List replicas: where, in what state, how busy, how slow, and what their start cost.

    Slow: how much longer an engine's steps took lately than at their best.
    """
    with connect(server) as client:
        reply = client.status()
    replicas = [replica for worker in reply.workers for replica in worker.replicas]
    if as_json:
        print_json([as_dict(replica) for replica in replicas])
        return
    print_table(
        "replicas",
        ("model", "worker", "state", "jobs>", "slow>", "pid>", "memory>", "start>"),
        (
            (
                replica.model,
                replica.worker_id,
                common_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower(),
                f"{replica.running_jobs}/{replica.slots}",
                f"x{replica.slowdown:.2f}" if replica.slowdown else "-",
                replica.pid,
                bytes_text(replica.memory_bytes),
                seconds_text(replica.timeline.total_s),
            )
            for replica in replicas
        ),
    )
    for replica in replicas:
        if replica.error:
            console.print(f"[red]{replica.model}:[/] {replica.error}")
        elif replica.timeline.total_s:
            console.print(f"[dim]{replica.model} started {start_text(replica.timeline)}[/]")


def start_text(timeline: common_pb2.StartTimeline) -> str:
    """Return from which tier a start came and the phases that took time, in order."""
    start = timeline_from_pb(timeline)
    phases = (f"{name} {seconds_text(seconds)}" for name, seconds in start.phases())
    return f"from {start.from_tier.value}: {', '.join(phases)}"
