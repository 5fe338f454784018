"""`gearfall deploy`: name a model or a cascade and say how it is kept."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, console, print_json, stages_text
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.convert import deployment_to_pb


def deploy(
    name: Annotated[str, typer.Argument(help="Name that clients will ask for.")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="MODEL:THRESHOLD for each stage in order, MODEL for the last."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSON with name, stages, certainty and the rest.")
    ] = None,
    certainty: Annotated[
        str, typer.Option(help="Measure that the thresholds speak about.")
    ] = "sequence_probability",
    min_replicas: Annotated[int, typer.Option(min=0)] = 0,
    max_replicas: Annotated[int, typer.Option(min=1)] = 1,
    keep_alive_s: Annotated[float, typer.Option(min=0)] = 300.0,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Create or replace a deployment."""
    if file is not None:
        deployment = deployment_from_file(file, name)
    else:
        deployment = DeploymentRecord(
            DeploymentName(name),
            tuple(parse_stage(text) for text in stage or ()),
            certainty,
            min_replicas,
            max_replicas,
            keep_alive_s,
        )
    with connect(server) as client:
        stored = deployment_to_pb(client.deploy(deployment))
    if as_json:
        print_json(as_dict(stored))
    else:
        console.print(f"deployed [bold]{stored.name}[/]: {stages_text(stored)}")


def parse_stage(text: str) -> Stage:
    """Parse MODEL or MODEL:THRESHOLD; raise InvalidRequest when the threshold is no number."""
    model, separator, threshold = text.partition(":")
    if not separator:
        return Stage(ModelName(model))
    try:
        return Stage(ModelName(model), float(threshold))
    except ValueError:
        raise InvalidRequest(
            f"--stage {text!r}: the part behind ':' must be a number", param="stage"
        ) from None


def deployment_from_file(path: Path, name: str = "") -> DeploymentRecord:
    """Read a deployment; `name` overrides the file's. Raises InvalidRequest naming the field."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read deployment {path}: {error}", param="file") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{path} must hold a JSON object", param="file")
    try:
        return _deployment(fields, name)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{path}: missing or wrong field: {error}", param="file") from error


def _deployment(fields: dict[str, Any], name: str) -> DeploymentRecord:
    stages = tuple(
        Stage(
            ModelName(stage["model"]),
            None if stage.get("threshold") is None else float(stage["threshold"]),
        )
        for stage in fields["stages"]
    )
    return DeploymentRecord(
        DeploymentName(name or fields["name"]),
        stages,
        str(fields.get("certainty", "sequence_probability")),
        int(fields.get("min_replicas", 0)),
        int(fields.get("max_replicas", 1)),
        float(fields.get("keep_alive_s", 300.0)),
    )
