"""Granite 4.0: the plain decoder, with Mamba2 in the place of attention in most layers.

Source: transformers' modeling_granitemoehybrid.py. Shapes: T tokens of one step, D hidden_size.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from formats.config import GraniteMoeHybridConfig
from runtime.backends.facts import Array, State
from runtime.models.decoder import Decoder
from runtime.models.mamba2 import mamba2, new_mamba2_state
from runtime.session import Sequence


@dataclass(frozen=True)
class GraniteMoeHybrid(Decoder):
    config: GraniteMoeHybridConfig

    def _new_state(self, layer: int) -> State:
        c = self.config
        return self._new_kv_cache(layer) if c.attends(layer) else new_mamba2_state(self.ops, c.mamba)

    def _mixer(self, layer: int, x: Array, sequences: Items[Sequence]) -> Array:
        c, ops = self.config, self.ops
        if c.attends(layer):
            return self._attention(layer, x, sequences)
        return mamba2(
            ops, c.mamba, c.rms_norm_eps, lambda name: ops.weight(f"layers.{layer}.mamba.{name}"), x, sequences, layer
        )
