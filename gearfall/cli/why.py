"""`gearfall why`: reasons of a placement, what happened to a request, how a plan is kept."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, console, print_json, seconds_text
from gearfall.client import Client
from gearfall.core.errors import NotFound
from gearfall.pb import scheduler_pb2


def why(
    subject: Annotated[str, typer.Argument(help="A model, a deployment or a request's id.")],
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Explain a model's placement, a plan's promises or a request's way, newest first."""
    with connect(server) as client:
        reply = _explain(client, subject)
    if as_json:
        print_json(as_dict(reply))
        return
    for item in reply.explanations:
        at = datetime.fromtimestamp(item.at_unix_s, UTC).strftime("%H:%M:%S.%f")[:-3]
        console.print(
            f"[dim]{at}[/] {item.subject} [bold]{item.decision}[/]: {escape(item.reason)}"
        )
        if times := _times(item):
            console.print(f"    {times}")
        for other in item.rejected:
            console.print(f"    not {escape(other.choice)}: {escape(other.reason)}")


def _explain(client: Client, subject: str) -> scheduler_pb2.ExplainReply:
    listed = client.models()
    models = {each.name for each in listed.models}
    if subject in models | {each.name for each in listed.deployments}:
        return client.explain_model(subject)
    try:
        return client.explain_request(subject)
    except NotFound:
        raise NotFound(
            f"{subject!r} is neither a registered model, nor a deployment, nor a recent request"
        ) from None


def _times(item: scheduler_pb2.Explanation) -> str:
    """Return what was predicted and what it took, as far as there is either."""
    predicted = f"predicted {seconds_text(item.predicted_s)}" if item.predicted_s else ""
    measured = f"measured {seconds_text(item.measured_s)}" if item.measured_s else ""
    if predicted and not measured and item.decision == "start":
        measured = "not yet measured"
    return ", ".join(part for part in (predicted, measured) if part)
