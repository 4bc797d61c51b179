"""GLM-5.3-Flash, text part (source: transformers' configuration_glm5_next.py)."""

from dataclasses import dataclass

from formats.config.base import (
    DENSE,
    FULL_ATTENTION,
    INDEXED_ATTENTION,
    LINEAR_ATTENTION,
    SHARED_INDEX_ATTENTION,
    SILU_CLAMPED,
    SPARSE,
    Activation,
    Where,
    key_of,
    only,
)
from formats.config.deepseek_v3 import Indexer, read_indexer_types
from formats.config.deepseek_v4 import MAX_ITERATIONS, MAX_STREAMS
from formats.config.kimi_linear import KimiLinearConfig
from formats.fields import Fields
from formats.window import in_lanes

LOWER_BOUND = -5.0  # of decays, where nothing is said


@dataclass(frozen=True, kw_only=True)
class Glm5NextConfig(KimiLinearConfig):
    """Kimi Delta Attention and latent attention to pools of tokens that an indexer chooses; several residual streams.

    Nothing turns with its position: qk_rope_head_dim is 0.
    """

    gate_lower_bound: float | None  # of the logarithm of decays; None: decays are Kimi Linear's
    index_kpool: int  # tokens that have one key of the indexer
    hc_mult: int  # residual streams
    hc_sinkhorn_iters: int
    hc_eps: float
    swiglu_limit: float

    @property
    def knows_positions(self) -> bool:
        return False

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return LINEAR_ATTENTION, INDEXED_ATTENTION, SHARED_INDEX_ATTENTION

    @property
    def expert_activation(self) -> Activation:
        return Activation(SILU_CLAMPED, limit=self.swiglu_limit)

    @property
    def streams_width(self) -> int:
        """Values of all residual streams of a token."""
        return self.hc_mult * self.hidden_size

    @property
    def index_n_heads(self) -> int:
        return self._indexer.index_n_heads

    @property
    def index_head_dim(self) -> int:
        return self._indexer.index_head_dim

    @property
    def index_topk(self) -> int:
        """Tokens of all pools that are chosen."""
        return self._indexer.index_topk

    @property
    def _indexer(self) -> Indexer:
        assert self.indexer is not None
        return self.indexer

    @property
    def _index_widths(self) -> int:
        """Of the indexer's keys of all layers."""
        return self.layer_types.count(INDEXED_ATTENTION) * self.index_head_dim

    def cache_values(self, ctx_size: int, chunk_size: int) -> int:
        pools = -(-ctx_size // self.index_kpool)
        return in_lanes(ctx_size) * sum(self.latent_widths) + in_lanes(pools) * self._index_widths

    @property
    def state_values(self) -> int:
        """And keys and gates of tokens of a pool that is not whole."""
        return super().state_values + 2 * self.index_kpool * self._index_widths

    def mixer_values(self, tokens: int) -> int:
        return super().mixer_values(tokens) + tokens * 2 * (self.streams_width + self.index_head_dim)

    def scores_per_token(self, ctx_size: int) -> int:
        return max(ctx_size, self.index_n_heads * -(-ctx_size // self.index_kpool))

    def check(self, where: Where) -> None:
        self.require(where, self.indexer is not None, "indexer", "an object")
        super().check(where)
        whole = self.index_topk % self.index_kpool == 0
        self.require(where, whole, "index_kpool", f"a divisor of index_topk {self.index_topk}")
        self.require(where, self.qk_rope_head_dim == 0, "qk_rope_head_dim", "0")
        bound = self.gate_lower_bound
        self.require(where, bound is None or bound < 0, "gate_lower_bound", "a number below 0")
        self.require(where, self.hc_mult <= MAX_STREAMS, "hc_mult", f"at most {MAX_STREAMS}")
        few = self.hc_sinkhorn_iters <= MAX_ITERATIONS
        self.require(where, few, "hc_sinkhorn_iters", f"at most {MAX_ITERATIONS}")
        for key in ("hc_eps", "swiglu_limit"):
            self.require(where, getattr(self, key) > 0, key, "a number above 0")

    def check_choices(self, where: Where) -> None:
        """transformers hands a choice to the next layer, and no further. Raises FormatError."""
        before = (None, *self.layer_types)
        orphans = [
            layer
            for layer, kind in enumerate(self.layer_types)
            if kind == SHARED_INDEX_ATTENTION and before[layer] != INDEXED_ATTENTION
        ]
        self.require(where, not orphans, "layer_types", f"{SHARED_INDEX_ATTENTION} only behind {INDEXED_ATTENTION}")

    @classmethod
    def read(cls, outer: Fields) -> "Glm5NextConfig":
        """From config.json, nested in its text_config. Raises FormatError or UnsupportedError naming the key."""
        text = outer.object("text_config")
        num_layers = text.integer("num_hidden_layers", 1, 10_000)
        heads = text.integer("num_attention_heads", 1, 2**16)
        for key, implemented in {
            "model_type": "glm5_next_text",
            "attention_bias": False,
            "hidden_act": "silu",
            "index_kpool_always_select_tail": True,
            "num_key_value_heads": heads,
            "qk_rope_head_dim": 0,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }.items():
            only(text, key, implemented)
        if "mlp_layer_types" not in text:  # of which transformers reads nothing else
            only(text, "first_k_dense_replace", 3)
        nope = text.integer("qk_nope_head_dim", 1, 2**16)
        inner = text.integer("moe_intermediate_size", 1, 2**24)
        dense = min(3, num_layers)
        # What linear_attn_config says goes before what is said beside it, as transformers has it.
        linear = text.object("linear_attn_config") if "linear_attn_config" in text else text
        return cls(
            model_type="glm5_next",
            vocab_size=text.integer("vocab_size", 1, 2**31),
            hidden_size=text.integer("hidden_size", 1, 2**24),
            num_hidden_layers=num_layers,
            max_position_embeddings=text.integer("max_position_embeddings", 1, 2**31),
            rms_norm_eps=text.number("rms_norm_eps"),
            tie_word_embeddings=outer.boolean("tie_word_embeddings", default=False),
            layer_types=_read_layer_types(text, num_layers),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=nope,
            rotary_dim=0,
            rope_theta=10000.0,
            rope_scaling=None,
            num_experts=text.integer(key_of(text, "num_local_experts", "n_routed_experts"), 1, 2**20),
            top_k=text.integer("num_experts_per_tok", 1, 2**20),
            moe_intermediate_size=inner,
            mlp_layer_types=tuple(text.strings("mlp_layer_types", [DENSE] * dense + [SPARSE] * (num_layers - dense))),
            intermediate_size=text.integer("intermediate_size", 1, 2**24),
            shared_expert_intermediate_size=inner * text.integer("n_shared_experts", 1, 2**10),
            q_lora_rank=text.integer("q_lora_rank", 1, 2**24),
            kv_lora_rank=text.integer("kv_lora_rank", 1, 2**24),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=0,
            v_head_dim=text.integer("v_head_dim", 1, 2**16),
            n_group=text.integer("n_group", 1, 2**20),
            topk_group=text.integer("topk_group", 1, 2**20),
            norm_topk_prob=text.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=text.number("routed_scaling_factor"),
            indexer=Indexer.read(text, interleaved=False),
            linear_num_heads=_first(linear, "num_heads", text, "linear_num_heads", 2**16),
            linear_head_dim=_first(linear, "head_dim", text, "linear_head_dim", 2**16),
            linear_conv_kernel_dim=_first(linear, "short_conv_kernel_size", text, "linear_conv_kernel_dim", 64),
            gate_lower_bound=_read_lower_bound(text),
            index_kpool=text.integer("index_kpool", 1, 2**20),
            hc_mult=text.integer("hc_mult", 1, MAX_STREAMS),
            hc_sinkhorn_iters=text.integer("hc_sinkhorn_iters", 1, MAX_ITERATIONS),
            hc_eps=text.number("hc_eps"),
            swiglu_limit=text.number("swiglu_limit"),
        )


def _first(linear: Fields, key: str, text: Fields, other: str, most: int) -> int:
    """What linear_attn_config says, or the text_config by another name."""
    if linear is not text and key in linear:
        return linear.integer(key, 1, most)
    return text.integer(other, 1, most)


def _read_lower_bound(text: Fields) -> float | None:
    """Of decays: null is none, but for linear_attn_config with its safe_gate."""
    bound = text.nullable("linear_lower_bound", text.number) if text.states("linear_lower_bound") else LOWER_BOUND
    if "linear_attn_config" not in text:
        return bound
    linear = text.object("linear_attn_config")
    if linear.states("gate_lower_bound"):
        bound = linear.nullable("gate_lower_bound", linear.number)
    return LOWER_BOUND if bound is None and linear.boolean("safe_gate", default=True) else bound


def _read_layer_types(text: Fields, num_layers: int) -> tuple[str, ...]:
    """Latent attention in every fourth layer, or as listed; which of these choose tokens, as in GLM-5."""
    by_position = [INDEXED_ATTENTION if layer % 4 == 3 else LINEAR_ATTENTION for layer in range(num_layers)]
    kinds = text.strings("layer_types", by_position)
    choosing = read_indexer_types(text, num_layers)
    if not len(kinds) == len(choosing) == num_layers:
        key = "layer_types" if len(kinds) != num_layers else key_of(text, "indexer_types", "index_topk_pattern")
        raise text.wrong(key, f"{num_layers} entries")
    latent = (FULL_ATTENTION, INDEXED_ATTENTION)
    return tuple(choice if kind in latent else kind for kind, choice in zip(kinds, choosing, strict=True))
