"""Runs the load generator (k6) against one OpenAI-compatible address."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from bench.front_door.figures import Cell, LoadFigures, parse_load

SCRIPT = Path(__file__).with_name("front_door.js")
QUESTION = "12+30"
API_KEY = "sk-bench"
"""What every door that checks keys accepts."""
TOKEN = "4"
"""Text of the one token that every target answers with."""
_START_S = 30.0


class LoadFailed(Exception):  # noqa: N818
    """The load generator itself did not do its work."""


@dataclass(frozen=True, slots=True)
class Load:
    """How long each run lasts and how long each answer is."""

    seconds: float
    tokens: int


async def run_load(k6: Path, address: str, model: str, cell: Cell, load: Load) -> LoadFigures:
    """Return what `cell.users` clients saw. Raises LoadFailed when k6 does not run."""
    environment = {
        "URL": f"http://{address}/v1/chat/completions",
        "MODEL": model,
        "QUESTION": QUESTION,
        "EXPECTED": TOKEN * load.tokens,
        "TOKENS": str(load.tokens),
        "API_KEY": API_KEY,
        "STREAM": str(int(cell.is_stream)),
        "USERS": str(cell.users),
        "SECONDS": f"{load.seconds:g}",
        "K6_NO_USAGE_REPORT": "true",
    }
    process = await asyncio.create_subprocess_exec(
        k6,
        *("run", "--quiet", "--address", "", SCRIPT),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(load.seconds + _START_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise LoadFailed(f"k6 did not end in {load.seconds + _START_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return parse_load(output.decode())
    except ValueError as error:
        raise LoadFailed(f"k6 exit {process.returncode}: {error}\n{errors.decode()}") from error
