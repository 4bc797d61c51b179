"""MiMo-V2-Flash (sources: its config.json, and transformers' modular_mimo_v2_flash.py)."""

from formats.config.base import DENSE, FULL_ATTENTION, SLIDING_ATTENTION, SPARSE, only
from formats.config.decoder import SIGMOID, DecoderConfig, read_decoder
from formats.config.rope import read_theta, read_yarn_rope
from formats.errors import UnsupportedError
from formats.fields import Fields, shown


def read_mimo_v2_flash(config: Fields) -> DecoderConfig:
    """Sinks, more key heads and another theta where there are windows; values narrower than keys.

    Raises FormatError or UnsupportedError naming the key.
    """
    heads, head_dim = config.integer("num_attention_heads", 1, 2**16), config.integer("head_dim", 1, 2**16)
    v_head_dim = config.integer("v_head_dim", 1, 2**16)
    for key, implemented in {
        "swa_num_attention_heads": heads,
        "swa_head_dim": head_dim,
        "swa_v_head_dim": v_head_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_shared_experts": None,
    }.items():
        only(config, key, implemented)
    rope_theta, swa_rope_theta, rotary_share = _read_rope(config)
    scale = config.nullable("attention_value_scale", config.number)  # transformers has another default
    return read_decoder(
        config,
        model_type="mimo_v2_flash",
        rms_norm_eps=config.number("layernorm_epsilon"),
        rope_theta=rope_theta,
        rope_scaling=None,
        rotary_dim=int(head_dim * rotary_share),
        layer_types=_kinds(config, "hybrid_layer_pattern", FULL_ATTENTION, SLIDING_ATTENTION),
        v_head_dim=v_head_dim,
        attention_value_scale=1.0 if scale is None else scale,
        sliding_window=config.integer("sliding_window_size", 1, 2**31 - 1) + 1,  # which leaves out the token itself
        swa_num_key_value_heads=config.integer("swa_num_key_value_heads", 1, 2**16),
        swa_rope_theta=swa_rope_theta,
        attention_sinks=True,
        full_attention_sinks=False,
        attention_bias=config.boolean("attention_bias", default=False),
        mlp_layer_types=_kinds(config, "moe_layer_freq", DENSE, SPARSE),
        intermediate_size=config.integer("intermediate_size", 1, 2**24),
        num_experts=config.integer("n_routed_experts", 1, 2**20),
        moe_intermediate_size=config.integer("moe_intermediate_size", 1, 2**24),
        scoring_func=SIGMOID,
        norm_topk_prob=config.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=config.number("routed_scaling_factor", 1.0),
        n_group=config.integer("n_group", 1, 2**20, default=1),
        topk_group=config.integer("topk_group", 1, 2**20, default=1),
        e_score_correction_bias=True,
    )


def _read_rope(config: Fields) -> tuple[float, float, float]:
    """(rope_theta, swa_rope_theta, share of a head that turns), as published or as transformers 5.24 saves them."""
    parameters = config.object("rope_parameters") if "rope_parameters" in config else config
    if FULL_ATTENTION in parameters:
        only(config, "rope_scaling", None)
        full, sliding = parameters.object(FULL_ATTENTION), parameters.object(SLIDING_ATTENTION)
        only(full, "rope_type", "default")
        only(sliding, "rope_type", "default")
        share = _rotary_share(full)
        if sliding.number("partial_rotary_factor") != share:
            raise sliding.wrong("partial_rotary_factor", f"{share} as that of {FULL_ATTENTION}")
        return read_theta(full), read_theta(sliding), share
    rope_theta, scaling = read_yarn_rope(config)
    if scaling is not None:
        found = shown(config.raw("rope_scaling", None) or config.raw("rope_parameters"))
        raise UnsupportedError(f"{config.name('rope_scaling')} is {found}, only none is implemented")
    return rope_theta, read_theta(config, "swa_rope_theta"), _rotary_share(config)


def _rotary_share(source: Fields) -> float:
    share = source.number("partial_rotary_factor")
    if not 0 < share <= 1:
        raise source.wrong("partial_rotary_factor", "a share of head_dim")
    return share


def _kinds(config: Fields, key: str, zero: str, one: str) -> tuple[str, ...]:
    """A 0 or 1 per layer, as what they mean."""
    return tuple((zero, one)[kind] for kind in config.integers(key, 0, 1))
