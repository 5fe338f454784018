"""How much memory a replica reserves on its worker: weights, KV cache, process."""

from dataclasses import dataclass

from gearfall.core.records import ModelRecord

PROCESS_OVERHEAD_BYTES = 96 * 1024 * 1024
"""Private memory of an engine process beside weights and KV cache."""

MAX_KV_TOKENS = 65_536
"""KV capacity of one replica unless a single full context needs more."""


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """What one replica reserves."""

    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum that is checked against the worker's capacity."""
        return self.weights_bytes + self.kv_bytes + self.overhead_bytes


def kv_capacity_tokens(model: ModelRecord, slots: int) -> int:
    """Return the KV capacity in tokens of a replica with `slots` jobs at once.

    Every slot can hold a full context up to MAX_KV_TOKENS altogether; one full context always fits.
    """
    assert slots >= 1
    return max(model.context_tokens, min(slots * model.context_tokens, MAX_KV_TOKENS))


def estimate_replica_memory(model: ModelRecord, slots: int) -> ReplicaMemory:
    """Return what a replica of `model` with `slots` jobs at once reserves."""
    return ReplicaMemory(
        weights_bytes=model.size_bytes,
        kv_bytes=kv_capacity_tokens(model, slots) * model.kv_bytes_per_token,
        overhead_bytes=PROCESS_OVERHEAD_BYTES,
    )
