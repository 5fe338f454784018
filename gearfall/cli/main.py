"""The `gearfall` command line: mounts the commands, turns errors into a line and an exit code."""

import json
import sys
from typing import NoReturn

import typer

from gearfall import __version__
from gearfall.cli import (
    bench,
    chat,
    convert,
    demo,
    demo_migrate,
    demo_queries,
    deploy,
    drain,
    export,
    history,
    inspect,
    migrate,
    models,
    plan,
    profile,
    ps,
    remove,
    simulate,
    status,
    up,
    verify,
    why,
)
from gearfall.core.errors import GearfallError, InvalidRequest

app = typer.Typer(
    name="gearfall",
    help="Serve many language models from few machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.add_typer(models.app, name="models")
app.command("deploy")(deploy.deploy)
app.command("drain")(drain.drain)
app.command("migrate")(migrate.migrate)
app.command("ps")(ps.ps)
app.command("status")(status.status)
app.command("why")(why.why)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("rm")(remove.remove)
demo.app.command("migrate")(demo_migrate.migrate)
demo.app.command("queries")(demo_queries.queries)
app.add_typer(demo.app, name="demo")
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("history")(history.history)
app.command("profile")(profile.profile)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate_command)


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line; exit with 1 and one line on standard error for an expected error.

    So a file that can't be read or written is one.
    """
    try:
        app()
    except GearfallError as error:
        _end(error)
    except OSError as error:
        if error.filename is None:
            raise
        _end(InvalidRequest(f"{error.filename}: {error.strerror}"))


def _end(error: GearfallError) -> NoReturn:
    kind = type(error).__name__
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": {"type": kind, "message": error.message}}))
    else:
        typer.secho(f"{kind}: {error.message}", fg="red", err=True)
    sys.exit(1)
