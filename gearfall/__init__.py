"""gearfall serves many language models from few machines.

`gearfall.Client` and `gearfall.AsyncClient` are the public face, imported on first use, so that
processes which must never load gRPC can import the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gearfall.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        import gearfall.client

        return getattr(gearfall.client, name)
    raise AttributeError(f"module 'gearfall' has no attribute {name!r}")
