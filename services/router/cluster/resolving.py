"""What a name that a client asks for stands for."""

from gearfall.core.errors import NotFound
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.state.cluster_view import ClusterView


def resolve(view: ClusterView, name: str) -> DeploymentRecord:
    """Return the deployment of that name, or one that has the model as its only stage.

    The record is pinned to the request: a later change of the deployment does not reach it. Raises
    NotFound (code model_not_found).
    """
    deployment = view.deployments.get(DeploymentName(name))
    if deployment is not None:
        return deployment
    model = view.models.get(ModelName(name))
    if model is not None and not model.is_removing:
        return DeploymentRecord(DeploymentName(name), (Stage(ModelName(name)),))
    shown = name if len(name) <= 96 else name[:96] + "..."
    raise NotFound(
        f"the model {shown!r} does not exist: no model or deployment has this name",
        param="model",
        code="model_not_found",
    )
