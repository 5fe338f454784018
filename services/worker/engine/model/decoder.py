"""A model through one native call a step, where transformers would take hundreds.

Which models that is, is decided by the stand-ins that the first pass has left in place. The result
has the bits that the stand-ins give one by one, so a model may change between both ways from step
to step: an adapter that updates the embedding or the head goes through the stand-ins.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from gearfall.infra.kernels.cpu_decoder import AdapterTokens, Decoder, LowRank, Step
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.model.lora import Factors
from services.worker.engine.model.native_parts import LayerCaches, Parts, Rows, parts_of
from services.worker.engine.model.ops import NativeOps, Ops
from services.worker.engine.model.rotary import RotaryTable


class NativePass:
    """The forward pass of one model."""

    def __init__(self, parts: Parts, ops: NativeOps) -> None:
        self._decoder = _decoder(parts)
        self._parts = parts
        self._ops = ops
        self._adapters: dict[str, int] = {}
        self._strange: set[str] = set()
        self._attached = 0

    def knows(self, digest: str) -> bool:
        """Whether an adapter was learnt and not forgotten."""
        return digest in self._adapters or digest in self._strange

    def learn(self, digest: str, updates: Mapping[nn.Module, Factors]) -> None:
        """Know an adapter from now on."""
        layers = [
            {site: _low_rank(rows, updates[rows.module]) for site, rows in sites.items()
             if rows.module in updates}
            for sites in self._parts.sites
        ]  # fmt: skip
        here = {rows.module for sites in self._parts.sites for rows in sites.values()}
        if not updates.keys() <= here:
            self._strange.add(digest)
            return
        self._decoder.attach(self._attached, layers)
        self._adapters[digest] = self._attached
        self._attached += 1

    def forget(self, digest: str) -> None:
        """Let go of an adapter. Idempotent."""
        self._strange.discard(digest)
        number = self._adapters.pop(digest, None)
        if number is not None:
            self._decoder.detach(number)

    def can_compute(self, step: PackedStep) -> bool:
        """Whether all adapters of a step update only products of layers; they must be known."""
        return all(group.adapter in self._adapters for group in step.adapters)

    def logits(self, step: PackedStep) -> torch.Tensor:
        """Compute a step that can be; return f32[R, vocabulary], R as in `logit_rows`."""
        return self.run(self.prepare(step), threads=self._ops.threads)

    def run(self, prepared: Step, *, threads: int) -> torch.Tensor:
        """Compute what was prepared; return its logits f32[R, vocabulary]."""
        logits = self._decoder.run(prepared, threads=threads, is_rounded=self._ops.is_rounded)
        cap = self._parts.logit_cap
        return torch.tanh(logits / cap) * cap if cap else logits

    def prepare(self, step: PackedStep) -> Step:
        """Return a step that can be computed as the decoder takes it."""
        positions = int(step.positions.max()) + 1
        cos, sin = self._table(self._parts.rotary, positions)
        local_cos, local_sin = self._table(self._parts.local_rotary, positions)
        return Step(
            token_ids=torch.from_numpy(step.token_ids.astype(np.int32)),
            cos=cos,
            sin=sin,
            block_tables=torch.from_numpy(step.block_tables),
            seq_index=torch.from_numpy(step.seq_index),
            positions=torch.from_numpy(step.positions),
            logit_rows=torch.from_numpy(step.logit_rows.astype(np.int32)),
            adapters=[
                AdapterTokens(
                    self._adapters[group.adapter],
                    torch.from_numpy(group.tokens.astype(np.int32)),
                )
                for group in step.adapters
            ],
            local_cos=local_cos,
            local_sin=local_sin,
        )

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds spent in each phase so far; see `Decoder.seconds`."""
        return self._decoder.seconds()

    @staticmethod
    def _table(rotary: RotaryTable | None, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines; of no column where nothing is rotated."""
        if rotary is not None:
            return rotary.table(positions)
        nothing = torch.empty(positions, 0)
        return nothing, nothing


def find_native_pass(model: Any, caches: LayerCaches, ops: Ops) -> NativePass | None:
    """Return the native pass of a model whose layers have all attended once, None if it has none.

    `model` is transformers' (its modules are untyped), with stand-ins in place. The pass reads the
    same weights and caches.
    """
    if not isinstance(ops, NativeOps):
        return None
    parts = parts_of(model, caches)
    return None if parts is None else NativePass(parts, ops)


def _decoder(parts: Parts) -> Decoder:
    return Decoder(
        embedding=parts.embedding,
        layers=parts.layers,
        norm=parts.norm.weight,
        head=parts.head,
        eps=parts.norm.eps,
        norm_bias=getattr(parts.norm, "bias", None),
        activation=parts.activation,
        embedding_scale=parts.embedding_scale,
        positions=parts.positions,
        position_offset=parts.position_offset,
    )


def _low_rank(rows: Rows, factors: Factors) -> LowRank:
    return LowRank(factors.a, factors.b[rows.first : rows.end], factors.scale)
