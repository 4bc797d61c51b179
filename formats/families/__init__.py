"""Families of models as data, one per model type of the container (formats/family.py says what the words mean)."""

from collections.abc import Mapping

from formats.families.decoders import (
    AFMOE,
    BAILING_MOE,
    DOTS1,
    ERNIE4_5_MOE,
    EXAONE_MOE,
    GLM4_MOE,
    GLM4V_MOE,
    GPT_OSS,
    GRANITEMOE,
    GRANITEMOEHYBRID,
    HUNYUAN_V1_MOE,
    HY_V3,
    LAGUNA,
    LFM2_MOE,
    LLAMA4,
    MELLUM,
    MIMO_V2_FLASH,
    MINIMAX_M2,
    MINIMAX_M3,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_OMNI_MOE,
    QWEN3_VL_MOE,
    SOLAR_OPEN,
)
from formats.families.deepseek import BAILING_HYBRID, DEEPSEEK_V3, KIMI_K3, KIMI_LINEAR, LONGCAT_FLASH
from formats.families.deepseek_v4 import DEEPSEEK_V4
from formats.families.gemma4 import GEMMA4
from formats.families.nemotron_h import NEMOTRON_H
from formats.families.qwen3_5 import QWEN3_5_MOE, QWEN3_NEXT
from formats.families.qwen4_exp import QWEN4_EXP
from formats.family import Family

FAMILIES: Mapping[str, Family] = {
    "afmoe": AFMOE,
    "bailing_hybrid": BAILING_HYBRID,
    "bailing_moe": BAILING_MOE,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v4": DEEPSEEK_V4,
    "dots1": DOTS1,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "exaone_moe": EXAONE_MOE,
    "gemma4": GEMMA4,
    "glm4_moe": GLM4_MOE,
    "glm4v_moe": GLM4V_MOE,
    "gpt_oss": GPT_OSS,
    "granitemoe": GRANITEMOE,
    "granitemoehybrid": GRANITEMOEHYBRID,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "hy_v3": HY_V3,
    "kimi_k3": KIMI_K3,
    "kimi_linear": KIMI_LINEAR,
    "laguna": LAGUNA,
    "lfm2_moe": LFM2_MOE,
    "llama4": LLAMA4,
    "longcat_flash": LONGCAT_FLASH,
    "mellum": MELLUM,
    "mimo_v2_flash": MIMO_V2_FLASH,
    "minimax_m2": MINIMAX_M2,
    "minimax_m3_vl": MINIMAX_M3,
    "mixtral": MIXTRAL,
    "nemotron_h": NEMOTRON_H,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_omni_moe": QWEN3_OMNI_MOE,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen4_exp": QWEN4_EXP,
    "solar_open": SOLAR_OPEN,
}
