"""Cohere's Command A+ and North Mini Code (sources: transformers' configuration_cohere2_moe.py and
modeling_cohere2_moe.py, llama.cpp's conversion/command_r.py).
"""

from dataclasses import dataclass

from formats.config.base import DENSE, FULL_ATTENTION, MEAN_NORMS, SLIDING_ATTENTION, SPARSE, Where, only
from formats.config.decoder import CHOSEN_SIGMOID, SIGMOID, SOFTMAX, DecoderConfig, decoder_facts
from formats.config.rope import source_of
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

AVERAGE, SUM = "average", "sum"
RMS_EPS = "rms_norm_eps"


@dataclass(frozen=True, kw_only=True)
class Cohere2MoeConfig(DecoderConfig):
    """A decoder whose attention and experts read the same, side by side."""

    layer_norm: bool  # norms subtract the mean
    dense_rope: bool  # dense layers know positions, whatever they attend to
    average_shared_expert: bool  # what routed experts and the shared one give is halved

    @property
    def one_call(self) -> bool:
        return False

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return (MEAN_NORMS,) if self.layer_norm else ()

    def turns(self, layer: int) -> bool:
        return super().turns(layer) or (self.dense_rope and not self.has_experts(layer))

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.residual_multiplier == 1, "residual_multiplier", "1")
        self.require(where, self.input_norms, "input_norms", "true")
        self.require(where, not self.output_norms, "output_norms", "false")


def read_cohere2_moe(config: Fields) -> Cohere2MoeConfig:
    """Layers with a window know positions, the others do not, but for dense ones.

    Raises FormatError or UnsupportedError naming the key.
    """
    for key, value in {
        "hidden_act": "silu",
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,  # which transformers does not read; rope_parameters may be scaled
        "rotary_pct": 1.0,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    }.items():
        only(config, key, value)
    only(source_of(config, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
    config.integer("head_dim", 1, 2**16)
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    num_dense = config.integer("first_k_dense_replace", 0, num_layers, default=0)
    dense_every = config.integer("prefix_dense_sliding_window_pattern", 1, 10_000, default=1)
    every = config.integer("sliding_window_pattern", 1, 10_000, default=4)
    by_place = _slides(num_dense, dense_every) + _slides(num_layers - num_dense, every)
    layer_types = tuple(config.strings("layer_types", by_place))
    mlp_layer_types = tuple(
        config.strings("mlp_layer_types", [DENSE] * num_dense + [SPARSE] * (num_layers - num_dense))
    )
    width = config.integer("intermediate_size", 1, 2**24)
    shared = config.integer("num_shared_experts", 0, 2**10, default=0)
    combined = _read_one_of(config, "shared_expert_combination_strategy", (AVERAGE, SUM))
    scores = _read_one_of(config, "expert_selection_fn", (SOFTMAX, SIGMOID))
    logit_scale = config.number("logit_scale", 0.0625)
    if logit_scale <= 0:
        raise config.wrong("logit_scale", "a number above 0")
    bias = config.boolean("attention_bias", default=False)
    facts = decoder_facts(
        config,
        model_type="cohere2_moe",
        rms_norm_eps=config.number(RMS_EPS) if RMS_EPS in config else config.number("layer_norm_eps", 1e-5),
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=True),
        layer_types=layer_types,
        rope_interleave=True,
        full_attention_rope=False,
        sliding_window=config.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_layer_types=mlp_layer_types,
        intermediate_size=config.integer("prefix_dense_intermediate_size", 1, 2**24, default=width),
        num_experts=config.integer("num_experts", 1, 2**20),
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared * width or None,
        scoring_func=SOFTMAX if scores == SOFTMAX else CHOSEN_SIGMOID,
        norm_topk_prob=scores == SOFTMAX or config.boolean("norm_topk_prob", default=True),
        logits_scaling=1 / logit_scale,
    )
    return Cohere2MoeConfig(
        **facts,
        layer_norm=RMS_EPS not in config,
        dense_rope=dense_every == 1,
        average_shared_expert=bool(shared) and combined == AVERAGE,
    )


def _slides(layers: int, every: int) -> list[str]:
    """Each so many-th has no window."""
    return [SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(layers)]


def _read_one_of(config: Fields, key: str, known: tuple[str, str]) -> str:
    value = config.string(key, known[0])
    if value not in known:
        raise UnsupportedError(f"{config.name(key)} is {shown(value)}, only {' and '.join(known)} are implemented")
    return value
