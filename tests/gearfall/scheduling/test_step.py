"""What a step writes of models that are gone."""

from gearfall.scheduling.actions import Decide, Undecide
from tests.gearfall.scheduling.clusters import demand, model, node
from tests.gearfall.scheduling.deciding_cluster import Cluster


def test_a_reason_that_arrives_after_its_models_removal_goes_too():
    cluster = Cluster(node(), model("x"), demand("x"))
    written = [each.decision for each in cluster.plan().actions if isinstance(each, Decide)]
    assert [(each.model, each.decision) for each in written] == [("x", "wait")]
    cluster.gone(model("x"), demand("x"))
    assert cluster.plan().actions == ()
    for decision in written:
        cluster.fleet.put("decisions", decision)
    assert cluster.plan().actions == (Undecide(written[0].model),)
