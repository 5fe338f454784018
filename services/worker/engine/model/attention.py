"""Paged attention behind transformers' attention interface: one cache per layer, one packed row.

A model built with `attn_implementation=cache.name` calls `PagedCache.attend` in every layer. All
sequences of a step lie in one row [1, T]; the step's layout says which token belongs to which.
"""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from gearfall.core.errors import InvalidRequest
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine.kv_memory import EngineKvMemory
from services.worker.engine.model.ops import AttentionSpec, LayerCache, Ops, StepLayout

_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that change nothing for causal inference without transformers' own cache."""


class PagedCache:
    """Keys and values of all layers, and the attention over them.

    A layer's cache is made when the layer first attends, which says its heads and sizes. On a CPU
    it lies in memory that the worker maps too.
    """

    def __init__(self, ops: Ops, *, total_blocks: int, device: torch.device) -> None:
        self.name = f"gearfall_paged_{id(self):x}"
        self._ops = ops
        self._total_blocks = total_blocks
        self._device = device
        self._memory = EngineKvMemory(total_blocks) if device.type == "cpu" else None
        self._layers: dict[int, tuple[LayerCache, AttentionSpec]] = {}
        self._layout: StepLayout | None = None
        self._is_first_pass = True
        AttentionInterface.register(self.name, _attending(self))

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers' caches."""
        return sum(cache.size_bytes for cache, _ in self._layers.values())

    @property
    def memory(self) -> EngineKvMemory | None:
        """The memory of all layers that have attended; None where it can't be shared."""
        return self._memory if self._layers else None

    @property
    def layers(self) -> Mapping[int, tuple[LayerCache, AttentionSpec]]:
        """Cache and attention of each layer that has attended, by its index."""
        return self._layers

    def begin_step(self, layout: StepLayout) -> None:
        """Say what the tokens of the next forward pass are."""
        self._layout = layout

    def end_step(self) -> None:
        """Note that a forward pass is over: every layer has attended."""
        if self._is_first_pass and not self._layers:
            raise InvalidRequest("the model has no attention layer that gearfall can serve")
        self._layout = None
        self._is_first_pass = False

    def attend(  # noqa: PLR0917 (transformers passes these by position)
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **arguments: object,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers asks: query [1, heads, T, head_dim] to [1, T, heads, head_dim]."""
        layout = self._layout
        if layout is None:
            raise InvalidRequest("attention was asked for outside of a step")
        index = getattr(module, "layer_idx", None)
        if self._is_first_pass:
            _check_layer(module, attention_mask, arguments)
            _check_shapes(query, key, value)
            self._prepare(index, key.shape[1], key.shape[3], scaling, arguments)
        assert isinstance(index, int)
        cache, spec = self._layers[index]
        self._ops.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), cache, layout)
        out = self._ops.attend(query[0].transpose(0, 1), cache, layout, spec)
        return out.unsqueeze(0), None

    def _prepare(
        self,
        index: object,
        kv_heads: int,
        head_dim: int,
        scaling: float | None,
        arguments: Mapping[str, object],
    ) -> None:
        """Make the cache of a layer and note what its attention does."""
        if not isinstance(index, int) or index in self._layers:
            raise _unsupported(f"layer index {index!r} is missing or attends twice")
        cache = self._make_cache(index, kv_heads, head_dim)
        spec = AttentionSpec(
            scale=1.0 / math.sqrt(head_dim) if scaling is None else float(scaling),
            sliding_window=int(_number(arguments.get("sliding_window"))),
            softcap=_number(arguments.get("softcap")),
        )
        self._layers[index] = (cache, spec)

    def _make_cache(self, index: int, kv_heads: int, head_dim: int) -> LayerCache:
        if self._memory is not None:
            return LayerCache(*self._memory.add_layer(index, kv_heads, head_dim))
        shape = (self._total_blocks, BLOCK_TOKENS, kv_heads, head_dim)
        return LayerCache(
            torch.empty(shape, dtype=torch.float32, device=self._device),
            torch.empty(shape, dtype=torch.float32, device=self._device),
        )


def _attending(cache: PagedCache) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return `cache.attend` for transformers' table, from which nothing is ever taken away.

    The cache's memory ends with its model all the same.
    """
    method = weakref.WeakMethod(cache.attend)

    def attend(*arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
        found = method()
        assert found is not None, "a model outlived its cache"
        return found(*arguments, **named)

    return attend


def _number(argument: object) -> float:
    """An optional numeric argument; 0 stands for absence in the kernels as well."""
    if argument is None:
        return 0.0
    if not isinstance(argument, (int, float)):
        raise _unsupported(f"{argument!r} is not a number")
    return float(argument)


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse heads that the kernels don't know: all three are [1, heads, T, head_dim]."""
    is_grouped = query.shape[1] % key.shape[1] == 0
    if value.shape != key.shape or query.shape[-1] != key.shape[-1] or not is_grouped:
        raise _unsupported("queries, keys and values differ in head size")


def _check_layer(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, arguments: Mapping[str, object]
) -> None:
    if attention_mask is not None:
        raise _unsupported("it brings an attention mask of its own")
    if not getattr(module, "is_causal", True):
        raise _unsupported("a layer is not causal")
    if getattr(module, "sinks", None) is not None:
        raise _unsupported("it has attention sinks")
    for name, argument in arguments.items():
        known = name in _HARMLESS or name in {"sliding_window", "softcap"}
        if not known and argument is not None:
            raise _unsupported(f"its attention takes {name!r}")


def _unsupported(reason: str) -> InvalidRequest:
    return InvalidRequest(f"this model's attention is not supported: {reason}")
