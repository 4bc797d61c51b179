"""K-quants of GGUF files, run whole."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from formats.dtypes import AnyArray
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.verify import verify_container
from runtime import Engine
from tests.gguf_files import recorded, write_gguf
from tests.runtime.helpers import PLENTY

AS_IT_ARRIVES = Options(16, 64, 16)
Kind = gguf.GGMLQuantizationType


def random_k_blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> AnyArray:
    """Any codes and scales of a K-quant, its two f16 numbers small and finite."""
    _, nbytes = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, nbytes), np.uint8)
    numbers = np.float16(1 / 256 / shape[-1] ** 0.5) * rng.uniform(0.5, 1.5, (*raw.shape[:-1], 2))
    if kind == Kind.Q6_K:
        numbers[..., 1:] /= 16  # of scales up to 127
        raw[..., 208:] = numbers[..., 1:].astype(np.float16).view(np.uint8)
    else:
        raw[..., :4] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_run_as_the_values_that_gguf_decodes(kind: Kind, tmp_path: Path) -> None:
    """A model of rows wide enough for them: blocks are kept to the bit, and its logits are those of the same floats."""
    metadata = recorded("qwen3_moe")["metadata"] | {
        "qwen3moe.embedding_length": 256,
        "qwen3moe.expert_feed_forward_length": 256,
        "qwen3moe.expert_count": 4,
        "qwen3moe.block_count": 2,
        "qwen3moe.attention.head_count": 8,
    }
    plain: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    for name, shape in qwen3_shapes(metadata).items():
        if len(shape) == 1 or "gate_inp" in name:
            plain[name] = blocks[name] = (rng.standard_normal(shape) / 16 + (len(shape) == 1)).astype(np.float32)
        else:
            raw = random_k_blocks(kind, shape, len(plain))
            blocks[name], plain[name] = raw, gguf.quants.dequantize(raw, kind)
    prompt, found = list(range(3, 40)), {}
    for what, values in (("blocks", blocks), ("plain", plain)):
        path = write_gguf(tmp_path / f"{what}.gguf", metadata, values, kind if what == "blocks" else Kind.F32)
        convert(
            prepare(open_local(str(path)), Options(4, 64, 8) if what == "blocks" else AS_IT_ARRIVES), tmp_path / what
        )
        assert verify_container(tmp_path / what, open_local(str(path))).sound
        for backend in ("numpy", "native"):
            with Engine.open(tmp_path / what, ram_bytes=PLENTY, backend=backend) as engine:
                found[what, backend] = engine.logits(prompt)
    expected = found["plain", "numpy"]
    assert expected.std() > 0.2
    assert np.isfinite(expected).all()
    for logits in found.values():
        assert np.abs(logits - expected).max() < 5e-4


def qwen3_shapes(metadata: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, for these metadata."""
    key = "qwen3moe."
    hidden, inner, experts, heads, kv_heads, d = (
        metadata[key + name]
        for name in (
            "embedding_length",
            "expert_feed_forward_length",
            "expert_count",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
        )
    )
    layer = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q_norm": (d,),
        "attn_k_norm": (d,),
        "attn_q": (heads * d, hidden),
        "attn_k": (kv_heads * d, hidden),
        "attn_v": (kv_heads * d, hidden),
        "attn_output": (hidden, heads * d),
        "ffn_gate_inp": (experts, hidden),
        "ffn_gate_exps": (experts, inner, hidden),
        "ffn_up_exps": (experts, inner, hidden),
        "ffn_down_exps": (experts, hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (256, hidden), "output.weight": (256, hidden)}
    shapes["output_norm.weight"] = (hidden,)
    for i in range(metadata["qwen3moe.block_count"]):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
