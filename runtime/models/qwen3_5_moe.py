"""Qwen3.5 MoE, Qwen3-Next: gated DeltaNet in three layers of four, gated attention in the fourth; experts, one shared.

Sources: transformers' modeling_qwen3_5_moe.py (text part) and modeling_qwen3_next.py; for text mRoPE is ordinary RoPE.
Shapes: T tokens of one step, D hidden_size, H heads, d width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise

from formats.config import FULL_ATTENTION, Qwen3_5MoeConfig
from runtime.backends.base import Array, Ops, Routing, State, Turn, Weight
from runtime.session import Sequence


@dataclass(frozen=True)
class Qwen3_5Moe:
    config: Qwen3_5MoeConfig
    ops: Ops

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """What attention takes of projections of its input."""
        return "q", "k", "v"

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""
        return [
            self._new_kv_cache() if layer_type == FULL_ATTENTION else self._new_delta_state()
            for layer_type in self.config.layer_types
        ]

    def forward(self, token_ids: Items[int], sequences: Items[Sequence]) -> Array:
        """Tokens of one step, sequence after sequence -> last hidden states [T, D]; replaces the states."""
        h = self.ops.embed(token_ids)  # [T, D]
        x = self._norm(h, "layers.0.input_layernorm")
        for layer, layer_type in enumerate(self.config.layer_types):
            mixer = self._full_attention if layer_type == FULL_ATTENTION else self._linear_attention
            h, x = self._add_norm(h, mixer(layer, x, sequences), f"layers.{layer}.post_attention_layernorm")
            last = layer + 1 == self.config.num_hidden_layers
            h, x = self._add_norm(h, self._moe(layer, x), "norm" if last else f"layers.{layer + 1}.input_layernorm")
        return x

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    def _norm(self, x: Array, name: str) -> Array:
        """RMSNorm over the last axis; weights are stored around zero."""
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps, offset=1.0)

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        return self.ops.add_norm(h, y, self.ops.weight(name), self.config.rms_norm_eps, offset=1.0)

    # ---- gated attention

    def _new_kv_cache(self) -> State:
        return self.ops.new_kv_cache(self.config.num_key_value_heads, self.config.head_dim)

    def _full_attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.self_attn"
        heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q_gate, k, v, *further = ops.linears(x, [ops.weight(f"{name}.{part}_proj") for part in self.attention_inputs])
        q_gate = q_gate.reshape(-1, heads, 2 * d)  # per head: query, then gate
        q, gate = q_gate[..., :d], q_gate[..., d:]  # [T, heads, d]
        k, v = k.reshape(-1, kv_heads, d), v.reshape(-1, kv_heads, d)
        q_norm, k_norm = (ops.weight(f"{name}.{part}_norm") for part in "qk")
        outputs = []
        for s in sequences:
            turn = Turn(c.rope, s.position, q_norm, k_norm, c.rms_norm_eps, offset=1.0)
            own = [part[s.rows] for part in (q, k, v, *further)]
            outputs.append(self._attend(layer, s, own, turn))  # [tokens, heads, d]
        o = ops.concatenate(outputs) * ops.sigmoid(gate)
        return ops.linear(o.reshape(-1, heads * d), ops.weight(f"{name}.o_proj"))

    def _attend(self, layer: int, s: Sequence, inputs: Items[Array], turn: Turn) -> Array:
        """Attention of a sequence's tokens, whose q, k and v are given; replaces its state: [tokens, heads, d]."""
        q, k, v = inputs
        output, s.states[layer] = self.ops.attention(q, k, v, s.states[layer], self.config.head_dim**-0.5, turn=turn)
        return output

    # ---- gated DeltaNet

    def _new_delta_state(self) -> State:
        c = self.config
        convolution = self.ops.zeros((c.linear_conv_kernel_dim - 1, c.linear_conv_channels))
        recurrent = self.ops.new_delta_state(c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        return convolution, recurrent

    def _linear_attention(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops, name = self.config, self.ops, f"layers.{layer}.linear_attn"
        heads, d = c.linear_num_value_heads, c.linear_value_head_dim

        def w(tensor: str) -> Weight:
            return ops.weight(f"{name}.{tensor}")

        qkvz = ("qkvz",) if c.linear_in_proj_grouped else ("qkv", "z")
        ba = ("ba",) if c.linear_in_proj_ba_grouped else ("b", "a")
        projected = ops.linears(x, [w(f"in_proj_{part}") for part in qkvz + ba])
        qkv, z = self._ungroup_qkvz(projected[0]) if c.linear_in_proj_grouped else projected[:2]
        b, a = self._ungroup_ba(projected[-1]) if c.linear_in_proj_ba_grouped else projected[-2:]
        # qkv [T, channels] is q | k | v; z [T, heads * d]; b, a [T, heads]
        z = z.reshape(-1, heads, d)
        beta = ops.sigmoid(b)
        log_decay = ops.decay(a, w("dt_bias"), w("A_log"))
        outputs = []
        for s in sequences:
            convolution, recurrent = s.states[layer]
            mixed, convolution = ops.causal_conv1d(qkv[s.rows], w("conv1d"), convolution)
            q, k, v = self._split_qkv(ops.silu(mixed))
            output, recurrent = ops.gated_delta_rule(q, k, v, log_decay[s.rows], beta[s.rows], recurrent)
            s.states[layer] = (convolution, recurrent)
            outputs.append(output)  # [tokens, heads, d]
        o = ops.rms_norm(ops.concatenate(outputs), w("norm"), c.rms_norm_eps) * self._output_gate(z)
        return ops.linear(o.reshape(-1, heads * d), w("out_proj"))

    def _output_gate(self, z: Array) -> Array:
        return self.ops.silu(z)

    def _ungroup_qkvz(self, qkvz: Array) -> tuple[Array, Array]:
        """A projection that holds q | k | v | z of one key head after another -> qkv, z."""
        c, ops = self.config, self.ops
        key_heads, values = c.linear_num_key_heads, c.value_heads_per_key_head
        dk, dv = c.linear_key_head_dim, values * c.linear_value_head_dim
        grouped = qkvz.reshape(-1, key_heads, 2 * dk + 2 * dv)
        ends = (0, dk, 2 * dk, 2 * dk + dv, 2 * dk + 2 * dv)
        q, k, v, z = (grouped[..., a:b].reshape(len(qkvz), -1) for a, b in pairwise(ends))
        return ops.concatenate([q, k, v], axis=1), z

    def _ungroup_ba(self, ba: Array) -> tuple[Array, Array]:
        """A projection that holds b | a of one key head after another -> b, a."""
        c = self.config
        grouped = ba.reshape(-1, c.linear_num_key_heads, 2, c.value_heads_per_key_head)
        b, a = (grouped[:, :, i].reshape(len(ba), -1) for i in (0, 1))
        return b, a

    def _split_qkv(self, qkv: Array) -> tuple[Array, Array, Array]:
        """[T, channels] -> q, k [T, heads, dk] of length 1 (q scaled by dk^-0.5), v [T, value heads, dv].

        q and k have a head for each group of value heads that follow each other, or one for each value head.
        """
        c, ops = self.config, self.ops
        dk, dv, key_dim = (
            c.linear_key_head_dim,
            c.linear_value_head_dim,
            c.linear_num_key_heads * c.linear_key_head_dim,
        )
        q = ops.l2_norm(qkv[:, :key_dim].reshape(-1, c.linear_num_key_heads, dk), 1e-6) * dk**-0.5
        k = ops.l2_norm(qkv[:, key_dim : 2 * key_dim].reshape(-1, c.linear_num_key_heads, dk), 1e-6)
        v = qkv[:, 2 * key_dim :].reshape(-1, c.linear_num_value_heads, dv)
        if c.linear_value_heads_tiled:
            key_head = [h % c.linear_num_key_heads for h in range(c.linear_num_value_heads)]
            q, k = q[:, key_head], k[:, key_head]
        return q, k, v

    # ---- mixture of experts

    def _moe(self, layer: int, x: Array) -> Array:
        ops, name = self.ops, f"layers.{layer}.mlp"
        logits, gate = ops.linears(x, [ops.weight(f"{name}.{part}") for part in ("gate", "shared_expert_gate")])
        expert_ids, routing_weights = ops.route(logits, Routing(self.config.top_k))
        ops.fetch(layer, expert_ids)
        ops.look_ahead(layer + 1, lambda: self._guess(layer + 1, x))
        shared = ops.sigmoid(gate) * self._shared_expert(f"{name}.shared_expert", x)  # gate [T, 1]
        return ops.experts(layer, x, expert_ids, routing_weights) + shared

    def _guess(self, layer: int, x: Array) -> Array:
        """The experts that a later layer's router chooses for the input of this one: [T, k]."""
        logits = self.ops.linear(x, self.ops.weight(f"layers.{layer}.mlp.gate"))
        return self.ops.route(logits, Routing(self.config.top_k))[0]

    def _shared_expert(self, name: str, x: Array) -> Array:
        gate, up, down = (self.ops.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.ops.feed_forward(x, gate, up, down)
