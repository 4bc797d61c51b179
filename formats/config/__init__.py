"""config.json -> ModelConfig: reads what is used, refuses what is not implemented, never drops mathematics.

One file per family, and one explicit table; what all have in common is in base.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from formats.config.afmoe import read_afmoe
from formats.config.bailing_hybrid import BailingHybridConfig
from formats.config.bailing_moe import read_bailing_moe, read_sarvam_moe
from formats.config.base import (
    CHUNKED_ATTENTION,
    CLAMPED_SILU,
    COMPRESSED_SPARSE_ATTENTION,
    CONV,
    FULL_ATTENTION,
    GELU_TANH,
    HEAVILY_COMPRESSED_ATTENTION,
    INDEXED_ATTENTION,
    LINEAR_ATTENTION,
    RELU2,
    SHARED_INDEX_ATTENTION,
    SILU,
    SILU_CLAMPED,
    SITU,
    SLIDING_ATTENTION,
    SWIGLU_CLAMPED,
    Activation,
    ModelConfig,
    Where,
    language_model,
    only,
)
from formats.config.cohere2_moe import Cohere2MoeConfig, read_cohere2_moe
from formats.config.decoder import (
    CHOSEN_SIGMOID,
    HEAD_NORM,
    NO_GATE,
    SIGMOID,
    SIGMOID_BY_HEAD,
    SOFTMAX,
    SOFTPLUS,
    SOFTPLUS_BY_HEAD,
    SPARSEMIXER,
    SQRT_SOFTPLUS,
    TURNED_NORM,
    UNIT_NORM,
    WHOLE_NORM,
    DecoderConfig,
    Temperature,
)
from formats.config.deepseek_v3 import ABSORBED_VALUES, DeepseekV3Config, Indexer
from formats.config.deepseek_v4 import HASH_MOE, MOE, CompressedConfig, DeepseekV4Config
from formats.config.deepseek_v41 import DeepseekV41Config, Engrams
from formats.config.dots1 import read_dots1
from formats.config.ernie4_5_moe import read_ernie4_5_moe, read_ernie4_5_vl_moe
from formats.config.exaone_moe import read_exaone_moe
from formats.config.flex_olmo import read_flex_olmo
from formats.config.gemma4 import Gemma4Config
from formats.config.glm4_moe import read_glm4_moe, read_glm4v_moe
from formats.config.glm5_next import Glm5NextConfig
from formats.config.gpt_oss import read_gpt_oss
from formats.config.granitemoe import (
    GraniteMoeHybridConfig,
    read_granitemoe,
    read_granitemoe_swa,
    read_granitemoehybrid,
)
from formats.config.hunyuan_v1_moe import read_hunyuan_v1_moe
from formats.config.hy_v3 import read_hy_v3
from formats.config.hy_v4 import HyV4Config
from formats.config.kimi_k3 import KimiK3Config
from formats.config.kimi_linear import KimiLinearConfig
from formats.config.kolibri1 import read_kolibri1
from formats.config.laguna import read_laguna
from formats.config.lfm2_moe import read_lfm2_moe
from formats.config.llama4 import read_llama4
from formats.config.longcat_flash import LongcatFlashConfig, read_longcat_flash
from formats.config.mamba2 import Mamba2
from formats.config.mellum import read_mellum
from formats.config.mimo_v2_flash import read_mimo_v2_flash
from formats.config.minimax_m2 import read_minimax_m2
from formats.config.minimax_m3 import MiniMaxM3Config, read_minimax_m3
from formats.config.mistral4 import read_mistral4
from formats.config.mistral_large4 import MistralLarge4Config
from formats.config.mixtral import read_mixtral
from formats.config.muse_spark import MuseSparkConfig, read_muse_spark
from formats.config.nemotron_h import NemotronHConfig
from formats.config.olmoe import read_olmoe
from formats.config.phimoe import PhimoeConfig, read_phimoe
from formats.config.qwen3_5_moe import Qwen3_5MoeConfig
from formats.config.qwen4_exp import NGrams, Qwen4ExpConfig
from formats.config.qwen_moe import read_qwen2_moe, read_qwen3_moe, read_qwen3_omni_moe, read_qwen3_vl_moe
from formats.config.rope import FACTORS
from formats.config.scaling import Factors, Linear, Llama3, LongRope, Rope, Yarn
from formats.config.solar_open import read_solar_open
from formats.config.step3p5 import Step3p5Config, read_step3p5
from formats.errors import UnsupportedError
from formats.fields import Fields, parse_config, shown

__all__ = [
    "ABSORBED_VALUES",
    "CHOSEN_SIGMOID",
    "CHUNKED_ATTENTION",
    "CLAMPED_SILU",
    "COMPRESSED_SPARSE_ATTENTION",
    "CONFIG_CLASSES",
    "CONV",
    "FACTORS",
    "FULL_ATTENTION",
    "GELU_TANH",
    "HASH_MOE",
    "HEAD_NORM",
    "HEAVILY_COMPRESSED_ATTENTION",
    "INDEXED_ATTENTION",
    "LINEAR_ATTENTION",
    "MODEL_TYPES",
    "MOE",
    "NO_GATE",
    "RELU2",
    "SHARED_INDEX_ATTENTION",
    "SIGMOID",
    "SIGMOID_BY_HEAD",
    "SILU",
    "SILU_CLAMPED",
    "SITU",
    "SLIDING_ATTENTION",
    "SOFTMAX",
    "SOFTPLUS",
    "SOFTPLUS_BY_HEAD",
    "SPARSEMIXER",
    "SQRT_SOFTPLUS",
    "SWIGLU_CLAMPED",
    "TURNED_NORM",
    "UNIT_NORM",
    "WHOLE_NORM",
    "Activation",
    "BailingHybridConfig",
    "Cohere2MoeConfig",
    "CompressedConfig",
    "DecoderConfig",
    "DeepseekV3Config",
    "DeepseekV4Config",
    "DeepseekV41Config",
    "Engrams",
    "Factors",
    "Gemma4Config",
    "Glm5NextConfig",
    "GraniteMoeHybridConfig",
    "HyV4Config",
    "Indexer",
    "KimiK3Config",
    "KimiLinearConfig",
    "Linear",
    "Llama3",
    "LongRope",
    "LongcatFlashConfig",
    "Mamba2",
    "MiniMaxM3Config",
    "MistralLarge4Config",
    "ModelConfig",
    "MuseSparkConfig",
    "NGrams",
    "NemotronHConfig",
    "PhimoeConfig",
    "Qwen3_5MoeConfig",
    "Qwen4ExpConfig",
    "Rope",
    "Step3p5Config",
    "Temperature",
    "Yarn",
    "model_facts",
    "read_config",
    "read_model_facts",
]

_READERS: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "AXK1": DeepseekV3Config.read,
    "afmoe": read_afmoe,
    "axk1": DeepseekV3Config.read,
    "bailing_hybrid": BailingHybridConfig.read,
    "bailing_moe": read_bailing_moe,
    "cohere2_moe": read_cohere2_moe,
    "deepseek_v2": DeepseekV3Config.read,
    "deepseek_v3": DeepseekV3Config.read,
    "deepseek_v32": DeepseekV3Config.read,
    "deepseek_v4": DeepseekV4Config.read,
    "deepseek_v41": DeepseekV41Config.read,
    "dots1": read_dots1,
    "ernie4_5_moe": read_ernie4_5_moe,
    "ernie4_5_vl_moe": read_ernie4_5_vl_moe,
    "exaone_moe": read_exaone_moe,
    "flex_olmo": read_flex_olmo,
    "gemma4": Gemma4Config.read,
    "gemma4_text": Gemma4Config.read,  # the language model saved alone: a flat config
    "glm4_moe": read_glm4_moe,
    "glm4_moe_lite": DeepseekV3Config.read,
    "glm4v_moe": read_glm4v_moe,
    "glm5_next": Glm5NextConfig.read,
    "glm_moe_dsa": DeepseekV3Config.read,
    "hunyuan_v1_moe": read_hunyuan_v1_moe,
    "hy_v3": read_hy_v3,
    "hy_v4": HyV4Config.read,
    "hy_v4_vl": HyV4Config.read,  # Hunyuan 4 in text_config, vision beside it
    "kimi_k2": DeepseekV3Config.read,
    "kimi_k25": DeepseekV3Config.read,  # Kimi K2 in text_config, vision beside it
    "kimi_k3": KimiK3Config.read,
    "kimi_linear": KimiLinearConfig.read,
    "kolibri1": read_kolibri1,
    "gpt_oss": read_gpt_oss,
    "granitemoe": read_granitemoe,
    "granitemoe_swa": read_granitemoe_swa,
    "granitemoehybrid": read_granitemoehybrid,
    "granitemoeshared": read_granitemoe,
    "laguna": read_laguna,
    "lfm2_moe": read_lfm2_moe,
    "llama4": read_llama4,
    "llama4_text": read_llama4,  # the language model saved alone
    "longcat_flash": read_longcat_flash,
    "mellum": read_mellum,
    "mimo_v2_flash": read_mimo_v2_flash,
    "minimax_m2": read_minimax_m2,
    "minimax_m3_vl": read_minimax_m3,
    "mistral3": read_mistral4,  # Mistral Small 4 in text_config, vision beside it
    "mistral4": read_mistral4,  # the language model saved alone
    "mistral_large4": MistralLarge4Config.read,
    "mixtral": read_mixtral,
    "muse_spark": read_muse_spark,
    "nemotron_h": NemotronHConfig.read,
    "olmoe": read_olmoe,
    "phimoe": read_phimoe,
    "qwen2_moe": read_qwen2_moe,
    "qwen3_5_moe": Qwen3_5MoeConfig.read,
    "qwen3_5_moe_text": Qwen3_5MoeConfig.read,  # the language model saved alone: a flat config
    "qwen3_moe": read_qwen3_moe,
    "qwen3_next": Qwen3_5MoeConfig.read,
    "qwen3_omni_moe": read_qwen3_omni_moe,
    "qwen3_vl_moe": read_qwen3_vl_moe,
    "qwen4_exp": Qwen4ExpConfig.read,
    "qwen4_exp_text": Qwen4ExpConfig.read,  # the language model saved alone
    "sarvam_mla": DeepseekV3Config.read,
    "sarvam_moe": read_sarvam_moe,
    "solar_open": read_solar_open,
    "step3p5": read_step3p5,
    "step3p7": read_step3p5,  # Step 3.5 in text_config, vision beside it
}
MODEL_TYPES = tuple(_READERS)  # of config.json
MAY_BE_ZERO = ("qk_rope_head_dim", "rotary_dim", "layer_id", "pad_token_id")  # `check` refuses it where it has no sense
CONFIG_CLASSES: Mapping[str, type[ModelConfig]] = {
    "afmoe": DecoderConfig,
    "bailing_hybrid": BailingHybridConfig,
    "bailing_moe": DecoderConfig,
    "cohere2_moe": Cohere2MoeConfig,
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v4": DeepseekV4Config,
    "deepseek_v41": DeepseekV41Config,
    "dots1": DecoderConfig,
    "ernie4_5_moe": DecoderConfig,
    "ernie4_5_vl_moe": DecoderConfig,
    "exaone_moe": DecoderConfig,
    "flex_olmo": DecoderConfig,
    "gemma4": Gemma4Config,
    "glm4_moe": DecoderConfig,
    "glm4v_moe": DecoderConfig,
    "glm5_next": Glm5NextConfig,
    "gpt_oss": DecoderConfig,
    "granitemoe": DecoderConfig,
    "granitemoehybrid": GraniteMoeHybridConfig,
    "hunyuan_v1_moe": DecoderConfig,
    "hy_v3": DecoderConfig,
    "hy_v4": HyV4Config,
    "kimi_k3": KimiK3Config,
    "kimi_linear": KimiLinearConfig,
    "kolibri1": DecoderConfig,
    "laguna": DecoderConfig,
    "lfm2_moe": DecoderConfig,
    "llama4": DecoderConfig,
    "longcat_flash": LongcatFlashConfig,
    "mellum": DecoderConfig,
    "mimo_v2_flash": DecoderConfig,
    "minimax_m2": DecoderConfig,
    "minimax_m3_vl": MiniMaxM3Config,
    "mistral_large4": MistralLarge4Config,
    "mixtral": DecoderConfig,
    "muse_spark": MuseSparkConfig,
    "nemotron_h": NemotronHConfig,
    "olmoe": DecoderConfig,
    "phimoe": PhimoeConfig,
    "qwen2_moe": DecoderConfig,
    "qwen3_5_moe": Qwen3_5MoeConfig,
    "qwen3_moe": DecoderConfig,
    "qwen3_next": Qwen3_5MoeConfig,
    "qwen3_omni_moe": DecoderConfig,
    "qwen3_vl_moe": DecoderConfig,
    "qwen4_exp": Qwen4ExpConfig,
    "solar_open": DecoderConfig,
    "step3p5": Step3p5Config,
}


def read_config(raw: bytes, where: str = "config.json") -> ModelConfig:
    """Read a checkpoint's config.json.

    Raises FormatError for wrong values and UnsupportedError for an architecture or a value that is not
    implemented, each naming the key.
    """
    outer = Fields(parse_config(raw, where), where)
    reader = _of_model_type(_READERS, outer)
    only(language_model(outer), "is_causal", True)  # transformers reads it in every model
    config = reader(outer)
    config.check(Where.of_config(outer))
    return config


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """The index's form of a config."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def read_model_facts(facts: Fields) -> ModelConfig:
    """Read the index's form strictly. Raises FormatError or UnsupportedError."""
    kind = _of_model_type(CONFIG_CLASSES, facts)
    config: ModelConfig = _read_dataclass(kind, facts)
    config.check(Where.of_index(facts))
    return config


def _read_dataclass(kind: type[Any], facts: Fields) -> Any:
    hints = get_type_hints(kind)
    values = {
        field.name: _read_fact(hints[field.name], facts, field.name)
        for field in fields(kind)
        if field.default is MISSING or facts.states(field.name)  # facts with a default came later than some containers
    }
    facts.close()
    return kind(**values)


def _read_fact(hint: Any, facts: Fields, key: str) -> Any:
    if hint is int:
        return facts.integer(key, 0 if key in MAY_BE_ZERO else 1, 2**31)
    if hint is float:
        return facts.number(key)
    if hint is bool:
        return facts.boolean(key)
    if hint is str:
        return facts.string(key)
    if get_args(hint) == (str, ...):
        return tuple(facts.strings(key))
    if get_args(hint) == (int, ...):
        return tuple(facts.integers(key))
    if get_args(hint) == (float, ...):
        return tuple(facts.numbers(key))
    if is_dataclass(hint):
        return _read_dataclass(hint, facts.object(key))  # type: ignore[arg-type]  # a class, not an object
    kinds = [arg for arg in get_args(hint) if arg is not type(None)]
    return facts.nullable(key, lambda key: _read_fact(_kind_that_fits(kinds, facts, key), facts, key))


def _kind_that_fits(kinds: list[Any], facts: Fields, key: str) -> Any:
    """Of several dataclasses the one whose fields the object has; the first if none fits, to say what is wrong."""
    if len(kinds) == 1:
        return kinds[0]
    found = facts.mapping(key).keys()
    return next((kind for kind in kinds if {field.name for field in fields(kind)} == found), kinds[0])


def _of_model_type(table: Mapping[str, Any], source: Fields) -> Any:
    model_type = source.string("model_type")
    if model_type not in table:
        raise UnsupportedError(f"{source.name('model_type')} is {shown(model_type)}, supported are {', '.join(table)}")
    return table[model_type]
