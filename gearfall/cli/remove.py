"""`gearfall rm`: remove a deployment or a model."""

from typing import Annotated

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import console, print_json
from gearfall.core.errors import NotFound


def remove(
    name: Annotated[str, typer.Argument(help="A deployment's or a model's name.")],
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Remove a deployment, or a model from every store."""
    with connect(server) as client:
        listed = client.models()
        if any(deployment.name == name for deployment in listed.deployments):
            kind = "deployment"
            client.remove_deployment(name)
        elif any(model.name == name for model in listed.models):
            kind = "model"
            client.remove_model(name)
        else:
            raise NotFound(f"no deployment or model is called {name!r}")
    if as_json:
        print_json({"removed": kind, "name": name})
    else:
        console.print(f"removed {kind} [bold]{name}[/]")
