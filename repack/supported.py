"""What can be converted, for people: `repack families` and the table of the README are made from this.

tests/repack/test_supported.py keeps it complete: one row per model_type that formats/config reads.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from formats.config.base import (
    INDEXER_CHOICE,
    MEAN_NORMS,
    NGRAM_GATES,
    POSITION_SCALES,
    ROUNDING,
    SPARSEMIXER_CHOICE,
    STREAM_GATES,
)


class Supported(NamedTuple):
    """A model_type of config.json."""

    model_type: str
    models: str  # that people know
    encodings: str  # in which a whole conversion and run is compared with the reference
    reference: str  # whose logits, greedy ids and chosen experts are met
    test: str  # the file that compares


class SourceEncoding(NamedTuple):
    """How weights may arrive, whatever the model."""

    name: str
    carriers: str  # what writes it
    kept_as: str  # encoding of the container at default options


DECODERS = "tests/runtime/test_decoders.py"
DEEPSEEK = "tests/runtime/test_deepseek.py"
QWEN3_5 = "tests/runtime/test_reference.py"
TRANSFORMERS, TRANSFORMERS_24, MLX_LM = "transformers 5.23", "transformers 5.24", "mlx-lm 0.32.2"
SUPPORTED: Sequence[Supported] = (
    Supported("AXK1", "A.X-K1 as first published", "bf16", TRANSFORMERS_24, DEEPSEEK),
    Supported("afmoe", "Trinity-Nano, Mini, Large", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("axk1", "A.X-K1", "bf16", TRANSFORMERS_24, DEEPSEEK),
    Supported("bailing_hybrid", "Ling-3.0-Flash, Ling-3.0-tiny", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("bailing_moe", "Ling 2, Ring 2", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("cohere2_moe", "Command A+, North Mini Code", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("deepseek_v2", "DeepSeek-V2, V2-Lite, Coder-V2, Coder-V2-Lite", "bf16, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("deepseek_v3", "DeepSeek-V3, R1, V3.1; Moonlight", "bf16, FP8, MLX, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("deepseek_v32", "DeepSeek-V3.2", "bf16, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("deepseek_v4", "DeepSeek-V4-Flash, Pro", "FP8 with FP4 experts, bf16, GGUF", TRANSFORMERS, DECODERS),
    Supported("deepseek_v41", "DeepSeek-V4.1-Flash (text)", "FP8 with FP4 experts, bf16, MLX", MLX_LM, DECODERS),
    Supported("dots1", "dots.llm1", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("ernie4_5_moe", "ERNIE-4.5-21B-A3B, 300B-A47B (text)", "bf16, GGUF", TRANSFORMERS, DECODERS),
    Supported(
        "ernie4_5_vl_moe",
        "ERNIE-4.5-VL-28B-A3B, 424B-A47B (text), as transformers has them",
        "bf16",
        TRANSFORMERS_24,
        DECODERS,
    ),
    Supported("exaone_moe", "K-EXAONE-236B-A23B", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("flex_olmo", "FlexOlmo-7x7B-1T", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("gemma4", "Gemma-4-26B-A4B (text)", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("gemma4_text", "the language model of Gemma 4 alone", "bf16", TRANSFORMERS, DECODERS),
    Supported("glm4_moe", "GLM-4.5, 4.6, 4.7, Air", "bf16, FP8, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("glm4_moe_lite", "GLM-4.7-Flash", "bf16, MLX, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("glm4v_moe", "GLM-4.5V, 4.6V (text)", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("glm5_next", "GLM-5.3-Flash (text)", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("glm_moe_dsa", "GLM-5, 5.1, 5.2", "bf16, FP8, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("gpt_oss", "gpt-oss-20b, 120b", "MXFP4, bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("granitemoe", "Granite 3.0 and 3.1 MoE", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("granitemoe_swa", "Granite Swash 3B-A600M", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("granitemoehybrid", "Granite-4.0-H-Tiny, H-Small", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("granitemoeshared", "Granite MoE with a shared expert", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("hunyuan_v1_moe", "Hunyuan-A13B", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("hy_v3", "Hunyuan 3 (Hy3)", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("hy_v4", "Hunyuan 4 (Hy4-preview)", "bf16, MXFP8", TRANSFORMERS_24, DECODERS),
    Supported("hy_v4_vl", "Hunyuan 4 VL (text)", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("kimi_k2", "Kimi-K2-Instruct, K2-Thinking", "bf16, FP8, INT4, GGUF", TRANSFORMERS, DEEPSEEK),
    Supported("kimi_k25", "Kimi-K2.5, K2.6, K2.7 (text)", "INT4, NVFP4, MLX", TRANSFORMERS, DEEPSEEK),
    Supported("kimi_k3", "Kimi-K3 (text)", "MXFP4, bf16, MLX, GGUF", MLX_LM, DECODERS),
    Supported("kimi_linear", "Kimi-Linear-48B-A3B", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("kolibri1", "Kolibri-1", "FP8, bf16", TRANSFORMERS_24, DECODERS),
    Supported("laguna", "Laguna-XS.2", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("lfm2_moe", "LFM2-8B-A1B, 24B-A2B", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("llama4", "Llama-4-Scout, Maverick (text)", "bf16, FP8, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("llama4_text", "the language model of Llama 4 alone", "bf16", TRANSFORMERS, DECODERS),
    Supported("longcat_flash", "LongCat-Flash-Chat", "bf16, MLX", TRANSFORMERS_24, DECODERS),
    Supported("mellum", "Mellum 2", "bf16, MLX", TRANSFORMERS_24, DECODERS),
    Supported("mimo_v2_flash", "MiMo-V2-Flash", "FP8, bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("minimax_m2", "MiniMax-M2, M2.1, M2.5, M2.7", "FP8, bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("minimax_m3_vl", "MiniMax-M3 (text)", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("mistral3", "Mistral-Small-4-119B (text)", "FP8, bf16, MLX, GGUF", TRANSFORMERS_24, DEEPSEEK),
    Supported("mistral4", "the language model of Mistral Small 4 alone", "bf16", TRANSFORMERS_24, DEEPSEEK),
    Supported("mistral_large4", "Mistral-Large-4-1T-A52B (text)", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("mixtral", "Mixtral-8x7B, 8x22B", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("muse_spark", "Muse-Spark-Open-816B-A42B (text)", "bf16, NVFP4, MLX", TRANSFORMERS_24, DECODERS),
    Supported(
        "nemotron_h",
        "Nemotron-3-Nano-30B-A3B, Super-120B-A12B",
        "bf16, FP8, NVFP4, MLX, GGUF",
        TRANSFORMERS_24,
        DECODERS,
    ),
    Supported("olmoe", "OLMoE-1B-7B", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("phimoe", "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE", "bf16, MLX", TRANSFORMERS_24, DECODERS),
    Supported("qwen2_moe", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "bf16, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported(
        "qwen3_5_moe",
        "Qwen3.5-397B-A17B, 122B-A10B, 35B-A3B; Qwen3.6-35B-A3B",
        "bf16, FP8, GPTQ, NVFP4, MLX, GGUF",
        TRANSFORMERS,
        DECODERS,
    ),
    Supported("qwen3_5_moe_text", "the language model of Qwen3.5 alone", "bf16", TRANSFORMERS, QWEN3_5),
    Supported(
        "qwen3_moe",
        "Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder",
        "bf16, FP8, GPTQ, AWQ, NVFP4, MLX, GGUF",
        TRANSFORMERS,
        DECODERS,
    ),
    Supported("qwen3_next", "Qwen3-Next-80B-A3B, Qwen3-Coder-Next", "bf16, FP8, MLX, GGUF", TRANSFORMERS, DECODERS),
    Supported("qwen3_omni_moe", "Qwen3-Omni-30B-A3B (text of its thinker)", "bf16", TRANSFORMERS_24, DECODERS),
    Supported("qwen3_vl_moe", "Qwen3-VL-30B-A3B, 235B-A22B (text)", "bf16, FP8, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("qwen4_exp", "Qwen3.8-Flash-Next (text)", "bf16, FP8, GGUF", TRANSFORMERS, DECODERS),
    Supported("qwen4_exp_text", "the language model of Qwen3.8-Flash-Next alone", "bf16", TRANSFORMERS, DECODERS),
    Supported("sarvam_mla", "Sarvam-105B", "bf16", TRANSFORMERS_24, DEEPSEEK),
    Supported("sarvam_moe", "Sarvam-30B", "bf16, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("solar_open", "Solar-Open-100B", "bf16, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("step3p5", "Step-3.5-Flash", "bf16, FP8, MLX, GGUF", TRANSFORMERS_24, DECODERS),
    Supported("step3p7", "Step-3.7-Flash (text)", "bf16", TRANSFORMERS_24, DECODERS),
)
SOURCE_ENCODINGS: Sequence[SourceEncoding] = (
    SourceEncoding("bf16, f16, f32", "safetensors", "affine, 4 bits"),
    SourceEncoding(
        "FP8 E4M3, blocks of 128 × 128 or 32 × 32, per channel or per matrix",
        "DeepSeek, Qwen, Mistral, compressed-tensors, Quark",
        "affine, 4 bits",
    ),
    SourceEncoding("MXFP8", "MLX, compressed-tensors, ModelOpt, DeepSeek", "affine, 4 bits"),
    SourceEncoding(
        "INT4 and INT8 pack-quantized, INT8 int-quantized (W8A8), with or without zero points",
        "compressed-tensors (Kimi, RedHatAI)",
        "symmetric or zero_point, exact",
    ),
    SourceEncoding("MXFP4", "gpt-oss, compressed-tensors, DeepSeek, MLX, AutoRound, Quark", "mxfp4, exact"),
    SourceEncoding("NVFP4", "ModelOpt, compressed-tensors, AutoRound", "nvfp4, exact"),
    SourceEncoding("affine, 2 to 8 bits", "MLX", "affine, exact"),
    SourceEncoding(
        "Q4_0, Q8_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ1, IQ2, IQ3, IQ4, MXFP4",
        "GGUF of " + ", ".join(row.model_type for row in SUPPORTED if "GGUF" in row.encodings),
        "symmetric, affine, q2_k to q6_k, iq1_s to iq4_xs or mxfp4, exact",
    ),
    SourceEncoding(
        "GPTQ without act-order, AWQ",
        "GPTQModel, AutoAWQ, AutoRound (2, 3, 4 and 8 bits)",
        "zero_point or symmetric, exact",
    ),
)
# What no native kernel computes (ModelConfig.numpy_parts), and of which types of models.
NUMPY_PARTS: Mapping[str, Sequence[str]] = {
    SPARSEMIXER_CHOICE: ("phimoe",),
    MEAN_NORMS: (
        *("cohere2_moe", "deepseek_v32", "glm5_next", "glm_moe_dsa"),
        *("hy_v4", "hy_v4_vl", "mistral_large4", "phimoe"),
    ),
    INDEXER_CHOICE: (
        *("deepseek_v32", "deepseek_v4", "deepseek_v41", "glm5_next", "glm_moe_dsa"),
        *("hy_v4", "hy_v4_vl", "minimax_m3_vl", "mistral_large4", "qwen4_exp", "qwen4_exp_text"),
    ),
    STREAM_GATES: ("deepseek_v4", "hy_v4", "hy_v4_vl"),
    NGRAM_GATES: ("deepseek_v41", "qwen4_exp", "qwen4_exp_text"),
    POSITION_SCALES: ("mistral_large4",),
    ROUNDING: ("deepseek_v41",),
}
ENCODINGS_TEST = "tests/formats/test_encodings.py"
MODEL_HEAD = ("model_type", "models", "run whole in", "same logits, ids and experts as")
NUMPY_HEAD = ("beside the native kernels, NumPy computes", "of")
ENCODING_HEAD = ("weights arrive as", "from", "experts are kept as, by default")


def model_rows() -> list[tuple[str, ...]]:
    """One row per model type, for a table."""
    return [(row.model_type, row.models, row.encodings, f"{row.reference} ({row.test})") for row in SUPPORTED]


def numpy_rows() -> list[tuple[str, str]]:
    """One row per part of models that no kernel computes, for a table."""
    return [(part, ", ".join(model_types)) for part, model_types in NUMPY_PARTS.items()]


def numpy_markdown() -> str:
    """That table alone."""
    return _markdown(NUMPY_HEAD, numpy_rows())


def markdown() -> str:
    """The tables for the README."""
    models = [(f"`{row[0]}`", *row[1:3], row[3].replace("(", "(`").replace(")", "`)")) for row in model_rows()]
    return f"{_markdown(MODEL_HEAD, models)}\n\n{_markdown(ENCODING_HEAD, SOURCE_ENCODINGS)}\n\n{numpy_markdown()}\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
