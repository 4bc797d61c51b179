"""What lies between the products: near its definition, and the same bits for levels, threads and cuts into steps."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.config import CHOSEN_SIGMOID, SIGMOID, SILU, SOFTMAX, SQRT_SOFTPLUS, Rope
from formats.dtypes import Float32
from formats.errors import FormatError
from runtime.backends import native
from runtime.backends.facts import Routing, Turn
from runtime.backends.native_ops import NativeOps
from runtime.backends.numpy_ops import NumpyOps, Weight
from tests.native.ops import REFERENCE, cuts, every_ops, near, normal, seeds, the_same, weight

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native kernels are not built")


# ---- row by row


@given(tokens=st.integers(1, 40), columns=st.integers(1, 300), scale=st.sampled_from((1e-3, 1.0, 1e3)), seed=seeds)
def test_norms_are_those_of_the_reference(tokens: int, columns: int, scale: float, seed: int) -> None:
    x, w = normal(seed, tokens, columns, scale=scale), weight(normal(seed, columns))
    rms, l2 = the_same(lambda ops: (ops.rms_norm(x, w, 1e-6, 1.0), ops.l2_norm(x, 1e-6)))
    assert near(rms, REFERENCE.rms_norm(x, w, 1e-6, 1.0))
    assert near(l2, REFERENCE.l2_norm(x, 1e-6))


@pytest.mark.parametrize("kind", [SILU, SIGMOID])
def test_a_gate_and_a_scaled_length_are_those_of_the_reference(kind: str) -> None:
    x, gate = normal(0, 3, 5001), normal(1, 3, 5001)
    gated, scaled = the_same(lambda ops: (ops.gate(x, gate, kind), ops.l2_norm(x, 1e-6, 0.3)))
    assert near(gated, REFERENCE.gate(x, gate, kind))
    assert near(scaled, REFERENCE.l2_norm(x, 1e-6, 0.3))


SHORT = normal(0, 31)
LOGITS, QUERIES, KEYS = normal(1, 3, 32), normal(2, 3, 4, 32), normal(3, 3, 2, 32)
GATES = normal(4, 3, 4)
ROUTING = Routing(2, SIGMOID)


@pytest.mark.parametrize(
    "compute",
    [
        lambda ops, w: ops.rms_norm(LOGITS, w, 1e-6),
        lambda ops, w: ops.add_norm(LOGITS, LOGITS, w, 1e-6),
        lambda ops, w: ops.decay(LOGITS, w, w),
        lambda ops, w: ops.decay(LOGITS, weight(LOGITS[0]), w),
        lambda ops, w: ops.route(LOGITS, ROUTING, w),
        lambda ops, w: ops.attention(QUERIES, KEYS, KEYS, ops.new_kv_cache(2, 32), 1.0, sinks=w),
        lambda ops, w: ops.attention(
            QUERIES, KEYS, KEYS, ops.new_kv_cache(2, 32), 1.0, turn=Turn(Rope(1e4, 32, False), 0, w, w, 1e-6, 1.0)
        ),
        lambda ops, w: ops.causal_conv1d(LOGITS, weight(normal(4, 31, 4)), np.zeros((3, 32), np.float32)),
        lambda ops, w: ops.causal_conv1d(LOGITS, weight(normal(4, 32, 5)), np.zeros((3, 32), np.float32)),
        lambda ops, _: ops.add_norm(LOGITS, LOGITS[:, :31], weight(LOGITS[0]), 1e-6),
        lambda ops, _: ops.attention(QUERIES, KEYS, KEYS[:2], ops.new_kv_cache(2, 32), 1.0),
        lambda ops, _: ops.attention(QUERIES, KEYS[:, :1], KEYS, ops.new_kv_cache(2, 32), 1.0),
        lambda ops, _: ops.attention(QUERIES[:2], KEYS, KEYS, ops.new_kv_cache(2, 32), 1.0),
        lambda ops, _: ops.causal_conv1d(LOGITS, weight(normal(4, 32, 4)), np.zeros((3, 31), np.float32)),
        lambda ops, _: ops.gated_delta_rule(KEYS, KEYS, QUERIES, GATES, GATES[:2], ops.new_delta_state(4, 32, 32)),
        lambda ops, _: ops.gated_delta_rule(KEYS[:2], KEYS, QUERIES, GATES, GATES, ops.new_delta_state(4, 32, 32)),
        lambda ops, _: ops.gated_delta_rule(KEYS, KEYS, QUERIES, GATES, GATES, ops.new_delta_state(2, 32, 32)),
        lambda ops, _: ops.gated_delta_rule(QUERIES, QUERIES, KEYS, GATES, GATES, ops.new_delta_state(2, 32, 32)),
        lambda ops, w: ops.stream_weights(normal(5, 3, 24), weight(normal(6, 3)), w, 4, 2, 1e-6),
        lambda ops, w: ops.stream_weights(normal(5, 3, 23), weight(normal(6, 3)), weight(normal(7, 24)), 4, 2, 1e-6),
    ],
)
def test_a_size_that_the_model_does_not_have_is_refused_before_c_reads_it(
    compute: Callable[[NativeOps, Weight], object],
) -> None:
    for ops in every_ops((1,)):
        with pytest.raises(FormatError, match=r"config\.json asks for"):
            compute(ops, weight(SHORT))


def test_what_stands_between_the_halves_of_a_layer_is_a_sum_and_its_norm() -> None:
    h, y, w = normal(0, 50, 96), normal(1, 50, 96), weight(normal(2, 96))
    total, x = the_same(lambda ops: ops.add_norm(h, y, w, 1e-6, offset=1.0, multiplier=0.22))
    expected_total, expected_x = REFERENCE.add_norm(h, y, w, 1e-6, offset=1.0, multiplier=0.22)
    assert np.array_equal(total, expected_total)
    assert near(x, expected_x)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_and_keys_may_come_as_they_were_projected(normed: bool, interleaved: bool) -> None:
    q, k, v = normal(0, 70, 6, 48), normal(1, 70, 2, 48), normal(2, 70, 2, 48)
    w_q, w_k = (weight(normal(seed, 48)) if normed else None for seed in (3, 4))
    turn = Turn(Rope(1e4, 32, interleaved), 0, w_q, w_k, 1e-6, 1.0)

    def in_two_steps(ops: NumpyOps) -> Float32:
        first, cache = ops.attention(q[:40], k[:40], v[:40], ops.new_kv_cache(2, 48), 0.15, turn=turn)
        rest, _ = ops.attention(q[40:], k[40:], v[40:], cache, 0.15, turn=turn._replace(position=40))
        return np.concatenate([first, rest])

    (found,) = the_same(lambda ops: (in_two_steps(ops),))
    assert near(found, in_two_steps(REFERENCE))


def test_a_norm_takes_slices_and_gives_a_row_what_it_gives_it_alone() -> None:
    x, w = normal(0, 50, 4, 96), weight(normal(1, 48))
    for ops in every_ops((2,)):
        whole = ops.rms_norm(x[..., :48], w, 1e-6)
        assert all(np.array_equal(ops.rms_norm(x[t : t + 1, :, :48], w, 1e-6), whole[t : t + 1]) for t in range(50))


@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_elementwise_functions_are_those_of_the_reference_everywhere(name: str) -> None:
    x = np.concatenate([np.linspace(-120, 120, 9999), [0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    (found,) = the_same(lambda ops: (getattr(ops, name)(x),))
    with np.errstate(all="ignore"):
        expected = getattr(REFERENCE, name)(x)
        exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64))) if name == "silu" else expected
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    finite = np.isfinite(expected)
    assert near(found[finite], expected[finite], 2e-7)
    normal_numbers = finite & (np.abs(exact) > 1e-35)
    assert found[normal_numbers] == pytest.approx(exact[normal_numbers], rel=4e-7)  # exp within 2 ulp, and a division


@given(tokens=st.integers(1, 9), columns=st.integers(1, 300), cap=st.sampled_from((5.0, 30.0)), seed=seeds)
def test_a_soft_cap_and_a_scale_are_those_of_the_reference(tokens: int, columns: int, cap: float, seed: int) -> None:
    x, scale = normal(seed, tokens, columns, scale=20), normal(seed, columns)
    (capped,) = the_same(lambda ops: [ops.softcap(x, cap)])
    assert np.abs(capped - REFERENCE.softcap(x, cap)).max() < 5e-7 * cap  # by way of a sigmoid near 1/2
    (scaled,) = the_same(lambda ops: [ops.scale(x, weight(scale))])
    assert np.array_equal(scaled, x * scale)


def test_a_scale_of_experts_is_that_of_the_reference() -> None:
    logits, scale = normal(1, 40, 12, scale=2), normal(2, 12)
    ids, weights = the_same(lambda ops: ops.route(logits, Routing(3), None, weight(scale)))
    expected = REFERENCE.route(logits, Routing(3), None, weight(scale))
    assert np.array_equal(ids, expected[0])
    assert near(weights, expected[1])


@given(tokens=st.integers(1, 9), heads=st.integers(1, 20), channels=st.sampled_from((1, 3, 64)), seed=seeds)
def test_the_decay_is_that_of_the_reference(tokens: int, heads: int, channels: int, seed: int) -> None:
    width = heads * channels  # of a head each, or of its channels
    a, bias, log = normal(seed, tokens, width, scale=30), normal(seed + 1, width), normal(seed + 2, heads)
    (found,) = the_same(lambda ops: (ops.decay(a, weight(bias), weight(log)),))
    assert near(found, REFERENCE.decay(a, weight(bias), weight(log)), 1e-6)


@given(tokens=st.integers(1, 9), heads=st.integers(1, 8), channels=st.sampled_from((8, 64)), seed=seeds)
def test_a_bounded_decay_is_its_definition(tokens: int, heads: int, channels: int, seed: int) -> None:
    a, bias, log = (
        normal(seed + i, *shape) for i, shape in enumerate(((tokens, heads * channels), (heads * channels,), (heads,)))
    )
    (found,) = the_same(lambda ops: (ops.bounded_decay(a, weight(bias), weight(log), -5.0),))
    rate = np.repeat(np.exp(log.astype(np.float64)), channels)
    assert near(found, -5 / (1 + np.exp(-rate * (a + bias).astype(np.float64))), 1e-6)
    assert near(found, REFERENCE.bounded_decay(a, weight(bias), weight(log), -5.0), 1e-6)


@given(tokens=st.integers(1, 9), columns=st.integers(1, 9), scale=st.sampled_from((1.0, 100.0)), seed=seeds)
def test_a_softmax_is_that_of_the_reference(tokens: int, columns: int, scale: float, seed: int) -> None:
    x = normal(seed, tokens, columns, scale=scale)
    (found,) = the_same(lambda ops: (ops.softmax(x),))
    assert near(found, REFERENCE.softmax(x), 1e-6)
    assert found.sum(axis=1) == pytest.approx(np.ones(tokens), abs=1e-6)


@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    half=st.integers(0, 16),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    position=st.integers(0, 10**6),
    seed=seeds,
)
def test_a_rotation_is_that_of_the_reference_to_the_bit(
    tokens: int, heads: int, half: int, rest: int, interleaved: bool, position: int, seed: int
) -> None:
    rope = Rope(10000.0, 2 * half, interleaved)
    x = normal(seed, tokens, heads, 2 * half + rest + 1)
    (found,) = the_same(lambda ops: (ops.rope(x, position, rope),))
    assert np.array_equal(found, REFERENCE.rope(x, position, rope))


@given(tokens=st.integers(1, 20), groups=st.sampled_from((1, 2, 4)), seed=seeds, data=st.data())
def test_a_router_chooses_as_the_reference_does(tokens: int, groups: int, seed: int, data: st.DataObject) -> None:
    experts = groups * data.draw(st.integers(2, 140 // groups))
    routing = Routing(
        data.draw(st.integers(1, min(experts // groups, 10))),
        data.draw(st.sampled_from((SOFTMAX, SIGMOID, CHOSEN_SIGMOID, SQRT_SOFTPLUS))),
        data.draw(st.booleans()),
        2.5,
        groups,
        data.draw(st.integers(1, groups)),
    )
    logits, bias = normal(seed, tokens, experts, scale=3), normal(seed, experts)
    logits[0, experts // 2 :] = logits[0, 0]  # equals
    given_bias = weight(bias) if data.draw(st.booleans()) else None
    ids, weights = the_same(lambda ops: ops.route(logits, routing, given_bias))
    expected_ids, expected_weights = REFERENCE.route(logits, routing, given_bias)
    assert near(weights, expected_weights, 1e-6)
    assert np.mean(ids != expected_ids) < 0.1  # where two scores are the same to rounding


def test_large_logits_are_told_apart_though_their_sigmoids_are_not() -> None:
    logits = np.array([[20.0, 30.0, 25.0, -3.0]], np.float32)
    routing = Routing(2, CHOSEN_SIGMOID, norm_topk_prob=False)
    ids, weights = the_same(lambda ops: ops.route(logits, routing))
    assert (ids.tolist(), weights.tolist()) == ([[1, 2]], [[1.0, 1.0]])
    assert REFERENCE.route(logits, routing)[0].tolist() == [[1, 2]]


def test_a_router_that_knows_no_numbers_still_names_experts() -> None:
    logits = np.full((2, 8), np.nan, np.float32)
    ids, weights = the_same(lambda ops: ops.route(logits, Routing(3)))
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert np.isnan(weights).all()


# ---- gated DeltaNet


@given(tokens=st.integers(1, 30), channels=st.integers(1, 70), kernel=st.integers(1, 5), seed=seeds)
def test_a_convolution_is_that_of_the_reference_to_the_bit(tokens: int, channels: int, kernel: int, seed: int) -> None:
    x, taps, start = normal(seed, tokens, channels), normal(seed, channels, kernel), normal(seed, kernel - 1, channels)

    def compute(ops: NativeOps) -> Sequence[Float32]:
        state, outputs = start, []
        for at in cuts(seed + ops.threads, tokens):
            output, state = ops.causal_conv1d(x[at], weight(taps), state)
            outputs.append(output)
        return np.concatenate(outputs), state

    found, state = the_same(compute)
    expected, expected_state = REFERENCE.causal_conv1d(x, weight(taps), start)
    assert np.array_equal(found, expected)
    assert np.array_equal(state, expected_state)


@settings(max_examples=30)
@given(
    tokens=st.sampled_from((1, 2, 30)),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_width=st.sampled_from((2, 16, 128)),
    value_width=st.sampled_from((1, 16, 40)),
    kind=st.sampled_from(("by head", "by channel", "without beta")),
    seed=seeds,
)
def test_the_delta_rule_is_that_of_the_reference_however_it_is_cut(
    tokens: int, key_heads: int, group: int, key_width: int, value_width: int, kind: str, seed: int
) -> None:
    heads = key_heads * group
    q, k = normal(seed, tokens, key_heads, key_width), normal(seed + 1, tokens, key_heads, key_width)
    k = REFERENCE.l2_norm(k, 1e-6)
    v, some = normal(seed + 2, tokens, heads, value_width), REFERENCE.sigmoid(normal(seed + 3, tokens, heads))
    beta = None if kind == "without beta" else some
    log_decay = -np.abs(normal(seed + 4, tokens, heads, *((key_width,) if kind == "by channel" else ())))

    def compute(ops: NativeOps) -> Sequence[Float32]:
        state, outputs = ops.new_delta_state(heads, key_width, value_width), []
        for at in cuts(seed + ops.threads, tokens):
            output, state = ops.gated_delta_rule(
                q[at], k[at], v[at], log_decay[at], None if beta is None else beta[at], state
            )
            outputs.append(output)
        return np.concatenate(outputs), state.now

    found, state = the_same(compute)
    start = REFERENCE.new_delta_state(heads, key_width, value_width)
    expected, expected_state = REFERENCE.gated_delta_rule(q, k, v, log_decay, beta, start)
    assert near(found, expected)
    columns = np.moveaxis(state, 2, 1).reshape(heads, key_width, -1)[..., :value_width]  # panels side by side
    assert near(columns, expected_state)


def test_a_step_of_the_delta_rule_leaves_the_state_before_it() -> None:
    x, gate = normal(0, 1, 2, 16), np.full((1, 2), 0.5, np.float32)
    for ops in every_ops((1,)):
        state = ops.new_delta_state(2, 16, 16)
        first, after = ops.gated_delta_rule(x, x, x, -gate, gate, state)
        again, _ = ops.gated_delta_rule(x, x, x, -gate, gate, state)
        assert np.array_equal(first, again)
        assert not state.now.any()
        assert after.now.any()
