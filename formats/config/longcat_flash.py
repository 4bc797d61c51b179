"""LongCat-Flash (sources: transformers' configuration_longcat_flash.py, mlx-lm's longcat_flash.py)."""

from dataclasses import dataclass

from formats.config.base import FULL_ATTENTION, SPARSE, Where, only
from formats.config.decoder import SOFTMAX
from formats.config.deepseek_v3 import DeepseekV3Config
from formats.config.rope import read_yarn_rope, source_of
from formats.fields import Fields


@dataclass(frozen=True, kw_only=True)
class LongcatFlashConfig(DeepseekV3Config):
    """Two halves to a layer, each latent attention and a dense MLP; experts of the first half join behind the second.

    The router chooses among num_experts experts and zero_expert_num that give back what they read.
    """

    zero_expert_num: int

    @property
    def attention_scale(self) -> float:
        """Of scores; queries are made larger by the root of how much wider the stream is than their latents."""
        assert self.q_lora_rank is not None
        return super().attention_scale * (self.hidden_size / self.q_lora_rank) ** 0.5

    @property
    def latent_scale(self) -> float:
        """Of latents that keys and values are made of, likewise."""
        return float((self.hidden_size / self.kv_lora_rank) ** 0.5)

    @property
    def has_correction_bias(self) -> bool:
        return True

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        return 2 * super().cache_values(ctx_size, chunk_size)

    def mixer_values(self, tokens: int) -> int:
        """And what the experts of a layer read, which waits for them, and scores of those that compute nothing."""
        return super().mixer_values(tokens) + tokens * (self.hidden_size + 4 * self.zero_expert_num)

    def check(self, where: Where) -> None:
        super().check(where)
        self.require(where, self.q_lora_rank is not None, "q_lora_rank", "a rank")


def read_longcat_flash(config: Fields) -> LongcatFlashConfig:
    """From config.json. Raises FormatError or UnsupportedError naming the key."""
    nope, rope = config.integer("qk_nope_head_dim", 1, 2**16), config.integer("qk_rope_head_dim", 1, 2**16)
    for key, value in {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "norm_topk_prob": False,
        "router_bias": False,
        "zero_expert_type": "identity",
        "head_dim": rope,
        "qk_head_dim": nope + rope,
    }.items():
        only(config, key, value)
    only(source_of(config, "partial_rotary_factor"), "partial_rotary_factor", 1.0)
    rope_theta, rope_scaling = read_yarn_rope(config)
    num_layers, heads = config.integer("num_layers", 1, 10_000), config.integer("num_attention_heads", 1, 2**16)
    return LongcatFlashConfig(
        model_type="longcat_flash",
        vocab_size=config.integer("vocab_size", 1, 2**31),
        hidden_size=config.integer("hidden_size", 1, 2**24),
        num_hidden_layers=num_layers,
        max_position_embeddings=config.integer("max_position_embeddings", 1, 2**31),
        rms_norm_eps=config.number("rms_norm_eps"),
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        layer_types=(FULL_ATTENTION,) * num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=nope + rope,
        rotary_dim=rope,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        num_experts=config.integer("n_routed_experts", 1, 2**20),
        top_k=config.integer("moe_topk", 1, 2**20),
        moe_intermediate_size=config.integer("expert_ffn_hidden_size", 1, 2**24),
        mlp_layer_types=(SPARSE,) * num_layers,
        intermediate_size=config.integer("ffn_hidden_size", 1, 2**24),
        shared_expert_intermediate_size=None,
        q_lora_rank=config.integer("q_lora_rank", 1, 2**24),
        kv_lora_rank=config.integer("kv_lora_rank", 1, 2**24),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=config.integer("v_head_dim", 1, 2**16),
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=config.number("routed_scaling_factor"),
        indexer=None,
        scoring_func=SOFTMAX,
        zero_expert_num=config.integer("zero_expert_num", 1, 2**20),
    )
