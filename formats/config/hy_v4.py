"""Hunyuan 4, alone and as the text part of Hunyuan 4 VL.

Sources: transformers' configuration_hy_v4.py and configuration_hy_v4_vl.py, and keys of the published config.json.
Neighbouring pairs turn, and norms of latents have rms_norm_eps, in both: so the publisher's ports have it, and
transformers' modeling_hy_v4_vl.py, but not its modeling_hy_v4.py (docs/LEARNED.md 117).
"""

from dataclasses import dataclass

from formats.config.base import (
    DENSE,
    INDEXED_ATTENTION,
    SILU_CLAMPED,
    SPARSE,
    STREAM_GATES,
    Activation,
    Where,
    key_of,
    only,
)
from formats.config.deepseek_v3 import DeepseekV3Config, Indexer, read_indexer_types
from formats.config.deepseek_v4 import MAX_STREAMS
from formats.config.rope import read_yarn_rope, source_of
from formats.config.scaling import SCALES, is_scale
from formats.fields import Fields

VL = "hy_v4_vl"
INDEXER_EVERY, INDEXER_OFFSET = 4, 2  # layers 0, 1, 5, 9... choose, where nothing is said
_NAMES = ([INDEXED_ATTENTION], ["deepseek_sparse_attention"])  # of a layer's attention, the latter as published


@dataclass(frozen=True, kw_only=True)
class HyV4Config(DeepseekV3Config):
    """DeepSeek-V3.2 with sinks and gates on several residual streams, none of which is mixed into another.

    The indexer turns the last values of its heads. Only routed experts cut their gate and up.
    """

    hc_mult: int  # residual streams
    hc_magnitude: float  # of what enters them
    hc_eps: float
    swiglu_limit: float

    @property
    def expert_activation(self) -> Activation:
        return Activation(SILU_CLAMPED, limit=self.swiglu_limit)

    @property
    def numpy_parts(self) -> tuple[str, ...]:
        return (*super().numpy_parts, STREAM_GATES)

    @property
    def streams_width(self) -> int:
        """Values of all residual streams of a token."""
        return self.hc_mult * self.hidden_size

    def mixer_values(self, tokens: int) -> int:
        """And gates of what heads give."""
        gates = 2 * self.num_attention_heads * self.v_head_dim
        return super().mixer_values(tokens) + tokens * (2 * self.streams_width + gates)

    def check(self, where: Where) -> None:
        self.require(where, self.indexer is not None, "indexer", "an object")
        for key in ("kv_b_split", "post_mlp_norm"):
            self.require(where, not getattr(self, key), key, "false")
        super().check(where)
        same = self.num_key_value_heads == self.num_attention_heads
        self.require(where, same, "num_key_value_heads", f"{self.num_attention_heads}, as num_attention_heads")
        self.require(where, self.hc_mult <= MAX_STREAMS, "hc_mult", f"at most {MAX_STREAMS}")
        self.require(where, is_scale(self.hc_magnitude), "hc_magnitude", SCALES)
        for key in ("hc_eps", "swiglu_limit"):
            self.require(where, getattr(self, key) > 0, key, "a number above 0")

    @classmethod
    def read(cls, outer: Fields) -> "HyV4Config":
        """From config.json; of Hunyuan 4 VL, its text_config. Raises FormatError or UnsupportedError naming the key."""
        vision = outer.string("model_type") == VL
        text = outer.object("text_config") if vision else outer
        num_layers = text.integer("num_hidden_layers", 1, 10_000)
        heads = text.integer("num_attention_heads", 1, 2**16)
        for key, implemented in {
            "model_type": "hy_v4_vl_text" if vision else "hy_v4",
            "attention_bias": False,
            "enable_ihc": True,
            "gated_mla": True,
            "gating_type": "elementwise",
            "hidden_act": "silu",
            "index_skip_topk_offset": INDEXER_OFFSET,  # of which transformers reads nothing: indexer_types say it
            "index_topk_freq": INDEXER_EVERY,
            "index_topk_pattern": None,
            "indexer_rope_interleave": True,
            "learnable_sink": True,
            "moe_layer_freq": 1,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "sliding_window": None,
            "topk_method": "noaux_tc",
            "use_dsa": True,
            "use_mla": True,
        }.items():
            only(text, key, implemented)
        if "mlp_layer_types" not in text:  # of which transformers reads nothing else
            only(text, "first_k_dense_replace", 1)
        only(source_of(text, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
        rope_theta, rope_scaling = read_yarn_rope(text)
        nope, rope = text.integer("qk_nope_head_dim", 1, 2**16), text.integer("qk_rope_head_dim", 1, 2**16)
        inner = text.integer("moe_intermediate_size", 1, 2**24)
        return cls(
            model_type="hy_v4",
            vocab_size=text.integer("vocab_size", 1, 2**31),
            hidden_size=text.integer("hidden_size", 1, 2**24),
            num_hidden_layers=num_layers,
            max_position_embeddings=text.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=outer.boolean("tie_word_embeddings", default=False),
            layer_types=_read_layer_types(text, num_layers),
            num_attention_heads=heads,
            num_key_value_heads=heads,  # whatever is stated: keys and values are made of latents
            head_dim=nope + rope,
            rotary_dim=rope,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            num_experts=text.integer(key_of(text, "num_local_experts", "n_routed_experts"), 1, 2**20),
            top_k=text.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=inner,
            mlp_layer_types=tuple(text.strings("mlp_layer_types", [DENSE] + [SPARSE] * (num_layers - 1))),
            intermediate_size=text.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=inner * text.integer("n_shared_experts", 1, 2**10),
            q_lora_rank=text.integer("q_lora_rank", 1, 2**24),
            kv_lora_rank=text.integer("kv_lora_rank", 1, 2**24),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=text.integer("v_head_dim", 1, 2**16),
            n_group=text.integer("n_group", 1, 2**20, default=1),
            topk_group=text.integer("topk_group", 1, 2**20, default=1),
            norm_topk_prob=text.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=text.number("routed_scaling_factor"),
            indexer=Indexer.read(text, interleaved=True),
            hc_mult=text.integer("hc_mult", 1, MAX_STREAMS),
            hc_magnitude=text.number("hc_magnitude", 2.0),
            hc_eps=text.number("hc_eps"),
            swiglu_limit=text.number("swiglu_limit"),
        )


def _read_layer_types(text: Fields, num_layers: int) -> tuple[str, ...]:
    """All layers attend to chosen tokens; some share the choice before theirs."""
    if text.strings("layer_types", _NAMES[0] * num_layers) not in [name * num_layers for name in _NAMES]:
        raise text.wrong("layer_types", f"{num_layers} times {INDEXED_ATTENTION}")
    choosing = read_indexer_types(text, num_layers, INDEXER_EVERY)
    if len(choosing) != num_layers:
        raise text.wrong("indexer_types", f"{num_layers} entries")
    return choosing
