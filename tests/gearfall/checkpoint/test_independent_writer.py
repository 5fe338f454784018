"""A checkpoint by a writer that knows docs/format.md and nothing of gearfall: it is read and whole.

Below the line that says so nothing of gearfall is used to write.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gearfall.checkpoint.export import export
from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.verification import verify

CHUNK_BYTES = 8192

# --- the writer -----------------------------------------------------------------------------


def stretch(section: dict[str, int], rank: int, ranks: int) -> tuple[int, int]:
    units, members = section["units"], section["members"]
    unit_length = section["length"] // units
    if ranks <= units:
        return rank * units // ranks * unit_length, (rank + 1) * units // ranks * unit_length
    unit = rank * units // ranks
    sharing = [r for r in range(ranks) if r * units // ranks == unit]
    if members == 0:
        return unit * unit_length, (unit + 1) * unit_length
    j, k = sharing.index(rank), len(sharing)
    member_length = unit_length // members
    begin = unit * unit_length
    return (
        begin + j * members // k * member_length,
        begin + (j + 1) * members // k * member_length,
    )


def part_of(array: np.ndarray, split: dict[str, Any], rank: int, ranks: int) -> np.ndarray:
    stretches, begin = [], 0
    for section in split["sections"]:
        start, stop = stretch(section, rank, ranks)
        stretches.append(np.arange(begin + start, begin + stop))
        begin += section["length"]
    return np.take(array, np.concatenate(stretches), axis=split["dimension"])


def padded(content: bytes, alignment: int) -> bytes:
    return content + bytes(-len(content) % alignment)


def write_checkpoint(
    directory: Path,
    arrays: dict[str, np.ndarray],
    splits: dict[str, dict[str, Any]],
    ranks: int,
    **more: Any,
) -> None:
    partitions, tensors = [], []
    for rank in range(ranks):
        content = b""
        for name, array in arrays.items():
            split = splits.get(name)
            if split is None and rank > 0 and array.nbytes > 1000:
                continue
            part = array if split is None else part_of(array, split, rank, ranks)
            content = padded(content, 256)
            entry = {
                "name": name,
                "dtype": str(array.dtype),
                "shape": part.shape,
                "partition": rank,
                "offset_bytes": len(content),
                "size_bytes": part.nbytes,
            }
            tensors.append(entry if split is None else entry | {"split": split})
            content += part.tobytes()
        content = padded(content or bytes(1), 4096)
        chunks = [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]
        file = f"rank{rank}"
        (directory / file).write_bytes(content)
        partitions.append(
            {
                "file": file,
                "size_bytes": len(content),
                "chunk_bytes": CHUNK_BYTES,
                "checksums": [xxhash.xxh3_64_hexdigest(chunk) for chunk in chunks],
            }
        )
    manifest = {
        "format": "gearfall",
        "format_version": 1,
        "model": {
            "architecture": "OwnForCausalLM",
            "parameters": sum(array.size for array in arrays.values()),
            "context_tokens": 8,
            "vocabulary_size": 10,
            "bos_token_id": None,
            "eos_token_ids": [],
            "dtype": "float32",
            "layers": 1,
            "kv_heads": 2,
            "head_dim": 4,
            "has_chat_template": False,
        },
        "partitions": partitions,
        "tensors": tensors,
    } | more
    (directory / "manifest.json").write_text(json.dumps(manifest))


# --- the test -------------------------------------------------------------------------------

HEADS = {"dimension": 0, "sections": [{"length": 16, "units": 2, "members": 2}]}
KV_HEADS = {"dimension": 0, "sections": [{"length": 8, "units": 2, "members": 0}]}
FUSED = {"dimension": 1, "sections": [{"length": 30, "units": 30, "members": 1}] * 2}


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "table": random.standard_normal((60, 50), dtype=np.float32),
        "q": random.standard_normal((16, 5), dtype=np.float32),
        "k": random.integers(0, 99, (8, 5), dtype=np.int64),
        "gate_up": random.standard_normal((40, 60), dtype=np.float32).astype(np.float64),
        "flag": np.array(True),
        "none": np.zeros((0, 3), dtype=np.complex64),
    }


def test_another_program_can_write_it(tmp_path: Path):
    splits = {"q": HEADS, "k": KV_HEADS, "gate_up": FUSED}
    for ranks in (1, 2, 3, 4):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        write_checkpoint(directory, arrays(), splits, ranks)
        checkpoint = open_checkpoint(directory)
        assert checkpoint.manifest.ranks == ranks
        assert verify(checkpoint, lambda done, total: None).damages == ()
        partitions = [bytearray((directory / f"rank{rank}").read_bytes()) for rank in range(ranks)]
        for loaded in (1, 2, 3, 4):
            for rank in range(loaded):
                found = rank_tensors(checkpoint.manifest, partitions, rank, loaded)
                for name, array in arrays().items():
                    split = splits.get(name)
                    expected = array if split is None else part_of(array, split, rank, loaded)
                    assert torch.equal(found[name], torch.from_numpy(np.asarray(expected))), name


def test_another_program_can_write_what_is_exported(tmp_path: Path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    entry = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
    text = json.dumps({"w": entry, "__metadata__": {"x": "y"}}).encode() + b"   "
    header = struct.pack("<Q", len(text)) + text
    (tmp_path / "source-headers.bin").write_bytes(header)
    write_checkpoint(
        tmp_path,
        {"w": array},
        {},
        1,
        files=[
            {
                "name": "source-headers.bin",
                "size_bytes": len(header),
                "checksum": xxhash.xxh3_64_hexdigest(header),
            }
        ],
        source_files=[
            {
                "name": "own.safetensors",
                "size_bytes": len(header) + 48,
                "header_bytes": len(header),
            }
        ],
    )
    (tmp_path / "out").mkdir()
    export(open_checkpoint(tmp_path), tmp_path / "out", lambda done, total: None)
    assert (tmp_path / "out/own.safetensors").read_bytes() == header + array.tobytes()
