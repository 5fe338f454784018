"""Adapters are placed as their bases."""

from dataclasses import replace

from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.scheduling.snapshot import on_bases, placeable
from tests.gearfall.scheduling.clusters import model

BASE, TUNED, LARGE = (ModelName(name) for name in ("base", "tuned", "large"))


def test_an_adapter_has_no_replicas_of_its_own():
    models = {
        BASE: model("base"),
        TUNED: replace(model("tuned"), base="base"),
        LARGE: replace(model("large"), is_removing=True),
    }
    assert placeable(models).keys() == {BASE}


def test_a_deployment_of_an_adapter_keeps_replicas_of_its_base():
    models = {BASE: model("base"), TUNED: replace(model("tuned"), base="base")}
    name = DeploymentName("both")
    record = DeploymentRecord(name, (Stage(TUNED, 0.5), Stage(LARGE)), min_replicas=2)
    assert on_bases({name: record}, models) == {
        name: replace(record, stages=(Stage(BASE, 0.5), Stage(LARGE)))
    }
