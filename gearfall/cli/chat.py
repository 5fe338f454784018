"""`gearfall chat`: talk to a model or a cascade; answers stream."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import console, print_json, seconds_text
from gearfall.client import Client, Finished, Replaced, StreamMode, TextDelta, Waiting
from gearfall.client.request import Options
from gearfall.client.values import Event, answer_from_events
from gearfall.core.errors import GearfallError

Message = dict[str, str]


def chat(
    model: Annotated[str, typer.Argument(help="A deployment or a model.")],
    prompt: Annotated[str, typer.Argument(help="One question; without it, a conversation.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stream_mode: Annotated[
        StreamMode | None, typer.Option(help="What to show before it is decided who answers.")
    ] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Ask a model; the answer streams, then a line says who gave it and at what cost."""
    options: Options = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if seed is not None:
        options["seed"] = seed
    if stream_mode is not None:
        options["stream_mode"] = stream_mode
    with connect(server) as client:
        if prompt:
            _ask(client, model, [{"role": "user", "content": prompt}], options, as_json=as_json)
        else:
            _converse(client, model, options, as_json=as_json)


def _converse(client: Client, model: str, options: Options, *, as_json: bool) -> None:
    messages: list[Message] = []
    while question := _read_question():
        messages.append({"role": "user", "content": question})
        try:
            answer = _ask(client, model, messages, options, as_json=as_json)
        except GearfallError as error:
            console.print(f"[red]{type(error).__name__}:[/] {escape(error.message)}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _read_question() -> str:
    try:
        return console.input("[bold]> [/]") if sys.stdin.isatty() else sys.stdin.readline().strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _ask(
    client: Client, model: str, messages: list[Message], options: Options, *, as_json: bool
) -> str:
    events: list[Event] = []
    for event in client.stream(model, messages, **options):
        events.append(event)
        if not as_json:
            show(event)
    answer = answer_from_events(events)
    if as_json:
        choice = answer.choices[0]
        print_json(
            {
                "request_id": answer.request_id,
                "text": answer.text,
                "model": answer.model,
                "finish": choice.finish.value,
                "stages": [stage.model for stage in choice.stages],
                "cost_flops": choice.usage.cost_flops,
                "device_s": choice.usage.device_s,
                "degraded": choice.degraded.value if choice.degraded else None,
            }
        )
    return answer.text


def show(event: Event) -> None:
    """Print what an event says to somebody who reads along."""
    match event:
        case Waiting():
            expected = seconds_text(event.expected_s)
            console.print(f"[dim]waiting for {event.model}, expected {expected}[/]")
        case TextDelta():
            console.out(event.text, end="", highlight=False)  # as it is: no wrapping, no emoji
        case Replaced():
            console.print(f"\n[dim]not certain enough; {event.next_model} instead of that:[/]")
        case Finished():
            tried = " -> ".join(
                stage.model if stage.certainty is None else f"{stage.model} ({stage.certainty:.2f})"
                for stage in event.stages
            )
            cost = f"{event.usage.cost_flops / 1e6:.1f} MFLOP"
            if event.usage.device_s:
                cost += f", {seconds_text(event.usage.device_s)} of the device"
            flag = f"; degraded: {event.degraded.value}" if event.degraded else ""
            console.print(f"\n[dim]{event.model}, by way of {tried}; {cost}{flag}[/]")
