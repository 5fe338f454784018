"""Where the bytes of a start come from on a node, and how fast they come. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from gearfall.core.ids import NodeId, is_url
from gearfall.core.records import ModelRecord, NodeRecord
from gearfall.core.tiers import Tier

UNKNOWN_BYTES_PER_S = {Tier.REMOTE: 2.5e8, Tier.SSD: 1e9}
"""Out of each tier, assumed until a node has measured its own."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second out of a tier."""

    bytes_per_s: float
    is_measured: bool
    """By the node itself, or assumed."""


def source_tier(
    model: ModelRecord, node: NodeRecord, nodes: Mapping[NodeId, NodeRecord]
) -> Tier | None:
    """Return where the bytes of a start on `node` would come from; None when they can't get there.

    Elsewhere is the URL that a model was registered from, or any other live node that has it.
    """
    is_named = model.name in node.resident or model.name in (node.on_ssd or ())
    if node.node_id not in model.nodes:
        # Bytes under that name which the record does not count are other bytes.
        return Tier.REMOTE if not is_named and _is_elsewhere(model, node, nodes) else None
    if model.name in node.resident:
        return Tier.DRAM
    if is_named or node.on_ssd is None or not _is_elsewhere(model, node, nodes):
        return Tier.SSD
    return Tier.REMOTE


def bandwidth_out_of(tier: Tier, node: NodeRecord) -> Bandwidth:
    """Return how fast bytes come up to the pool of `node` from REMOTE or SSD."""
    measured = node.remote_bytes_per_s if tier is Tier.REMOTE else node.ssd_bytes_per_s
    return Bandwidth(measured if measured > 0 else UNKNOWN_BYTES_PER_S[tier], measured > 0)


def _is_elsewhere(model: ModelRecord, node: NodeRecord, nodes: Mapping[NodeId, NodeRecord]) -> bool:
    return is_url(model.source) or any(n in nodes for n in model.nodes if n != node.node_id)
