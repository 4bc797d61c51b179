"""Layers as what they are made of: the definition, for every backend and any number of sequences.

The native backend does them at once for one token (native_layers.py), which gives the same bits.
"""

from collections.abc import Sequence
from itertools import pairwise

from formats.config import SIGMOID
from runtime.backends.base import Ops
from runtime.backends.facts import (
    Array,
    Attention,
    Block,
    DeltaNet,
    Part,
    Routed,
    Router,
    Shared,
    Stack,
    State,
    Turn,
    Wanted,
)
from runtime.session import Sequence as StepSequence


class ComposedOps:
    """A part of NumpyOps."""

    def layers(
        self: Ops, h: Array, y: Array, stack: Stack, sequences: Sequence[StepSequence], wanted: Wanted = None
    ) -> tuple[Array, Array]:
        last = stack.layers[-1]
        for layer, own in enumerate(stack.layers, stack.first):
            parts = [Part(s.rows, s.position, s.states[layer]) for s in sequences]
            h, routed, states = self.mix_and_route(h, y, own.block, parts, wanted if own is last else None)
            for s, state in zip(sequences, states, strict=True):
                s.states[layer] = state
            self.fetch_routed(layer, routed, own.following)
            y = self.routed_experts(layer, routed, own.shared)
        return h, y

    def self_attention(self: Ops, x: Array, own: Attention, parts: Sequence[Part]) -> tuple[Array, list[State]]:
        q, k, v = self.linears(x, own.projections, own.biases)
        if own.whole_norms is not None:
            q, k = (self.rms_norm(y, norm, own.eps) for y, norm in zip((q, k), own.whole_norms, strict=True))
        q = q.reshape(q.shape[0], own.heads, -1)  # [T, heads, d]
        k, v = (y.reshape(y.shape[0], own.key_heads, -1) for y in (k, v))
        gate = None
        if own.gated:  # per head: query, then gate
            d = q.shape[2] // 2
            q, gate = q[..., :d], q[..., d:]
        outputs, caches = [], []
        for rows, position, before in parts:
            turn = Turn(own.rope, position, own.q_norm, own.k_norm, own.eps, own.offset) if own.rope else None
            output, after = self.attention(
                q[rows], k[rows], v[rows], before, own.scale, window=own.window, sinks=own.sinks, turn=turn
            )
            outputs.append(output)  # [tokens, heads, e]
            caches.append(after)
        o = outputs[0] if len(outputs) == 1 else self.concatenate(outputs)
        if gate is not None:
            o = self.gate(o, gate, SIGMOID)
        return self.linear(o.reshape(o.shape[0], -1), own.output, own.output_bias), caches

    def delta_net(self: Ops, x: Array, own: DeltaNet, parts: Sequence[Part]) -> tuple[Array, list[State]]:
        projected = self.linears(x, own.projections)
        qkv, z = ungroup_qkvz(self, own, projected[0]) if own.grouped_qkvz else projected[:2]
        b, a = ungroup_ba(own, projected[-1]) if own.grouped_ba else projected[-2:]
        # qkv [T, channels] is q | k | v; z [T, heads * d]; b, a [T, heads]
        beta = self.sigmoid(b)
        log_decay = self.decay(a, own.dt_bias, own.a_log)
        outputs, states = [], []
        for rows, _, before in parts:
            mixed, convolution = self.causal_conv1d(qkv[rows], own.conv, before[0])
            q, k, v = split_qkv(self, own, self.silu(mixed))
            output, recurrent = self.gated_delta_rule(q, k, v, log_decay[rows], beta[rows], before[1])
            outputs.append(output)  # [tokens, heads, d]
            states.append((convolution, recurrent))
        o = self.rms_norm(self.concatenate(outputs), own.norm, own.eps)
        o = self.gate(o, z.reshape(-1, own.heads, own.value_dim), own.gate)
        return self.linear(o.reshape(-1, own.heads * own.value_dim), own.output), states

    def route_input(self: Ops, x: Array, router: Router) -> Routed:
        logits, *further = self.linears(x, router.matrices, router.biases)
        return Routed(x, *self.route(logits, router.routing, router.correction), further)

    def rows(self: Ops, x: Array, wanted: Wanted) -> Array:
        return x if wanted is None else self.concatenate([x[part] for part in wanted])

    def mix_and_route(
        self: Ops, h: Array, y: Array, own: Block, parts: Sequence[Part], wanted: Wanted = None
    ) -> tuple[Array, Routed, list[State]]:
        h, x = self.add_norm(h, y, own.input_norm, own.eps, offset=own.offset, multiplier=own.multiplier)
        if isinstance(own.mixer, Attention):
            y, states = self.self_attention(x, own.mixer, parts)
        else:
            y, states = self.delta_net(x, own.mixer, parts)
        h, y = self.rows(h, wanted), self.rows(y, wanted)
        h, x = self.add_norm(h, y, own.post_norm, own.eps, offset=own.offset, multiplier=own.multiplier)
        return h, self.route_input(x, own.router), states

    def fetch_routed(self: Ops, layer: int, routed: Routed, following: Router | None) -> None:
        self.fetch(layer, routed.expert_ids)
        if following is not None:
            self.look_ahead(layer + 1, lambda: self.route_input(routed.x, following).expert_ids)

    def routed_experts(self: Ops, layer: int, routed: Routed, shared: Shared | None = None) -> Array:
        x, expert_ids, routing_weights, further = routed
        if shared is None:
            return self.experts(layer, x, expert_ids, routing_weights)
        y = self.feed_forward(x, *shared)
        if further:
            y = self.sigmoid(further[0]) * y  # [T, 1], [T, D]
        return self.experts(layer, x, expert_ids, routing_weights) + y


def ungroup_qkvz(ops: Ops, own: DeltaNet, qkvz: Array) -> tuple[Array, Array]:
    """A projection that holds q | k | v | z of one key head after another -> qkv, z."""
    dk, dv = own.key_dim, own.heads // own.key_heads * own.value_dim
    grouped = qkvz.reshape(-1, own.key_heads, 2 * dk + 2 * dv)
    ends = (0, dk, 2 * dk, 2 * dk + dv, 2 * dk + 2 * dv)
    q, k, v, z = (grouped[..., a:b].reshape(len(qkvz), -1) for a, b in pairwise(ends))
    return ops.concatenate([q, k, v], axis=1), z


def ungroup_ba(own: DeltaNet, ba: Array) -> tuple[Array, Array]:
    """A projection that holds b | a of one key head after another -> b, a."""
    grouped = ba.reshape(-1, own.key_heads, 2, own.heads // own.key_heads)
    b, a = (grouped[:, :, i].reshape(len(ba), -1) for i in (0, 1))
    return b, a


def split_qkv(ops: Ops, own: DeltaNet, qkv: Array) -> tuple[Array, Array, Array]:
    """[T, channels] -> q, k [T, heads, dk] of length 1 (q scaled by dk^-0.5), v [T, value heads, dv].

    q and k have a head for each group of value heads that follow each other, or one for each value head.
    """
    dk, end = own.key_dim, own.key_heads * own.key_dim
    q = ops.l2_norm(qkv[:, :end].reshape(-1, own.key_heads, dk), own.qk_eps, dk**-0.5)
    k = ops.l2_norm(qkv[:, end : 2 * end].reshape(-1, own.key_heads, dk), own.qk_eps)
    v = qkv[:, 2 * end :].reshape(-1, own.heads, own.value_dim)
    if own.tiled:
        key_head = [h % own.key_heads for h in range(own.heads)]
        q, k = q[:, key_head], k[:, key_head]
    return q, k, v
