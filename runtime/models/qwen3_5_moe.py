"""Qwen3.5 MoE, Qwen3-Next: gated DeltaNet in three layers of four, gated attention in the fourth; experts, one shared.

Sources: transformers' modeling_qwen3_5_moe.py (text part) and modeling_qwen3_next.py; for text mRoPE is ordinary RoPE.
Shapes: T tokens of one step, D hidden_size, H heads, d width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

from formats.config import FULL_ATTENTION, LINEAR_ATTENTION, SILU, Qwen3_5MoeConfig
from runtime.backends.base import Ops
from runtime.backends.facts import (
    Array,
    Attention,
    Block,
    DeltaNet,
    RoutedLayer,
    Router,
    Routing,
    Shared,
    Stack,
    State,
    Wanted,
    Weight,
)
from runtime.session import Sequence


@dataclass(frozen=True)
class Qwen3_5Moe:
    config: Qwen3_5MoeConfig
    ops: Ops

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""
        return [
            self._new_kv_cache() if layer_type == FULL_ATTENTION else self._new_delta_state()
            for layer_type in self.config.layer_types
        ]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence], wanted: Wanted = None) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        h = self.ops.embed(token_ids)  # [T, D]
        y = h * 0.0
        h, y = self.ops.layers(h, y, self._stack, sequences, wanted)
        return self.ops.add_norm(h, y, self.ops.weight("norm"), self.config.rms_norm_eps, offset=1.0)[1]

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    @cached_property
    def _stack(self) -> Stack:
        """All layers; norms are stored around zero."""
        weight, eps = self.ops.weight, self.config.rms_norm_eps
        names = [
            (f"layers.{i}.input_layernorm", f"layers.{i}.post_attention_layernorm") for i in range(len(self._mixers))
        ]
        norms = [(weight(first), weight(second)) for first, second in names]
        blocks = [
            Block(first, mixer, second, router, eps, offset=1.0)
            for (first, second), mixer, router in zip(norms, self._mixers, self._routers, strict=True)
        ]
        layers = zip(blocks, self._shared, self._routers_after, strict=True)
        return Stack(0, tuple(RoutedLayer(*layer) for layer in layers))

    @cached_property
    def _mixers(self) -> list[Attention | DeltaNet]:
        layer_types = enumerate(self.config.layer_types)
        return [self._delta_net_of(i) if kind == LINEAR_ATTENTION else self._attention_of(i) for i, kind in layer_types]

    # ---- gated attention

    def _new_kv_cache(self) -> State:
        return self.ops.new_kv_cache(self.config.num_key_value_heads, self.config.head_dim)

    def _attention_of(self, layer: int) -> Attention:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        return Attention(
            projections=tuple(ops.weight(f"{name}.{part}_proj") for part in "qkv"),
            biases=None,
            output=ops.weight(f"{name}.o_proj"),
            output_bias=None,
            heads=c.num_attention_heads,
            key_heads=c.num_key_value_heads,
            scale=c.head_dim**-0.5,
            rope=c.rope,
            q_norm=ops.weight(f"{name}.q_norm"),
            k_norm=ops.weight(f"{name}.k_norm"),
            eps=c.rms_norm_eps,
            offset=1.0,
            gated=True,
        )

    # ---- gated DeltaNet

    def _new_delta_state(self) -> State:
        c = self.config
        convolution = self.ops.zeros((c.linear_conv_kernel_dim - 1, c.linear_conv_channels))
        recurrent = self.ops.new_delta_state(c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        return convolution, recurrent

    def _delta_net_of(self, layer: int) -> DeltaNet:
        c, name = self.config, f"layers.{layer}.linear_attn"

        def w(tensor: str) -> Weight:
            return self.ops.weight(f"{name}.{tensor}")

        qkvz = ("qkvz",) if c.linear_in_proj_grouped else ("qkv", "z")
        ba = ("ba",) if c.linear_in_proj_ba_grouped else ("b", "a")
        return DeltaNet(
            projections=tuple(w(f"in_proj_{part}") for part in qkvz + ba),
            conv=w("conv1d"),
            dt_bias=w("dt_bias"),
            a_log=w("A_log"),
            norm=w("norm"),
            output=w("out_proj"),
            key_heads=c.linear_num_key_heads,
            heads=c.linear_num_value_heads,
            key_dim=c.linear_key_head_dim,
            value_dim=c.linear_value_head_dim,
            eps=c.rms_norm_eps,
            qk_eps=1e-6,
            gate=self._output_gate,
            grouped_qkvz=c.linear_in_proj_grouped,
            grouped_ba=c.linear_in_proj_ba_grouped,
            tiled=c.linear_value_heads_tiled,
        )

    @property
    def _output_gate(self) -> str:
        return SILU

    # ---- mixture of experts

    @cached_property
    def _routers(self) -> list[Router]:
        return [self._router_of(f"layers.{layer}.mlp") for layer in range(self.config.num_hidden_layers)]

    @cached_property
    def _routers_after(self) -> list[Router | None]:
        """That of the next layer, for each."""
        return [*self._routers[1:], None]

    def _router_of(self, name: str) -> Router:
        """The router, and what says how much of the shared expert is taken."""
        matrices = (self.ops.weight(f"{name}.gate"), self.ops.weight(f"{name}.shared_expert_gate"))
        return Router(matrices, None, Routing(self.config.top_k))

    @cached_property
    def _shared(self) -> list[Shared]:
        parts, layers = ("gate", "up", "down"), range(self.config.num_hidden_layers)
        return [Shared(*(self.ops.weight(f"layers.{i}.mlp.shared_expert.{p}_proj") for p in parts)) for i in layers]
