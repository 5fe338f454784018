"""Tiny random LoRA adapters in PEFT's layout, converted for a base, and merged references."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gearfall.checkpoint.adapter_source import open_adapter
from gearfall.checkpoint.conversion import convert
from gearfall.core.checkpoint.manifest import Manifest, manifest_bytes, manifest_digest
from gearfall.infra.memory.pool_lease import map_partition

RANK = 3
ALPHA = 12.0


def save_adapter(
    model: PreTrainedModel,
    targets: Sequence[str],
    directory: Path,
    *,
    seed: int,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 0.3,
) -> Path:
    """Save an adapter for every module of `model` whose name ends with one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if not name.endswith(tuple(targets)):
            continue
        length, width = sizes_of(module)
        is_embedding = isinstance(module, nn.Embedding)
        stem = f"base_model.model.{name}.lora_{'embedding_' if is_embedding else ''}"
        suffix = "" if is_embedding else ".weight"
        a = torch.randn(RANK, length, generator=generator) * size
        b = torch.randn(width, RANK, generator=generator) * size
        tensors[f"{stem}A{suffix}"], tensors[f"{stem}B{suffix}"] = a.to(dtype), b.to(dtype)
    is_transposed = any(isinstance(module, Conv1D) for module in model.modules())
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    text = json.dumps(content | {"fan_in_fan_out": is_transposed} | (config or {}))
    (directory / "adapter_config.json").write_text(text)
    return directory


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Lengths of a module's input and output."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (first, second) if isinstance(module, nn.Embedding | Conv1D) else (second, first)


@torch.no_grad()
def merge(model: PreTrainedModel, directory: Path) -> None:
    """Add an adapter to the weights of a float32 model, as PEFT's merge_and_unload does."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    root = math.sqrt(RANK) if config.get("use_rslora") else RANK
    for name, module in model.named_modules():
        stem = f"base_model.model.{name}.lora_"
        alpha = config["lora_alpha"]
        for key, own in (config.get("alpha_pattern") or {}).items():
            alpha = own if name.endswith(f".{key}") else alpha
        for kind, suffix in (("", ".weight"), ("embedding_", "")):
            a = tensors.get(f"{stem}{kind}A{suffix}")
            if a is None:
                continue
            b = tensors[f"{stem}{kind}B{suffix}"]
            update = alpha / root * (b.float() @ a.float())
            turned = kind or isinstance(module, Conv1D)
            # A tied weight's twin keeps its own: PEFT unties them.
            weight = module.weight + (update.t() if turned else update)
            module.weight = nn.Parameter(weight)


@dataclass(frozen=True, slots=True)
class TinyAdapter:
    """A converted adapter whose partitions lie in memfds."""

    directory: Path
    manifest: Manifest
    config_json: bytes
    partition_fds: tuple[int, ...]

    @property
    def manifest_json(self) -> bytes:
        return manifest_bytes(self.manifest)

    @property
    def digest(self) -> str:
        return manifest_digest(self.manifest_json)

    def map(self):
        return [
            map_partition(descriptor, partition.size_bytes)
            for descriptor, partition in zip(
                self.partition_fds, self.manifest.partitions, strict=True
            )
        ]


@contextmanager
def tiny_adapter(source: Path, base: Manifest, *, ranks: int = 1) -> Iterator[TinyAdapter]:
    """Convert a saved adapter for its base and hold it in memory."""
    converted = source.with_name(f"{source.name}-converted")
    converted.mkdir()
    digest = manifest_digest(manifest_bytes(base))
    with open_adapter(str(source), base, digest) as opened:
        manifest = convert(opened, converted, lambda done, total: None, ranks=ranks)
    descriptors = []
    try:
        for partition in manifest.partitions:
            descriptors.append(os.memfd_create(partition.file))
            os.write(descriptors[-1], (converted / partition.file).read_bytes())
        config = (source / "adapter_config.json").read_bytes()
        yield TinyAdapter(source, manifest, config, tuple(descriptors))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
