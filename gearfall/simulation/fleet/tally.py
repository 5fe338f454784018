"""What a simulation counts beside its requests."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tally:
    """The counts of one simulation, once it has ended."""

    arrived: int
    finished: int
    waiting: int
    running: int
    events: int
    decisions: int
    starts: int
    moves: int
    """Replicas that were moved so that a model could start in their place."""
    remote_bytes: int
    ssd_bytes: int
    prefetched_bytes: int
    """Of the two."""
    device_bytes: int
    accelerator_s: float
    """Accelerators that hosted something, times seconds."""
    ended_s: float
    """When the simulation ended, since it began."""
