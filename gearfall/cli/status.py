"""`gearfall status`: the cluster in one look."""

from collections.abc import Iterable

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import (
    as_dict,
    bytes_text,
    console,
    print_json,
    print_table,
    readiness_text,
    seconds_text,
)
from gearfall.pb import common_pb2, router_pb2


def status(server: Server = "", as_json: AsJson = False) -> None:
    """Show nodes, workers, models, queues and the leader."""
    with connect(server) as client:
        reply, listed = client.status(), client.models()
    if as_json:
        print_json(as_dict(reply) | {"models": [as_dict(model) for model in listed.models]})
        return
    console.print(
        f"router [bold]{reply.router_id}[/], leader [bold]{reply.leader or 'none'}[/], "
        f"{reply.running_requests} requests running"
    )
    for problem in reply.degraded:
        console.print(f"[red]degraded:[/] {problem}")
    for alarm in reply.alarms:
        console.print(f"[red]alarm:[/] {alarm}", highlight=False)
    _print_nodes(reply)
    print_table(
        "models",
        ("name", "state", "size>"),
        ((m.name, readiness_text(m), bytes_text(m.size_bytes)) for m in listed.models),
    )
    print_table(
        "queues",
        ("model", "waiting>", "claimed>"),
        ((queue.model, queue.waiting, queue.claimed) for queue in reply.queues),
    )
    if reply.costs:
        _print_costs(reply)


def _print_costs(reply: router_pb2.GetStatusReply) -> None:
    print_table(
        "costs, since the router began",
        ("asked for", "device time>", "GFLOP>", "starts caused>", "degraded answers>"),
        (
            (
                each.name,
                seconds_text(each.device_s),
                f"{each.cost_flops / 1e9:.1f}",
                seconds_text(each.start_s),
                each.degraded_answers,
            )
            for each in reply.costs
        ),
    )


def _print_nodes(reply: router_pb2.GetStatusReply) -> None:
    print_table(
        "nodes",
        ("node", "store", "DRAM pool>", "resident", "from SSD>", "from elsewhere>"),
        (
            (
                node.node_id,
                node.address,
                "/".join(bytes_text(size) for size in _dram(node.tiers)),
                ", ".join(r.model for r in node.residency if r.tier == common_pb2.TIER_DRAM),
                _speed(node.tiers, common_pb2.TIER_SSD),
                _speed(node.tiers, common_pb2.TIER_REMOTE),
            )
            for node in reply.nodes
        ),
    )
    print_table(
        "workers",
        ("worker", "node", "device", "memory>", "replicas>"),
        (
            (
                worker.worker_id,
                worker.node_id,
                worker.device,
                f"{bytes_text(worker.memory_used_bytes)}/{bytes_text(worker.memory_bytes)}",
                len(worker.replicas),
            )
            for worker in reply.workers
        ),
    )


def _dram(tiers: Iterable[common_pb2.TierBandwidth]) -> tuple[int, int]:
    for tier in tiers:
        if tier.tier == common_pb2.TIER_DRAM:
            return tier.used_bytes, tier.capacity_bytes
    return 0, 0


def _speed(tiers: Iterable[common_pb2.TierBandwidth], wanted: "common_pb2.Tier.ValueType") -> str:
    for tier in tiers:
        if tier.tier == wanted and tier.bytes_per_s > 0:
            return (
                f"{bytes_text(tier.bytes_per_s)}/s ({seconds_text(2**30 / tier.bytes_per_s)}/GiB)"
            )
    return "not measured"
