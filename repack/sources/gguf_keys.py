"""The metadata of one architecture in a GGUF file, with getters that name what is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formats.errors import FormatError, UnsupportedError
from formats.fields import shown

Metadata = Mapping[str, Any]
Config = dict[str, Any]
MOST, MOST_LAYERS = 2**31, 10_000
SOFTMAX, SIGMOID = 1, 2  # of expert_gating_func


class Keys:
    """Metadata of one architecture: `keys["block_count"]` is what stands under `qwen3moe.block_count`."""

    def __init__(
        self,
        metadata: Metadata,
        architecture: str,
        tensors: Mapping[str, Sequence[int]],
        rope_factors: Sequence[float] | None,
        where: str,
    ) -> None:
        self._metadata = metadata
        self._tensors = tensors
        self.rope_factors = rope_factors  # of the tensor rope_freqs.weight: how much slower each pair turns
        self.architecture = architecture
        self.where = where
        self.notes: list[str] = []  # what was assumed where a key is missing

    def get(self, key: str, default: Any = None) -> Any:
        """The value, float32 numbers as the shortest decimal that means them."""
        return _shortest(self._metadata.get(f"{self.architecture}.{key}", default))

    def __getitem__(self, key: str) -> Any:
        """The value, which must be there and a number. Raises FormatError."""
        value = self.get(key)
        if value is None:
            raise FormatError(f"{self.where}: {self.architecture}.{key} is missing")
        if type(value) not in (int, float):
            raise FormatError(f"{self.where}: {self.architecture}.{key} is {shown(value)}, expected a number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 that something is divided by, or that is counted to. Raises FormatError."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) is not int or not 0 < value < MOST:
            raise FormatError(
                f"{self.where}: {self.architecture}.{key} is {shown(value)}, expected a whole number from 1 to {MOST}"
            )
        return value

    @property
    def layers(self) -> int:
        """Of the model, those that predict further tokens not counted. Raises FormatError."""
        beyond = self.get("nextn_predict_layers", 0)
        layers = self.size("block_count") - (beyond if type(beyond) is int else 0)
        if not 0 < layers <= MOST_LAYERS:
            raise FormatError(
                f"{self.where}: {self.architecture}.block_count leaves {layers} layers, expected 1 to {MOST_LAYERS}"
            )
        return layers

    def items(self, key: str, kind: type, length: int, more: bool = False) -> list[Any]:
        """A list of that length, or longer where that may be. Raises FormatError."""
        values = self.get(key)
        if values is None:
            raise FormatError(f"{self.where}: {self.architecture}.{key} is missing")
        fits = isinstance(values, list) and (len(values) == length or (more and len(values) > length))
        if not fits or not all(type(value) is kind for value in values):
            expected = f"a list of {length} {'or more ' if more else ''}{kind.__name__}"
            raise FormatError(f"{self.where}: {self.architecture}.{key} is {shown(values)}, expected {expected}")
        return [_shortest(value) for value in values]

    def has(self, rest: str, layer: int = 0) -> bool:
        """Whether a layer has a tensor of that name, after `blk.N.`."""
        return f"blk.{layer}.{rest}" in self._tensors

    def shape(self, tensor: str) -> Sequence[int]:
        """Of a matrix, rows first. Raises FormatError."""
        found = self._tensors.get(tensor, ())
        if len(found) != 2:
            raise FormatError(f"{self.where}: {tensor} has shape {list(found)}, expected rows and columns")
        return found

    def only(self, key: str, *implemented: Any) -> None:
        """Raises UnsupportedError for another value than these; a key may be absent."""
        value = self.get(key, implemented[0])
        if value not in implemented:
            expected = " or ".join(map(str, implemented))
            raise UnsupportedError(
                f"{self.where}: {self.architecture}.{key} is {shown(value)}, only {expected} is implemented"
            )


def _shortest(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) else value


def dimensions(keys: Keys) -> Config:
    """What all models have."""
    return {
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys.layers,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "num_attention_heads": keys["attention.head_count"],
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "num_experts_per_tok": keys["expert_used_count"],
    }


def decoder_config(keys: Keys, model_type: str, *, experts: str = "num_experts", whole: bool = True) -> Config:
    """What all decoders have; whole: all of a head turns, else it is the caller who knows how much of it."""
    heads = keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", keys.size("embedding_length") // heads)
    keys.only("attention.value_length", head_dim)
    if whole:
        keys.only("rope.dimension_count", head_dim)
    return dimensions(keys) | {
        "model_type": model_type,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_scaling": rope_scaling(keys),
        experts: keys["expert_count"],
    }


def rope_scaling(keys: Keys) -> Config | None:
    """YaRN's numbers, or None. Raises UnsupportedError for another kind of scaling."""
    keys.only("rope.scaling.type", "none", "yarn")
    keys.only("rope.scaling.attn_factor", 1.0)
    if keys.get("rope.scaling.type") is None:  # which llama.cpp takes for linear
        keys.only("rope.scaling.factor", 1.0, 0.0)
    if keys.get("rope.scaling.type", "none") == "none":
        return None
    factor = keys["rope.scaling.factor"]
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }
    keys.only("rope.scaling.yarn_ext_factor", 1.0)
    if (attention_factor := keys.get("rope.scaling.yarn_attn_factor")) is not None:
        scaling["attention_factor"] = attention_factor
    return scaling


def groups(keys: Keys, published: Mapping[int, tuple[int, int]] | None = None) -> Config:
    """Groups of experts; a file that does not say so has one, as llama.cpp runs it.

    published: by the number of experts, the groups of models whose older files do not say so, and how many are used.
    """
    experts = keys["expert_count"]
    if keys.get("expert_group_count") is None and experts in (published or {}):
        count, used = (published or {})[experts]
        keys.notes.append(
            f"{keys.architecture}.expert_group_count is missing, as in files of older converters: taken for {count} "
            f"groups, of which {used} are used, as the published models of {experts} experts have it"
        )
        return {"n_group": count, "topk_group": used}
    return {"n_group": keys.get("expert_group_count", 1), "topk_group": keys.get("expert_group_used_count", 1)}


def key_heads(keys: Keys, slides: Sequence[bool]) -> tuple[int, int]:
    """Heads of keys in layers without and with a window: each layer has a number of its own in such files.

    Raises FormatError, or UnsupportedError where layers of one kind differ.
    """
    heads = keys.items("attention.head_count_kv", int, keys.size("block_count"))
    full, sliding = ({heads[layer] for layer, kind in enumerate(slides) if kind == slid} for slid in (False, True))
    if len(full) != 1 or len(sliding) != 1:
        raise UnsupportedError(
            f"{keys.where}: {keys.architecture}.attention.head_count_kv differs among layers of one kind"
        )
    return full.pop(), sliding.pop()


def linear_attention_config(keys: Keys, model_type: str) -> Config:
    """Qwen3-Next and its like: gated DeltaNet and attention in turns."""
    config = decoder_config(keys, model_type, whole=False)
    value_heads = keys.size("ssm.time_step_rank")
    head_dim = config["head_dim"]
    if keys.get("attention.recurrent_layers") is not None:
        recurrent = keys.items("attention.recurrent_layers", bool, keys.layers, more=True)[: keys.layers]
        config["layer_types"] = ["linear_attention" if kind else "full_attention" for kind in recurrent]
    return config | {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "full_attention_interval": keys.get("full_attention_interval", 4),
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_value_head_dim": keys["ssm.inner_size"] // value_heads,
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "partial_rotary_factor": keys.size("rope.dimension_count", head_dim // 4) / head_dim,
    }
