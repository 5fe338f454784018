"""The index of a sharded safetensors checkpoint, every byte of it hostile. Pure."""

import msgspec

from gearfall.core.checkpoint.manifest import MAX_TENSORS, is_file_name
from gearfall.core.errors import CorruptCheckpoint

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_QUOTES_OF_A_TENSOR = 4


class _Sections(msgspec.Struct):
    weight_map: msgspec.Raw


def parse_shard_index(text: bytes) -> dict[str, str]:
    """Return the shard of each tensor. Raises CorruptCheckpoint, and nothing else."""
    try:
        weight_map = bytes(msgspec.json.decode(text, type=_Sections).weight_map)
        # Measured before it is decoded: a few bytes of JSON become two strings and a place in a
        # table.
        if weight_map.count(b'"') > _QUOTES_OF_A_TENSOR * MAX_TENSORS:
            raise CorruptCheckpoint(f"{INDEX_FILE} has a too large weight_map")
        shard_of = msgspec.json.decode(weight_map, type=dict[str, str])
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{INDEX_FILE} does not decode: {error}") from None
    shards = set(shard_of.values())
    if not shard_of or len(shards) > MAX_SHARDS:
        raise CorruptCheckpoint(f"{INDEX_FILE} has an empty or too large weight_map")
    for name in shards:
        if not is_file_name(name) or not name.endswith(".safetensors"):
            raise CorruptCheckpoint(
                f"{INDEX_FILE} names a shard outside its directory: {name[:80]!r}"
            )
    return shard_of
