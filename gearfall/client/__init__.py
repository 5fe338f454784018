"""The public Python client: `AsyncClient` for asyncio, `Client` for everything else."""

from gearfall.client.async_client import AsyncClient
from gearfall.client.sync_client import Client
from gearfall.client.values import (
    Answer,
    Choice,
    Finished,
    Started,
    TextDelta,
    TokenLogprob,
    Waiting,
)
from gearfall.core.usage import StageReport, Usage

__all__ = [
    "Answer",
    "AsyncClient",
    "Choice",
    "Client",
    "Finished",
    "StageReport",
    "Started",
    "TextDelta",
    "TokenLogprob",
    "Usage",
    "Waiting",
]
