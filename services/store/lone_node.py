"""Looks whether a node has a store already, before another one begins to serve as it.

Two stores of one name would write the node's record, and its part of every model's, in turns
without end. Of two that start together each may find the node free: one that finds the other's
record in place of its own, later, ends then. Not seen: two that advertise the same address.
"""

import grpc

from gearfall.core.errors import Conflict
from gearfall.core.ids import NodeId
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.pb import store_pb2 as pb
from gearfall.pb.store_pb2_grpc import StoreStub

_ANSWER_S = 2.0


async def check_is_free(view: ClusterView, node_id: NodeId) -> None:
    """Raise Conflict when a live store serves as this node.

    Asked before the own address is bound, or of a record with another one: what answers there is
    somebody else. One that died leaves a record until its lease ends, and no answer.
    """
    node = view.nodes.get(node_id)
    if node is None:
        return
    async with open_channel(node.address) as channel:
        try:
            status = await StoreStub(channel).GetStatus(pb.StoreStatusRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError:
            return
    if status.node_id == node_id:
        message = f"node {node_id} has a store at {node.address}: stop it, or name this one"
        raise Conflict(f"{message} otherwise by --node-id", param="node-id")
