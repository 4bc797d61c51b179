"""Phi-3.5-MoE: the plain decoder with norms that subtract the mean, and biases wherever it projects.

Its two experts are chosen by SparseMixer (runtime/backends/numpy_route.py).
Source: transformers' modeling_phimoe.py. Shapes: T tokens of one step, D hidden_size.
"""

from dataclasses import dataclass

from formats.config import PhimoeConfig
from runtime.backends.facts import Array, Router
from runtime.models.decoder import Decoder


@dataclass(frozen=True)
class Phimoe(Decoder):
    config: PhimoeConfig

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""
        bias = self.ops.weight("lm_head.bias") if self.config.lm_head_bias else None
        return self.ops.linear(hidden, self.ops.weight("lm_head"), bias)

    def _add_norm(self, h: Array, y: Array, name: str) -> tuple[Array, Array]:
        h, weight = h + y, self.ops.weight
        return h, self.ops.layer_norm(h, weight(name), weight(f"{name}.bias"), self.config.rms_norm_eps)

    def _router_of(self, layer: int) -> Router:
        router = super()._router_of(layer)
        return router._replace(routing=router.routing._replace(jitter=self.config.router_jitter_noise))
