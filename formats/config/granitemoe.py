"""Granite 3.0 and 3.1 with experts, Granite Swash, and Granite 4.0, most of whose layers are Mamba2.

Sources: configuration_granitemoe.py, _granitemoeshared.py, _granitemoe_swa.py and _granitemoehybrid.py of transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from formats.config.base import FULL_ATTENTION, LINEAR_ATTENTION, SLIDING_ATTENTION, Where, key_of, only
from formats.config.decoder import DecoderConfig, decoder_facts
from formats.config.mamba2 import Mamba2
from formats.config.rope import read_rope
from formats.errors import UnsupportedError
from formats.fields import Fields, shown

OLDER_NAMES = {"mamba": LINEAR_ATTENTION, "attention": FULL_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class GraniteMoeHybridConfig(DecoderConfig):
    """A decoder with Mamba2 in the place of attention in most layers."""

    mamba: Mamba2

    def attends(self, layer: int) -> bool:
        return self.layer_types[layer] == FULL_ATTENTION

    @property
    def known_layer_types(self) -> tuple[str, ...]:
        return FULL_ATTENTION, LINEAR_ATTENTION

    @property
    def state_values(self) -> int:
        return self.layer_types.count(LINEAR_ATTENTION) * self.mamba.state_values

    def mixer_values(self, tokens: int) -> int:
        return max(super().mixer_values(tokens), tokens * self.mamba.values_per_token)

    def check(self, where: Where) -> None:
        super().check(where)
        self.mamba.check(self, where)


def read_granitemoe(config: Fields) -> DecoderConfig:
    """Scales of embedding, scores, residuals and logits. Raises FormatError or UnsupportedError naming the key."""
    of_shared = config.string("model_type") == "granitemoeshared"
    shared = config.integer("shared_intermediate_size", 0, 2**24, default=0) if of_shared else 0
    return DecoderConfig(**_facts(config, model_type="granitemoe", shared_expert_intermediate_size=shared or None))


def read_granitemoe_swa(config: Fields) -> DecoderConfig:
    """As `read_granitemoe`; scores that bring no value, and layers with windows, which turn otherwise.

    Raises FormatError or UnsupportedError naming the key.
    """
    only(config, "no_rope_layers", None)  # which llama.cpp reads and transformers does not
    num_layers = config.integer("num_hidden_layers", 1, 10_000)
    by_place = [SLIDING_ATTENTION if i % 4 else FULL_ATTENTION for i in range(num_layers)]
    layer_types = config.strings("layer_types", by_place)
    return DecoderConfig(
        **_facts(
            config,
            model_type="granitemoe",
            shared_expert_intermediate_size=config.integer("shared_intermediate_size", 0, 2**24, default=0) or None,
            layer_types=tuple(layer_types),
            sliding_window=config.integer("sliding_window", 1, 2**31) if SLIDING_ATTENTION in layer_types else None,
            attention_sinks=True,
            **_read_thetas(config, layer_types),
        )
    )


def _read_thetas(config: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
    """Facts of layer_rope_theta: what layers of one kind turn by, 0 for no positions. As `read_granitemoe_swa`."""
    theta, scaling = read_rope(config)
    facts: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if "layer_rope_theta" not in config:
        return facts
    key = "layer_rope_theta"
    listed = config.numbers(key)
    if len(listed) != len(layer_types):
        raise config.wrong(key, f"{len(layer_types)} entries")
    by_kind = {kind: {t for t, one in zip(listed, layer_types, strict=True) if one == kind} for kind in layer_types}
    full, sliding = by_kind.get(FULL_ATTENTION, {theta}), by_kind.get(SLIDING_ATTENTION, {theta})
    if len(full) > 1 or len(sliding) > 1 or sliding == {0} or not all(t == 0 or t >= 1 for t in full | sliding):
        raise UnsupportedError(
            f"{config.name(key)} is {shown(listed)}, only one number of at least 1 for each of layer_types, or 0 for "
            f"{FULL_ATTENTION}, is implemented"
        )
    (of_full,), (of_sliding,) = full, sliding
    if of_full == 0:
        return facts | {"rope_theta": of_sliding, "full_attention_rope": False}
    return facts | {"rope_theta": of_full, "swa_rope_theta": None if of_sliding == of_full else of_sliding}


def read_granitemoehybrid(config: Fields) -> GraniteMoeHybridConfig:
    """As `read_granitemoe`; without experts, as Granite 4.0 Micro and 350M are, it is refused."""
    if config.raw("num_local_experts", None) == 0:
        raise UnsupportedError(f"{config.name('num_local_experts')} is 0, only models with experts are implemented")
    for key, implemented in {"mamba_proj_bias": False, "mlp_bias": False}.items():
        only(config, key, implemented)
    layer_types = config.strings(key_of(config, "layers_block_type", "layer_types"))
    facts = _facts(
        config,
        model_type="granitemoehybrid",
        layer_types=tuple(OLDER_NAMES.get(name, name) for name in layer_types),
        full_attention_rope=config.string("position_embedding_type", "nope") == "rope",
        shared_expert_intermediate_size=config.integer("shared_intermediate_size", 1, 2**24),
        mamba=Mamba2.read(config),
    )
    return GraniteMoeHybridConfig(**facts)


def _facts(config: Fields, **facts: Any) -> dict[str, Any]:
    """What all Granites have."""
    only(config, "hidden_act", "silu")
    bias = config.boolean("attention_bias", default=False)
    return decoder_facts(
        config,
        num_experts=config.integer("num_local_experts", 1, 2**20),
        moe_intermediate_size=config.integer("intermediate_size", 1, 2**24),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_multiplier=config.number("attention_multiplier", 1.0),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_scaling=config.number("logits_scaling", 1.0),
        **facts,
    )
