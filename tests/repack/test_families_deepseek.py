"""The table of DeepSeek-V3 against its published names and shapes, and what of a checkpoint is skipped."""

import math
import re
from collections.abc import Mapping

import pytest

from formats.config import DeepseekV3Config, KimiLinearConfig, model_facts
from formats.errors import FormatError
from formats.families.deepseek import DEEPSEEK_V3
from formats.fields import Fields
from repack.plan import Options
from repack.planner import make_plan
from repack.sources.base import SourceTensor
from tests.fixtures import kimi_linear_tiny
from tests.fixtures.deepseek_tiny import CASES
from tests.fixtures.recipe import TinyCheckpoint
from tests.formats.test_config_deepseek import DEEPSEEK_V3 as PUBLISHED_CONFIG

CONFIG = DeepseekV3Config.read(Fields(PUBLISHED_CONFIG, "x"))
ATTENTION = {
    "input_layernorm": (7168,),
    "self_attn.q_a_proj": (1536, 7168),
    "self_attn.q_a_layernorm": (1536,),
    "self_attn.q_b_proj": (24576, 1536),
    "self_attn.kv_a_proj_with_mqa": (576, 7168),
    "self_attn.kv_a_layernorm": (512,),
    "self_attn.kv_b_proj": (32768, 512),
    "self_attn.o_proj": (7168, 16384),
    "post_attention_layernorm": (7168,),
}
DENSE = {"mlp.gate_proj": (18432, 7168), "mlp.up_proj": (18432, 7168), "mlp.down_proj": (7168, 18432)}
SPARSE = {
    "mlp.gate": (256, 7168),
    "mlp.gate.e_score_correction_bias": (256,),
    "mlp.shared_experts.gate_proj": (2048, 7168),
    "mlp.shared_experts.up_proj": (2048, 7168),
    "mlp.shared_experts.down_proj": (7168, 2048),
}


def source(case: str, cases: Mapping[str, TinyCheckpoint] = CASES) -> dict[str, SourceTensor]:
    return {
        name: SourceTensor(name, "model.safetensors", dtype, shape, 0, 4 * math.prod(shape))
        for name, (dtype, shape, _) in cases[case].tensors().items()
    }


def test_a_dense_layer_of_kimi_linear_may_have_the_name_of_experts() -> None:
    """As transformers 5.24 saves what it has renamed when it loaded the published checkpoint."""
    config = KimiLinearConfig.read(Fields(kimi_linear_tiny.CASES["kimi_linear"].config, "x"))
    published = source("kimi_linear", kimi_linear_tiny.CASES)
    dense = re.compile(r"(model\.layers\.0\.)mlp(\.\w+_proj\.weight)")
    saved = {dense.sub(r"\1block_sparse_moe\2", name): tensor for name, tensor in published.items()}
    assert saved.keys() != published.keys()
    saved = {name: tensor._replace(name=name) for name, tensor in saved.items()}
    found, expected = (make_plan(tensors, config, Options(16, 64, 16)) for tensors in (saved, published))
    assert found.layout == expected.layout


@pytest.mark.parametrize(("layer", "feed_forward"), [(2, DENSE), (3, SPARSE)])
def test_shapes_of_a_layer_are_the_published_ones(layer: int, feed_forward: dict[str, tuple[int, ...]]) -> None:
    found = {t.name: DEEPSEEK_V3.shape(t.shape, CONFIG) for t in DEEPSEEK_V3.layer_tensors(CONFIG, layer)}
    assert found == ATTENTION | feed_forward


def test_multi_token_prediction_and_rotary_frequencies_are_skipped() -> None:
    config = DeepseekV3Config.read(Fields(CASES["deepseek_v3"].config, "x"))
    plan = make_plan(source("deepseek_v3"), config, Options(16, 64, 16))
    skipped = {skipped.what: skipped.tensors for skipped in plan.skipped}
    mtp = sum(name.startswith("model.layers.3.") for name in source("deepseek_v3")) - 1
    assert skipped == {"multi-token prediction": mtp, "rotary frequencies, which config.json states too": 4}
    assert [layer is None for layer in plan.layout.layers] == [True, False, False]


def test_ax_k1_has_a_bias_of_scores_where_its_tensors_have_it() -> None:
    config = DeepseekV3Config.read(Fields(CASES["axk1"].config, "x"))
    published = source("axk1")
    bias = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": (16,) for layer in (1, 2)}
    biased = published | {name: SourceTensor(name, "x", "F32", shape, 0, 64) for name, shape in bias.items()}
    plans = [make_plan(tensors, config, Options(16, 64, 16)) for tensors in (published, biased)]
    assert [model_facts(plan.layout.model)["without_correction_bias"] for plan in plans] == [True, False]
    assert {skipped.what: skipped.tensors for skipped in plans[0].skipped}[
        "tensors of dense layers that no model reads"
    ] == 1


def test_a_norm_of_ax_k1_has_no_place_in_deepseek_v3() -> None:
    config = DeepseekV3Config.read(Fields(CASES["deepseek_v3"].config, "x"))
    name = "model.layers.0.post_mlp_layernorm.weight"
    tensors = source("deepseek_v3") | {name: SourceTensor(name, "x", "BF16", (96,), 0, 192)}
    with pytest.raises(FormatError, match=f"{name} has no place in deepseek_v3"):
        make_plan(tensors, config, Options(16, 64, 16))


def test_a_tensor_that_nobody_knows_is_refused() -> None:
    config = DeepseekV3Config.read(Fields(CASES["deepseek_v3"].config, "x"))
    tensors = source("deepseek_v3")
    name = "model.layers.1.self_attn.indexer.wk.weight"
    tensors[name] = SourceTensor(name, "model.safetensors", "BF16", (8, 96), 0, 8)
    with pytest.raises(FormatError, match=r"indexer.wk.weight has no place in deepseek_v3"):
        make_plan(tensors, config, Options(16, 64, 16))
