"""What a Hugging Face config says about a model, checked before anything is converted.

Pure: dictionaries in, facts out. Nothing of a checkpoint is executed; a config that asks for code
of its own is refused.
"""

from collections.abc import Mapping, Sequence

from gearfall.core.checkpoint.manifest import ModelFacts
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from gearfall.core.errors import InvalidRequest

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WIDTH = ("hidden_size", "n_embd", "d_model")

Config = Mapping[str, object]


def read_facts(
    config: Config,
    generation_config: Config,
    tensors: Sequence[SourceTensor],
    *,
    has_chat_template: bool,
) -> ModelFacts:
    """Return the facts of a model. Raises InvalidRequest for one that gearfall can't serve."""
    _refuse_remote_code(config)
    heads = _count(config, _HEADS)
    return ModelFacts(
        architecture=_architecture(config),
        parameters=sum(tensor.elements for tensor in tensors),
        context_tokens=_count(config, _CONTEXT),
        vocabulary_size=_count(config, ("vocab_size",)),
        bos_token_id=next(iter(_tokens("bos_token_id", generation_config, config)), None),
        eos_token_ids=_tokens("eos_token_id", generation_config, config),
        dtype=main_dtype(tensors),
        layers=_count(config, _LAYERS),
        kv_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, heads),
        has_chat_template=has_chat_template,
    )


def _refuse_remote_code(config: Config) -> None:
    if config.get("auto_map"):
        raise InvalidRequest(
            "config.json has auto_map: the model asks for code of its own, and nothing is executed "
            "from a checkpoint; if transformers' own class serves it, remove auto_map",
            param="path",
        )


def _architecture(config: Config) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise InvalidRequest("config.json must name one architecture", param="path")
    name = named[0]
    if not (name.isascii() and name.isidentifier() and name.endswith(_CAUSAL_SUFFIXES)):
        raise InvalidRequest(
            f"architecture {name[:80]!r} is not a causal language model (...ForCausalLM)",
            param="path",
        )
    return name


def _count(config: Config, names: Sequence[str]) -> int:
    value = _first(config, names)
    if value is None:
        raise InvalidRequest(f"config.json does not say {names[0]}", param="path")
    return _positive(value, names[0])


def _first(config: Config, names: Sequence[str]) -> object:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _positive(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise InvalidRequest(f"config.json has an impossible {name}", param="path")
    return value


def _kv_heads(config: Config, heads: int) -> int:
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return 1
    value = _first(config, _KV_HEADS)
    return heads if value is None else _positive(value, _KV_HEADS[0])


def _head_dim(config: Config, heads: int) -> int:
    value = config.get("head_dim")
    if value is not None:
        return _positive(value, "head_dim")
    width = _count(config, _WIDTH)
    if width < heads:
        raise InvalidRequest("config.json has more attention heads than width", param="path")
    return width // heads


def _tokens(name: str, *configs: Config) -> tuple[int, ...]:
    """Token ids of the first config that has them: one, several or none."""
    value = next((config[name] for config in configs if config.get(name) is not None), None)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise InvalidRequest(f"the config has an impossible {name}", param="path")
    if len(listed) > 128:
        raise InvalidRequest(f"the config has too many of {name}", param="path")
    return tuple(listed)


def main_dtype(tensors: Sequence[SourceTensor]) -> str:
    """Return the dtype of most bytes."""
    size_of: dict[str, int] = {}
    for tensor in tensors:
        size_of[tensor.dtype] = size_of.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sorted(size_of), key=lambda dtype: size_of[dtype])
