"""How one store is run."""

from dataclasses import dataclass
from pathlib import Path

from gearfall.core.ids import NodeId
from services.store.tiers.spare_memory import SPARE_BYTES


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How one store is run."""

    node_id: NodeId
    data_dir: Path
    """SSD tier; one store at a time may use it."""
    attach_dir: Path
    """Private directory of the attach socket; workers of the node must reach it."""
    dram_bytes: int
    """Capacity of the DRAM pool."""
    ssd_bytes: int = 0
    """Most bytes of models on the SSD tier; 0 for what its file system has."""
    spare_bytes: int = SPARE_BYTES
    """Most memory of the pool's free room that is kept ready for the next load; 0 for none."""
    bulk_host: str = "127.0.0.1"
    """Where neighbours reach the bulk socket: the host that gRPC listens on."""
