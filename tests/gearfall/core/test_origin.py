"""Where the bytes of a start come from, as tables."""

import pytest

from gearfall.core.origin import UNKNOWN_BYTES_PER_S, Bandwidth, bandwidth_out_of, source_tier
from gearfall.core.tiers import Tier
from tests.gearfall.scheduling.clusters import by_node, model, node

URL = "s3://bucket/small"


@pytest.mark.parametrize(
    ("record", "of_node", "others", "tier"),
    [
        # listed: the store says that it can load it
        (model(), node(), (), Tier.SSD),
        (model(), node(on_ssd=["small"]), (), Tier.SSD),
        (model(), node(on_ssd=["small"], resident=["small"]), (), Tier.DRAM),
        (model(), node(on_ssd=[]), (), Tier.SSD),
        (model(source=URL), node(on_ssd=[]), (), Tier.REMOTE),
        (model(source=URL), node(on_ssd=["small"]), (), Tier.SSD),
        (model(nodes=("node-a", "n2")), node(on_ssd=[]), (node("n2"),), Tier.REMOTE),
        (model(nodes=("node-a", "n2")), node(on_ssd=[]), (), Tier.SSD),
        # not listed: it can be fetched from a URL or from another live node
        (model(nodes=()), node(on_ssd=[]), (), None),
        (model(nodes=(), source=URL), node(on_ssd=[]), (), Tier.REMOTE),
        (model(nodes=("n2",)), node(on_ssd=[]), (node("n2"),), Tier.REMOTE),
        (model(nodes=("n2",)), node(on_ssd=[]), (node("n3"),), None),
        # not listed, but there: other bytes under the same name
        (model(nodes=("n2",)), node(on_ssd=["small"]), (node("n2"),), None),
        (model(nodes=("n2",)), node(resident=["small"]), (node("n2"),), None),
    ],
)
def test_where_bytes_come_from(record, of_node, others, tier):
    assert source_tier(record, of_node, by_node(of_node, *others)) is tier


@pytest.mark.parametrize(
    ("tier", "measured", "found"),
    [
        (Tier.SSD, {"ssd_bytes_per_s": 5e8}, Bandwidth(5e8, True)),
        (Tier.REMOTE, {"ssd_bytes_per_s": 5e8}, Bandwidth(UNKNOWN_BYTES_PER_S[Tier.REMOTE], False)),
        (Tier.REMOTE, {"remote_bytes_per_s": 1e8}, Bandwidth(1e8, True)),
        (Tier.SSD, {"remote_bytes_per_s": 1e8}, Bandwidth(UNKNOWN_BYTES_PER_S[Tier.SSD], False)),
    ],
)
def test_a_bandwidth_is_the_tiers_own(tier, measured, found):
    assert bandwidth_out_of(tier, node(**measured)) == found
