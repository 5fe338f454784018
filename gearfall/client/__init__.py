"""The public Python client: `AsyncClient` for asyncio, `Client` for everything else."""

from gearfall.client.async_client import AsyncClient
from gearfall.client.sync_client import Client
from gearfall.client.values import (
    Answer,
    Choice,
    Finished,
    Replaced,
    Started,
    TextDelta,
    TokenLogprob,
    Waiting,
)
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.generation.usage import StageReport, Usage

__all__ = [
    "Answer",
    "AsyncClient",
    "Choice",
    "Client",
    "Finished",
    "Replaced",
    "StageReport",
    "Started",
    "StreamMode",
    "TextDelta",
    "TokenLogprob",
    "Usage",
    "Waiting",
]
