"""Which tensors of a model tensor-parallel ranks share, and along which dimension. Pure.

Rules by name, for families whose layout is known: projections into heads and into the MLP are cut
along their output, those back along their input, embeddings and the head along the vocabulary.
Everything else (norms, position embeddings, biases that are added once) each rank needs whole.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gearfall.core.checkpoint.manifest import ModelFacts
from gearfall.core.checkpoint.manifest_split import Section, Split
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from gearfall.core.errors import InvalidRequest

_Cut = Callable[[int, ModelFacts], tuple[Section, ...] | None]
"""Sections of a dimension of that length; None where the length is not what the facts ask for."""


def _rows(length: int, _facts: ModelFacts) -> tuple[Section, ...] | None:
    return (Section(length, length, 1),) if length else None


def _halves(length: int, _facts: ModelFacts) -> tuple[Section, ...] | None:
    """Gate and up projection in one tensor."""
    return (Section(length // 2, length // 2, 1),) * 2 if length and not length % 2 else None


def _query_heads(length: int, facts: ModelFacts) -> tuple[Section, ...] | None:
    """Heads that share a KV head stay together while they can."""
    members, rest = divmod(length, facts.kv_heads * facts.head_dim)
    return (Section(length, facts.kv_heads, members),) if members > 0 and not rest else None


def _kv_heads(length: int, facts: ModelFacts) -> tuple[Section, ...] | None:
    is_sound = length == facts.kv_heads * facts.head_dim
    return (Section(length, facts.kv_heads, 0),) if is_sound else None


def _fused_qkv(length: int, facts: ModelFacts) -> tuple[Section, ...] | None:
    """All query heads, all key heads, all value heads."""
    kv_length = facts.kv_heads * facts.head_dim
    query = _query_heads(length - 2 * kv_length, facts)
    key_or_value = Section(kv_length, facts.kv_heads, 0)
    return (*query, key_or_value, key_or_value) if query else None


def _interleaved_qkv(length: int, facts: ModelFacts) -> tuple[Section, ...] | None:
    """Query, key and value of a head side by side, head after head."""
    heads, rest = divmod(length, 3 * facts.head_dim)
    return (Section(length, heads, 1),) if heads > 0 and not rest else None


_WEIGHT_AND_BIAS = r"\.(?:weight|bias)"
_MLP = r"mlp\.(?:experts\.\d+\.|shared_expert\.)?"
_Rule = tuple[str, int, _Cut]
_VOCABULARY: tuple[_Rule, ...] = (
    (r"(?:embed_tokens|lm_head|wte|embed_in|embed_out)\.weight", 0, _rows),
    (r"lm_head\.bias", 0, _rows),
)
_LLAMA: tuple[_Rule, ...] = (
    *_VOCABULARY,
    (r"self_attn\.q_proj" + _WEIGHT_AND_BIAS, 0, _query_heads),
    (r"self_attn\.[kv]_proj" + _WEIGHT_AND_BIAS, 0, _kv_heads),
    (r"self_attn\.qkv_proj" + _WEIGHT_AND_BIAS, 0, _fused_qkv),
    (r"self_attn\.(?:o_proj|out_proj|dense)\.weight", 1, _query_heads),
    (_MLP + r"(?:gate_proj|up_proj|fc1|c_fc)" + _WEIGHT_AND_BIAS, 0, _rows),
    (_MLP + r"gate_up_proj" + _WEIGHT_AND_BIAS, 0, _halves),
    (_MLP + r"(?:down_proj|fc2|c_proj)\.weight", 1, _rows),
    (r"block_sparse_moe\.experts\.\d+\.w[13]\.weight", 0, _rows),
    (r"block_sparse_moe\.experts\.\d+\.w2\.weight", 1, _rows),
    (r"layers\.\d+\.fc1" + _WEIGHT_AND_BIAS, 0, _rows),
    (r"layers\.\d+\.fc2\.weight", 1, _rows),
)
_GPT2: tuple[_Rule, ...] = (
    *_VOCABULARY,
    (r"attn\.c_attn\.weight", 1, _fused_qkv),
    (r"attn\.c_attn\.bias", 0, _fused_qkv),
    (r"attn\.c_proj\.weight", 0, _query_heads),
    (r"mlp\.c_fc\.weight", 1, _rows),
    (r"mlp\.c_fc\.bias", 0, _rows),
    (r"mlp\.c_proj\.weight", 0, _rows),
)
"""GPT-2 stores its weights transposed, [in, out]."""
_BIGCODE: tuple[_Rule, ...] = (
    *_VOCABULARY,
    (r"attn\.c_attn" + _WEIGHT_AND_BIAS, 0, _fused_qkv),
    (r"attn\.c_proj\.weight", 1, _query_heads),
    (r"mlp\.c_fc" + _WEIGHT_AND_BIAS, 0, _rows),
    (r"mlp\.c_proj\.weight", 1, _rows),
)
_NEOX: tuple[_Rule, ...] = (
    *_VOCABULARY,
    (r"attention\.query_key_value" + _WEIGHT_AND_BIAS, 0, _interleaved_qkv),
    (r"attention\.dense\.weight", 1, _query_heads),
    (r"mlp\.dense_h_to_4h" + _WEIGHT_AND_BIAS, 0, _rows),
    (r"mlp\.dense_4h_to_h\.weight", 1, _rows),
)
_LLAMA_LIKE = (
    "Llama Mistral Mixtral Qwen2 Qwen3 Qwen2Moe Qwen3Moe Gemma Gemma2 Gemma3 Phi Phi3 Olmo Olmo2 "
    "OPT StableLm Starcoder2 SmolLM3 Granite Cohere Cohere2 Glm4 Nemotron Olmo3 SeedOss"
)
_FAMILIES: dict[str, tuple[_Rule, ...]] = {
    **{f"{name}ForCausalLM": _LLAMA for name in _LLAMA_LIKE.split()},
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _BIGCODE,
    "GPTNeoXForCausalLM": _NEOX,
}


@dataclass(frozen=True, slots=True)
class SplitRules:
    """How ranks share the tensors of a model."""

    splits: Mapping[str, Split]
    """By tensor name; what is not here each rank needs whole."""
    obstacle: str
    """Why the model can't be cut for several ranks; empty where it can."""


def find_splits(facts: ModelFacts, tensors: Sequence[SourceTensor]) -> SplitRules:
    """Apply the rules of the model's family to its tensors."""
    rules = _FAMILIES.get(facts.architecture)
    if rules is None:
        return SplitRules({}, f"no rules say how ranks share a {facts.architecture}")
    splits: dict[str, Split] = {}
    obstacle = ""
    for tensor in tensors:
        rule = _find_rule(rules, tensor)
        if rule is None:
            continue
        _, dimension, cut = rule
        sections = cut(tensor.shape[dimension], facts) if dimension < len(tensor.shape) else None
        if sections is None:
            shown = list(tensor.shape)
            obstacle = f"{tensor.name!r} of shape {shown} does not fit the config's heads"
        else:
            splits[tensor.name] = Split(dimension, sections)
    return SplitRules({} if obstacle else splits, obstacle)


def _find_rule(rules: Sequence[_Rule], tensor: SourceTensor) -> _Rule | None:
    return next((rule for rule in rules if _matches(rule[0], tensor.name)), None)


def _matches(pattern: str, name: str) -> bool:
    return re.search(rf"(?:^|\.){pattern}$", name) is not None


def check_ranks(rules: SplitRules, ranks: int) -> None:
    """Raise InvalidRequest unless the model can be cut for so many ranks."""
    if ranks == 1:
        return
    if rules.obstacle:
        raise InvalidRequest(f"{rules.obstacle}: it can't be cut for {ranks} ranks", param="ranks")
    for name, split in rules.splits.items():
        try:
            for rank in range(ranks):
                split.ranges(rank, ranks)
        except InvalidRequest as error:
            raise InvalidRequest(f"{name!r}: {error.message}", param="ranks") from None
