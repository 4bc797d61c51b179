"""Hunyuan 4: latent attention with sinks and gates, residual streams that stay apart."""

from collections.abc import Mapping
from dataclasses import replace

from formats.config import INDEXED_ATTENTION, SHARED_INDEX_ATTENTION, HyV4Config
from formats.families.deepseek import DEEPSEEK_V3, INDEXER, LATENT_ATTENTION, POST_MLP_NORM, deepseek_dims
from formats.families.shared import DENSE_MLP, FUSED, PER_EXPERT, stream_dims
from formats.family import FINAL_NORM, Tensor


def _dims(config: HyV4Config) -> Mapping[str, int]:
    own = {"2": 2, "2N": 2 * config.hc_mult, "heads": config.num_attention_heads}
    return {**deepseek_dims(config), **stream_dims(config), **own}


def _connection(half: str, module: str) -> tuple[Tensor, ...]:
    """What weighs the residual streams before and after one half of a layer."""
    return tuple(
        Tensor(
            f"{half}_hc.{what}",
            shape,
            keep=True,
            suffix="",
            dtype="F32",
            source=f"{module}.hc_pre.hc_{what}",
            also=f"hc_pre.{module}.hc_{what}",  # as transformers saves it again
        )
        for what, shape in (("fn", "2N ND"), ("base", "2N"), ("scale", "2"))
    )


def _head(what: str, shape: str) -> Tensor:
    """What weighs the streams behind the last layer; transformers saves it by other names, VL's by a third."""
    source, saved = f"hc_head.hc_head_{what}", f"hc_pre.hc_head.hc_head_{what} hc_head.hc_pre.hc_head_{what}"
    return Tensor(f"hc_head.{what}", shape, keep=True, suffix="", dtype="F32", source=source, also=saved)


def _gate_renamed(tensor: Tensor) -> Tensor:
    """transformers saves every gate_proj as if it were attention's."""
    renamed = tensor.name.endswith("gate_proj")
    return tensor._replace(also=tensor.name.replace("gate_proj", "linear_gate")) if renamed else tensor


_ATTENTION = (
    *LATENT_ATTENTION,
    Tensor("self_attn.g_proj", "O D", source="self_attn.linear_gate"),
    Tensor("self_attn.sinks", "heads", suffix="", dtype="F32", source="self_attn.learnable_sink_param"),
)
HY_V4 = replace(
    DEEPSEEK_V3,
    prefixes=("model.", "model.language_model."),
    dims=_dims,
    before_mixer=(*_connection("attn", "hc_attn_layer"), *DEEPSEEK_V3.before_mixer),
    mixers={INDEXED_ATTENTION: _ATTENTION + INDEXER, SHARED_INDEX_ATTENTION: _ATTENTION},
    after_mixer=(*_connection("ffn", "hc_mlp_layer"), *DEEPSEEK_V3.after_mixer),
    dense=tuple(map(_gate_renamed, DENSE_MLP)),
    moe=tuple(_gate_renamed(tensor) for tensor in DEEPSEEK_V3.moe if tensor.name != POST_MLP_NORM.name),
    unread=(),
    expert_layouts=(FUSED, PER_EXPERT),
    last=(_head("fn", "N ND"), _head("base", "N"), _head("scale", "1"), FINAL_NORM),
    mlx=False,
    skipped={
        "model.mtp_layers.": "multi-token prediction",
        "vit.": "the vision tower",
        "model.vision_tower.": "the vision tower",
    },
    extra_layers="",
)
