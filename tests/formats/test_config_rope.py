"""rope_scaling of config.json and of an index: what angles are made of it, and what makes none."""

import json
import math
from typing import Any

import numpy as np
import pytest

from formats.config import Factors, Linear, Llama3, LongRope, Yarn, model_facts, read_model_facts
from formats.errors import FormatError
from formats.fields import Fields
from tests.formats.published import DECODERS, GLM_4_5_AIR, LLAMA_4_SCOUT_TEXT, QWEN3_30B, llama4, read

ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_yarn_is_read_in_either_of_its_forms() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    published = read({**QWEN3_30B, "rope_scaling": {"type": "yarn", **scaling}})
    parameters = {"rope_type": "yarn", "rope_theta": 1000000.0, **scaling}
    assert read({**QWEN3_30B, "rope_theta": None, "rope_parameters": parameters}) == published
    factor = 0.1 * math.log(4) + 1
    assert published.rope_scaling == Yarn(4.0, 32768, 32.0, 1.0, True, attention_factor=factor, mscale_all_dim=0.0)
    assert published.rope.attention_factor == factor
    assert read_model_facts(Fields(model_facts(published), "x")) == published


def test_the_original_length_is_that_at_the_top_else_that_of_the_parameters_else_the_longest() -> None:
    """transformers' standardize_rope_params; its YaRN has no factor where that is null."""
    yarn = {"type": "yarn", "factor": 4.0}
    unsaid = read({**QWEN3_30B, "rope_scaling": yarn})
    assert unsaid == read({**QWEN3_30B, "rope_scaling": {**yarn, "original_max_position_embeddings": 40960}})
    top = {**QWEN3_30B, "original_max_position_embeddings": 8192}
    expected = read({**QWEN3_30B, "rope_scaling": {**yarn, "original_max_position_embeddings": 8192}})
    assert read({**top, "rope_scaling": {**yarn, "original_max_position_embeddings": 16384}}) == expected
    assert read({**top, "rope_scaling": {"type": "yarn", "factor": None}}).rope_scaling == Yarn(
        5.0, 8192, 32.0, 1.0, True, attention_factor=0.1 * math.log(5) + 1, mscale_all_dim=0.0
    )
    llama3 = LLAMA_4_SCOUT_TEXT["rope_scaling"]
    assert llama4(original_max_position_embeddings=4096).rope_scaling == Llama3(16.0, 4096, 1.0, 1.0)
    unsaid = llama4(rope_scaling={key: llama3[key] for key in llama3 if not key.startswith("original")})
    assert unsaid.rope_scaling == Llama3(16.0, LLAMA_4_SCOUT_TEXT["max_position_embeddings"], 1.0, 1.0)


@pytest.mark.parametrize("theta", [1e-320, 0.5, 0, -1])
@pytest.mark.parametrize(
    ("model_type", "key"),
    [("qwen3_moe", "rope_theta"), ("llama4_text", "rope_theta"), ("mimo_v2_flash", "swa_rope_theta")],
)
def test_a_theta_below_1_is_refused(model_type: str, key: str, theta: float) -> None:
    """With a theta near 0 the power overflows."""
    config = LLAMA_4_SCOUT_TEXT if model_type == "llama4_text" else DECODERS[model_type]
    with pytest.raises(FormatError, match=rf"config.json: {key} is {float(theta)}, expected a number of at least 1"):
        read({**config, key: theta})


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_a_theta_below_1_is_named_where_it_stands(place: str) -> None:
    with pytest.raises(FormatError, match=rf"config.json: {place}.rope_theta is 0.5, expected a number of at least 1"):
        read({**QWEN3_30B, place: {"rope_theta": 0.5}})
    with pytest.raises(FormatError, match=rf"config.json: {place}.rope_theta is 0.5, expected a number of at least 1"):
        llama4(**{"rope_scaling": None, place: {"rope_theta": 0.5}})


def test_a_number_of_a_scaling_is_named_where_it_stands() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "beta_fast": 1e308, **ORIGINAL}
    with pytest.raises(FormatError, match=r"config.json: rope_parameters.beta_fast is 1e\+308, expected a number from"):
        read({**QWEN3_30B, "rope_parameters": yarn})


def test_theta_is_that_of_the_parameters_before_the_one_at_the_top() -> None:
    """transformers' convert_rope_params_to_dict; of two objects of parameters it takes rope_scaling."""
    assert read({**QWEN3_30B, "rope_scaling": {"type": "yarn", "rope_theta": 5e6, **ORIGINAL}}).rope_theta == 5e6
    yarn = {"rope_type": "yarn", **ORIGINAL}
    assert read({**QWEN3_30B, "rope_parameters": yarn}) == read({**QWEN3_30B, "rope_scaling": yarn})
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "rope_scaling": yarn}
    assert read({**QWEN3_30B, **both}) == read({**QWEN3_30B, "rope_scaling": yarn})
    assert read({**QWEN3_30B, **both, "rope_scaling": {}}).rope_theta == 5e6
    with pytest.raises(FormatError, match=r"config.json: rope_theta is missing"):
        read({**QWEN3_30B, **both, "rope_theta": None})


def test_the_share_of_a_head_that_turns_is_looked_for_where_theta_is() -> None:
    glm = {**GLM_4_5_AIR, "partial_rotary_factor": 0.5}
    assert read({**glm, "rope_parameters": {"rope_theta": 1e6}}).rotary_dim == 64
    assert read({**glm, "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}).rotary_dim == 32
    assert read({**glm, "partial_rotary_factor": None}).rotary_dim == 64
    minimax = DECODERS["minimax_m2"]  # published with rotary_dim 64, which is less than a share that is said
    share = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}
    assert read({**minimax, "rope_parameters": share}).rotary_dim == 32
    assert read({**minimax, "rotary_dim": None, "rope_parameters": share}).rotary_dim == 32
    assert read({**minimax, "rotary_dim": None}).rotary_dim == 128


def test_yarn_of_ernie_is_read_in_either_of_its_forms() -> None:
    ernie = DECODERS["ernie4_5_moe"]
    found = read({**ernie, "rope_scaling": {"type": "yarn", **ORIGINAL}})
    assert isinstance(found.rope_scaling, Yarn)
    parameters = {"rope_type": "yarn", "rope_theta": ernie["rope_theta"], **ORIGINAL}
    assert read({**ernie, "rope_parameters": parameters}) == found


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_theta", 1, "rope_theta is 1.0, expected a number above 1, of which YaRN takes the logarithm"),
        ("factor", 1e-300, "rope_scaling.factor is 1e-300, expected a number from 1/1048576 to 1048576"),
        ("beta_fast", 1e308, r"rope_scaling.beta_fast is 1e\+308, expected a number from 1/1048576 to 1048576"),
        ("beta_slow", 0, "rope_scaling.beta_slow is 0.0, expected a number from 1/1048576 to 1048576"),
        ("attention_factor", 0, "rope_scaling.attention_factor is 0.0, expected a number from 1/1048576 to 1048576"),
        ("mscale_all_dim", 1e300, r"rope_scaling.mscale_all_dim is 1e\+300, expected a number from 0 to 1048576"),
        ("swa_rope_theta", 1, "swa_rope_theta is 1.0, expected a number above 1, of which YaRN takes the logarithm"),
    ],
)
def test_a_scaling_of_yarn_that_makes_no_angles_is_refused_in_an_index(key: str, value: float, message: str) -> None:
    facts = model_facts(read({**QWEN3_30B, "rope_scaling": {"type": "yarn", **ORIGINAL}}))
    (facts if key in facts else facts["rope_scaling"])[key] = value
    with pytest.raises(FormatError, match=f"index.json: model.{message}"):
        read_model_facts(Fields(facts, "index.json: model"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("factor", 0, "rope_scaling.factor is 0.0, expected a number from 1/1048576 to 1048576"),
        (
            "original_max_position_embeddings",
            0,
            "original_max_position_embeddings is 0, expected an integer",
        ),
        ("mscale_all_dim", -1, "rope_scaling.mscale_all_dim is -1, expected a number of at least 0"),
        ("attention_factor", 1e300, r"rope_scaling.attention_factor is 1e\+300, expected a number from"),
    ],
)
def test_a_scaling_of_yarn_that_makes_no_angles_is_refused_in_a_config(key: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=f"config.json: (rope_scaling.)?{message}"):
        read({**QWEN3_30B, "rope_scaling": {"type": "yarn", **ORIGINAL, key: value}})


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.0, 1.0)])
def test_slow_pairs_of_llama3_are_slowed_and_fast_ones_kept(low: float, high: float) -> None:
    """transformers' _compute_llama3_parameters, pair by pair."""
    rope = llama4(rope_scaling=LLAMA_4_SCOUT_TEXT["rope_scaling"] | {"low_freq_factor": low, "high_freq_factor": high})
    for pair, found in enumerate(rope.rope.inv_freq):
        plain = 500000.0 ** (-pair / 64)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / high:
            expected = plain
        elif wavelength > 8192 / low:
            expected = plain / 16
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            expected = (1 - smooth) * plain / 16 + smooth * plain
        assert found == pytest.approx(expected, rel=1e-12)


def test_factors_of_a_gguf_file_say_what_llama3_says() -> None:
    model, plain = llama4(), llama4(rope_scaling=None)
    factors = (plain.rope.inv_freq / model.rope.inv_freq).tolist()
    found = llama4(rope_scaling={"rope_type": "factors", "factors": factors})
    assert found.rope_scaling == Factors(tuple(factors))
    assert found.rope.inv_freq == pytest.approx(model.rope.inv_freq, rel=1e-12)
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(found))), "x")) == found


@pytest.mark.parametrize("factors", [[1.0] * 63, [0.0] * 64, [1e-320] * 64, []])
def test_factors_that_do_not_fit_a_head_are_refused(factors: list[float]) -> None:
    with pytest.raises(FormatError, match=r"rope_scaling.factors is .*, expected 64 factors, each a number from"):
        llama4(rope_scaling={"rope_type": "factors", "factors": factors})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("factor", 0.0, "factor is 0.0, expected a number from 1/1048576 to 1048576"),
        ("factor", 1e-320, "factor is 1e-320, expected a number from 1/1048576 to 1048576"),
        ("low_freq_factor", -1.0, "low_freq_factor is -1.0, expected a number from 1/1048576 to 1048576"),
        ("high_freq_factor", 0.5, "high_freq_factor is 0.5, expected low_freq_factor 1.0 or more"),
    ],
)
def test_a_scaling_of_llama3_that_means_nothing_is_refused(key: str, value: float, message: str) -> None:
    with pytest.raises(FormatError, match=f"config.json: rope_scaling.{message}"):
        llama4(rope_scaling=LLAMA_4_SCOUT_TEXT["rope_scaling"] | {key: value})


def test_a_scaling_of_llama3_without_a_factor_is_refused_in_an_index() -> None:
    facts = model_facts(llama4())
    facts["rope_scaling"]["factor"] = 0
    with pytest.raises(FormatError, match=r"index.json: model.rope_scaling.factor is 0.0, expected a number from"):
        read_model_facts(Fields(json.loads(json.dumps(facts)), "index.json: model"))


def scaled(scaling: dict[str, Any], **changes: Any) -> Any:
    return read({**QWEN3_30B, "rope_scaling": scaling, **changes})


SHORT, LONG = [1 + i / 64 for i in range(64)], [1.0 + i for i in range(64)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 4096}


def test_linear_divides_positions() -> None:
    model = scaled({"type": "linear", "factor": 4.0})
    assert model.rope_scaling == Linear(4.0)
    assert np.array_equal(model.rope.inv_freq, read(QWEN3_30B).rope.inv_freq / 4)
    assert read_model_facts(Fields(model_facts(model), "x")) == model


def test_dynamic_is_no_scaling_as_no_context_is_longer_than_max_position_embeddings() -> None:
    assert scaled({"rope_type": "dynamic", "factor": 4.0}) == read(QWEN3_30B)


def test_longrope_is_decided_by_the_context_of_a_run() -> None:
    model = scaled(LONGROPE)
    multiplier = math.sqrt(1 + math.log(10) / math.log(4096))  # max_position_embeddings is 40960
    assert model.rope_scaling == LongRope(tuple(SHORT), tuple(LONG), multiplier, multiplier, 4096)
    assert read_model_facts(Fields(json.loads(json.dumps(model_facts(model))), "x")) == model
    plain = read(QWEN3_30B).rope.inv_freq
    for ctx_size, factors in ((1, SHORT), (4096, SHORT), (4097, LONG), (40960, LONG)):
        rope = model.within(ctx_size).rope
        assert np.array_equal(rope.inv_freq, plain / np.array(factors))
        assert rope.attention_factor == multiplier
    assert read(QWEN3_30B).within(4097) == read(QWEN3_30B)


@pytest.mark.parametrize(
    ("said", "multiplier"),
    [({"factor": 4.0}, math.sqrt(1 + 2 / 12)), ({"factor": 0.5}, 1.0), ({"attention_factor": 1.5}, 1.5)],
)
def test_longrope_multiplies_cos_and_sin_as_it_says_or_by_its_factor(said: dict[str, Any], multiplier: float) -> None:
    assert scaled(LONGROPE | said).rope_scaling.long_mscale == pytest.approx(multiplier)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear"}, "rope_scaling.factor is missing"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor is 0, expected a number from"),
        ({"type": "dynamic"}, "rope_scaling.factor is missing"),
        ({"type": "dynamic", "factor": -1}, "rope_scaling.factor is -1, expected a number from"),
        (LONGROPE | {"short_factor": None}, "rope_scaling.short_factor is missing"),
        (LONGROPE | {"long_factor": LONG[:-1]}, "rope_scaling.long_factor is .*, expected 64 factors, each a number"),
        (LONGROPE | {"short_factor": [*SHORT[:-1], 0]}, "rope_scaling.short_factor is .*, expected 64 factors"),
        (LONGROPE | {"attention_factor": 0}, "rope_scaling.attention_factor is 0, expected a number from"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1, expected 2 or"),
    ],
)
def test_other_scalings_of_which_no_angles_can_be_made_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"config.json: .*{message}"):
        scaled(scaling)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("long_factor", LONG[:3], "expected 64 factors"),
        ("short_mscale", 0.0, "expected a number from"),
        ("original_max_position_embeddings", 0, "expected an integer from 1"),
    ],
)
def test_an_index_with_a_longrope_that_makes_no_angles_is_refused(key: str, value: Any, message: str) -> None:
    facts = json.loads(json.dumps(model_facts(scaled(LONGROPE))))
    facts["rope_scaling"][key] = value
    with pytest.raises(FormatError, match=rf"x: rope_scaling.{key} is .*{message}"):
        read_model_facts(Fields(facts, "x"))


def test_factors_are_those_of_layers_with_a_window_only_where_as_much_of_a_head_turns() -> None:
    facts = json.loads(json.dumps(model_facts(scaled(LONGROPE))))
    facts["swa_rotary_dim"] = 64
    with pytest.raises(FormatError, match=r"x: swa_rotary_dim is 64, expected rotary_dim 128, as factors are shared"):
        read_model_facts(Fields(facts, "x"))
    facts["swa_rope_scaled"] = False
    assert model_facts(read_model_facts(Fields(facts, "x")))["swa_rotary_dim"] == 64
