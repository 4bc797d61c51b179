"""K-quants and IQ types of GGUF files, run whole, alone and mixed as in files of unsloth."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from formats.dtypes import AnyArray
from formats.errors import UnsupportedError
from repack.convert import convert, prepare
from repack.plan import Options
from repack.sources import open_local
from repack.terminal import warn_of_checkpoint
from repack.verify import verify_container
from runtime import Engine
from tests.gguf_files import recorded, write_gguf
from tests.runtime.helpers import PLENTY

AS_IT_ARRIVES = Options(16, 64, 16)
Kind = gguf.GGMLQuantizationType


# Where the f16 numbers of a block stand, and how large weights are, about, where these numbers are 1.
NUMBERS: dict[Kind, tuple[tuple[int, ...], float]] = {
    Kind.Q2_K: ((80, 82), 24),
    Kind.Q3_K: ((108,), 50),
    Kind.Q4_K: ((0, 2), 256),
    Kind.Q5_K: ((0, 2), 512),
    Kind.Q6_K: ((208,), 1400),
    Kind.IQ4_NL: ((0,), 90),
    Kind.IQ4_XS: ((0,), 1700),
    Kind.IQ3_S: ((0,), 210),
    Kind.IQ3_XXS: ((0,), 210),
    Kind.IQ2_S: ((0,), 80),
    Kind.IQ2_XS: ((0,), 80),
    Kind.IQ2_XXS: ((0,), 80),
    Kind.IQ1_S: ((0,), 9),
    Kind.IQ1_M: ((), 9),
}
# Of each tensor's last word in each layer: three types in one expert, others in the next layer, as UD-Q2_K_XL has it.
MIXED = {
    "ffn_gate_exps": (Kind.IQ2_XXS, Kind.Q2_K),
    "ffn_up_exps": (Kind.IQ1_M, Kind.IQ3_XXS),
    "ffn_down_exps": (Kind.Q3_K, Kind.IQ4_XS),
    "attn_q": (Kind.Q5_K, Kind.IQ2_S),
    "attn_v": (Kind.Q6_K, Kind.IQ4_NL),
}


METADATA: dict[str, Any] = recorded("qwen3_moe")["metadata"] | {
    "qwen3moe.embedding_length": 256,
    "qwen3moe.expert_feed_forward_length": 256,
    "qwen3moe.expert_count": 4,
    "qwen3moe.block_count": 2,
    "qwen3moe.attention.head_count": 8,
}


def made_of(kind: Kind | None, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors as blocks, where they are matrices of weights, and as the floats that gguf decodes."""
    plain: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    rng = np.random.default_rng(1)
    for name, shape in qwen3_shapes(metadata).items():
        if len(shape) == 1 or "gate_inp" in name:
            plain[name] = blocks[name] = (rng.standard_normal(shape) / 16 + (len(shape) == 1)).astype(np.float32)
        else:
            raw = random_k_blocks(kind_of(name, kind), shape, len(plain))
            blocks[name], plain[name] = raw, gguf.quants.dequantize(raw, kind_of(name, kind))
    return blocks, plain


def random_k_blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> AnyArray:
    """Any codes and scales of a type, its f16 numbers small and finite."""
    weights, nbytes = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights, nbytes), np.uint8)
    places, size = NUMBERS[kind]
    numbers = (rng.uniform(0.5, 1.5, (*raw.shape[:-1], 2)) / size / shape[-1] ** 0.5).astype(np.float16)
    for place, number in zip(places, np.moveaxis(numbers, -1, 0), strict=False):
        raw[..., place : place + 2] = number[..., None].view(np.uint8)
    if kind == Kind.IQ1_M:  # its number stands in the upper 4 bits of four words
        bits = np.ascontiguousarray(numbers[..., 0]).view(np.uint16)
        for word in range(4):
            raw[..., 49 + 2 * word] = raw[..., 49 + 2 * word] & 15 | (bits >> 4 * word & 15).astype(np.uint8) << 4
    return raw.reshape(*shape[:-1], -1)


def kind_of(name: str, kind: Kind | None) -> Kind:
    """The type of a tensor: the one asked for, or one of a mixture."""
    if kind is not None:
        return kind
    _, layer, module, *_ = (*name.split("."), "", "")
    return MIXED[module][int(layer)] if module in MIXED else Kind.Q4_K


def test_what_is_kept_in_more_bits_than_published_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = made_of(None, METADATA)[0]
    path = write_gguf(tmp_path / "m.gguf", METADATA, blocks, kinds={name: kind_of(name, None) for name in blocks})
    conversion = prepare(open_local(str(path)), Options(4, 64, 8))
    warn_of_checkpoint("m", conversion)
    note = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("note"))
    assert note == (
        "note: m: kept to the bit, but in more bits a weight than published: "
        "IQ1_M 1.75 -> 3.56, IQ2_S 2.56 -> 3.56, IQ2_XXS 2.06 -> 3.31, IQ3_XXS 3.06 -> 4.31, IQ4_XS 4.25 -> 4.31, "
        "Q3_K 3.44 -> 3.56"
    )
    origins = conversion.plan.origins()
    assert [origin.encoding for origin in origins.experts[0]] == [
        "ggml IQ2_XXS, 2.0625 bits", "ggml IQ1_M, 1.75 bits", "ggml Q3_K, 3.4375 bits"
    ]  # fmt: skip


def test_types_that_nothing_here_reads_are_refused_by_name_with_those_that_are(tmp_path: Path) -> None:
    blocks = made_of(Kind.Q2_K, METADATA)[0]
    name = "blk.0.ffn_up_exps.weight"
    kinds = dict.fromkeys(blocks, Kind.Q2_K) | {name: Kind.TQ2_0}
    blocks[name] = np.zeros((*blocks[name].shape[:-1], gguf.constants.GGML_QUANT_SIZES[Kind.TQ2_0][1]), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", METADATA, blocks, kinds=kinds)
    with pytest.raises(UnsupportedError) as refused:
        prepare(open_local(str(path)), AS_IT_ARRIVES)
    assert str(refused.value).endswith(
        "up_proj.weight has dtype ggml TQ2_0, expected one of BF16, F16, F32, F8_E4M3, U8, I8, U32, Q4_0, Q4_1, Q5_0, "
        "Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4, IQ4_NL, IQ4_XS, IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, "
        "IQ1_S, IQ1_M"
    )


@pytest.mark.parametrize("kind", [*NUMBERS, None], ids=lambda kind: kind.name if kind else "mixed")
def test_k_quants_run_as_the_values_that_gguf_decodes(kind: Kind | None, tmp_path: Path) -> None:
    """A model of rows wide enough for them: blocks are kept to the bit, and its logits are those of the same floats."""
    blocks, plain = made_of(kind, METADATA)
    kinds = {name: kind_of(name, kind) for name in blocks}
    prompt, found = list(range(3, 40)), {}
    for what, values in (("blocks", blocks), ("plain", plain)):
        path = write_gguf(tmp_path / f"{what}.gguf", METADATA, values, kinds=kinds)
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
