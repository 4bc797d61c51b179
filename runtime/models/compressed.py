"""What DeepSeek-V4 and V4.1 share: attention over a window and entries beside it, of one head for keys and values.

Source: transformers' modeling_deepseek_v4.py. Shapes: T tokens of one step, D hidden_size, H heads, d width of a head.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from formats.config import CompressedConfig, Rope
from runtime.backends.base import Ops
from runtime.backends.facts import Array, Beside
from runtime.session import Sequence


@dataclass(frozen=True)
class OverEntries:
    config: CompressedConfig
    ops: Ops

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        return self.ops.linear(hidden, self.ops.weight("lm_head"))

    def _norm(self, x: Array, name: str) -> Array:
        return self.ops.rms_norm(x, self.ops.weight(name), self.config.rms_norm_eps)

    def _turned(self, x: Array, position: int, rope: Rope) -> Array:
        """The last rotary_dim values of x [T, H, d] turned by rows that begin at a position."""
        still = x.shape[2] - rope.dim
        return self.ops.concatenate([x[:, :, :still], self.ops.rope(x[:, :, still:], position, rope)], axis=2)

    def _attend(self, layer: int, s: Sequence, q: Array, kv: Array, rope: Rope, beside: Beside | None) -> Array:
        """Turned queries [tokens, H, d] over the window, which turned kv [tokens, 1, d] joins, and what is beside it.

        Values were turned as keys, and what comes out [tokens, H, d] is turned back.
        """
        output, cache = self.ops.attention(
            q,
            kv,
            kv,
            s.states[layer].cache,
            self.config.head_dim**-0.5,
            window=self.config.sliding_window,
            sinks=self.ops.weight(f"layers.{layer}.self_attn.sinks"),
            beside=beside,
        )
        s.states[layer] = s.states[layer]._replace(cache=cache)
        return self._turned(output, s.position, replace(rope, stride=-1))

    def _projected(self, layer: int, outputs: Items[Array]) -> Array:
        """What attention of each sequence gave, projected in groups of heads and then together: [T, D]."""
        o, name = self.ops.concatenate(outputs), f"layers.{layer}.self_attn"
        o = o.reshape(len(o), self.config.o_groups, -1)
        return self.ops.linear(
            self.ops.grouped_linear(o, self.ops.weight(f"{name}.o_a_proj")), self.ops.weight(f"{name}.o_b_proj")
        )
