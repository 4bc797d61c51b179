"""The native kernels against their definition, and against each other to the bit: levels, threads, tokens per call."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.dtypes import AnyArray, Float32, to_float32
from formats.encodings import FP8, MXFP4, NVFP4, Q4K, Q5K, Affine, Encoding, Levels, Plain, Symmetric, ZeroPoint
from formats.errors import UnsupportedError
from formats.kernels import PRECISIONS
from formats.kernels import matrix as matrix_of
from formats.record import PART_NAMES, PartSpec, RecordLayout, decode_part, lay_out_record
from runtime.backends import abi, native
from tests.encodings import GGML_ENCODINGS
from tests.matrices import Float64, Matrix, columns_of, fill, relative_error, rounded

pytestmark = [
    pytest.mark.skipif(not native.levels(), reason="the native kernels are not built"),
    pytest.mark.timeout(600),  # four levels, each with more threads than processors, beside tests that compile
]

LEVELS = native.levels()
# The largest error over the norm of the answer. Exact: 21 to 24 bits per group, and sums in another order.
# Close and fast: beside 16 and 8 bits per group the same; but where h lies between two integers, either is right.
PRODUCT_TOLERANCE, EXPERTS_TOLERANCE = 1e-5, {"exact": 1e-5, "close": 3e-5, "fast": 5e-3}
NUM_EXPERTS = 4

scale_dtypes = st.sampled_from(("bf16", "f16", "f32"))
group_sizes = st.sampled_from((32, 64, 128))
encodings: st.SearchStrategy[Encoding] = st.one_of(
    st.builds(
        Affine, bits=st.sampled_from((4, 8)), group_size=group_sizes, scale_dtype=st.sampled_from(("bf16", "f16"))
    ),
    st.builds(Affine, bits=st.sampled_from((2, 3, 5, 6)), group_size=group_sizes, scale_dtype=scale_dtypes),
    st.builds(Symmetric, bits=st.sampled_from((4, 5, 8)), group_size=group_sizes, scale_dtype=scale_dtypes),
    st.builds(ZeroPoint, bits=st.sampled_from((2, 3, 4, 8)), group_size=group_sizes, scale_dtype=scale_dtypes),
    st.builds(FP8, group_size=st.sampled_from((32, 128)), scale_dtype=scale_dtypes),
    st.builds(NVFP4, global_scale=st.sampled_from(("multiply", "divide"))),
    st.sampled_from((Plain("bf16"), Plain("f16"), Plain("f32"), MXFP4())),
    st.sampled_from(GGML_ENCODINGS),
)


def contexts(precision: str, threads: Sequence[int] = (1, 2, 3)) -> Iterator[native.Context]:
    """Every level with every number of threads, one after another."""
    for level in LEVELS:
        for n in threads:
            with native.Context(n, precision, level) as context:
                yield context


@pytest.mark.parametrize("none", [0x7F, 0xFF])
@pytest.mark.parametrize("column", [0, 63, 64, 127, 167])
def test_a_weight_of_fp8_that_is_no_number_makes_its_row_none(column: int, none: int) -> None:
    matrix = Matrix(FP8(32, "f32"), 19, 168, None, 0)
    matrix.part.views(matrix.record)["codes"][7, column] = none
    x = np.random.default_rng(1).standard_normal((5, 168), np.float32)
    for context in contexts("exact", (1,)):
        for tokens in (1, 2, 5):
            found = context.linear(matrix.native, matrix.record.ctypes.data, x[:tokens])
            assert (np.isnan(found) == (np.arange(19) == 7)).all()


@given(
    encoding=encodings,
    groups=st.integers(1, 40),
    rows=st.integers(1, 70),
    tokens=st.one_of(st.integers(1, 11), st.sampled_from((32, 35))),  # tiles of 8, 32 and what is left of them
    bias=st.sampled_from((None, "bf16", "f32")),
    precision=st.sampled_from(tuple(PRECISIONS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_the_product_whatever_computes_it(
    encoding: Encoding, groups: int, rows: int, tokens: int, bias: str | None, precision: str, seed: int
) -> None:
    matrix = Matrix(encoding, rows, columns_of(encoding, groups), bias, seed)
    x = np.random.default_rng(seed).standard_normal((tokens, matrix.part.columns), np.float32)
    base = matrix.record.ctypes.data
    results = []
    for context in contexts(precision):
        results.append(context.linear(matrix.native, base, x))
        one_by_one = np.concatenate([context.linear(matrix.native, base, x[t : t + 1]) for t in range(tokens)])
        assert (one_by_one == results[-1]).all()
    assert all((result == results[0]).all() for result in results)
    expected = matrix.product(rounded(encoding, x, precision))
    assert relative_error(results[0], expected, typical=1.0) < PRODUCT_TOLERANCE


@pytest.mark.parametrize("encoding", GGML_ENCODINGS, ids=lambda encoding: encoding.id)
def test_rows_of_an_odd_number_of_superblocks(encoding: Encoding) -> None:
    """Two of them make a block of groups of 32, and sixteen are prepared together, whatever row they are in."""
    matrix = Matrix(encoding, 72, 768, None, seed=0)
    x = np.random.default_rng(0).standard_normal((1, 768), np.float32)
    for precision in PRECISIONS:
        results = [context.linear(matrix.native, matrix.record.ctypes.data, x) for context in contexts(precision, [1])]
        assert all((result == results[0]).all() for result in results)
        expected = matrix.product(rounded(encoding, x, precision))
        assert relative_error(results[0], expected, typical=1.0) < PRODUCT_TOLERANCE


class Experts:
    """NUM_EXPERTS random experts of one layout."""

    def __init__(
        self, encoding: Encoding, hidden: int, intermediate: int, bias: str | None, seed: int, gated: bool = True
    ) -> None:
        rng = np.random.default_rng(seed)
        shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self.layout: RecordLayout = lay_out_record(
            PartSpec(name, *shapes[name], encoding, bias) for name in PART_NAMES[not gated :]
        )
        self.records = np.zeros((NUM_EXPERTS, self.layout.record_bytes), np.uint8)
        for record in self.records:
            for part in self.layout.parts:
                fill(part, record, rng)

    def expected(
        self,
        x: Float32,
        ids: AnyArray,
        weights: Float32,
        activation: abi.Activation,
        precision: str,
        norm: tuple[Float32, float] | None = None,
    ) -> Float64:
        """In float64, token by token; norm: its weight and eps."""

        def seen(v: Float32) -> Float32:
            return rounded(self.layout.parts[0].encoding, v.astype(np.float32), precision)

        y = np.zeros(x.shape)
        for t, chosen in enumerate(ids):
            for expert, weight in zip(chosen, weights[t], strict=True):
                parts = [decode_part(part, self.records[expert]) for part in self.layout.parts]
                *first, (up, up_bias), (down, down_bias) = [
                    (values.astype(np.float64), 0 if bias is None else bias) for values, bias in parts
                ]
                gate, gate_bias = first[0] if first else (up, up_bias)
                v = seen(x[t] * weight if activation.scale_input else x[t])
                h = seen(activated(activation, gate @ v + gate_bias, up @ v + up_bias))
                given = down @ h + down_bias
                if norm is not None:
                    given = given * norm[0]
                    given = given / np.sqrt(np.mean(np.square(given)) + norm[1])
                y[t] += (1 if activation.scale_input else weight) * given
        return y


def activated(activation: abi.Activation, gate: Float64, up: Float64) -> Any:
    """The activations as their models define them."""
    if activation.kind == abi.RELU2:
        return np.square(np.maximum(up, 0))
    if activation.kind == abi.SILU:
        return gate / (1 + np.exp(-gate)) * up
    if activation.kind == abi.GELU_TANH:
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if activation.kind == abi.SITU:
        bent = activation.limit * np.tanh(up / activation.limit)
        return activation.alpha * np.tanh(gate / activation.alpha) / (1 + np.exp(-gate)) * bent
    up = np.clip(up, -activation.limit, activation.limit)
    if activation.kind == abi.CLAMPED_SILU:
        return np.minimum(gate / (1 + np.exp(-gate)), activation.limit) * up
    gate = np.minimum(gate, activation.limit)
    if activation.kind == abi.SILU_CLAMPED:
        return gate / (1 + np.exp(-gate)) * up
    return gate / (1 + np.exp(-activation.alpha * gate)) * (up + 1)


def run(
    context: native.Context,
    experts: Experts,
    x: Float32,
    ids: AnyArray,
    weights: Float32,
    activation: abi.Activation,
    norm: abi.ExpertNorm | None = None,
) -> Float32:
    """All chosen experts in one call, then the sum."""
    outputs = np.full((ids.size, x.shape[1]), np.nan, np.float32)
    pairs = {expert: np.flatnonzero(ids.reshape(-1) == expert) for expert in np.unique(ids).tolist()}
    chosen = [native.Chosen(experts.records[expert], pairs[expert]) for expert in pairs]
    context.experts(native.expert_layout(experts.layout, activation), chosen, x, weights, outputs, norm)
    return context.weighted_sum(outputs, np.ones_like(weights) if activation.scale_input else weights)


@given(
    encoding=encodings,
    groups=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    tokens=st.integers(1, 9),
    bias=st.sampled_from((None, "bf16")),
    kind=st.integers(abi.SILU, abi.CLAMPED_SILU),
    scale_input=st.booleans(),
    precision=st.sampled_from(tuple(PRECISIONS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_experts_are_gate_up_activation_and_down_whatever_computes_them(
    encoding: Encoding,
    groups: tuple[int, int],
    tokens: int,
    bias: str | None,
    kind: int,
    scale_input: bool,
    precision: str,
    seed: int,
) -> None:
    experts = Experts(
        encoding, columns_of(encoding, groups[0]), columns_of(encoding, groups[1]), bias, seed, kind != abi.RELU2
    )
    activation = abi.Activation(kind, 1.702, 1.0, scale_input)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, experts.layout.parts[0].columns), np.float32)
    ids = np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(tokens)])
    weights = rng.random((tokens, 2), np.float32) + np.float32(0.1)
    results = []
    for context in contexts(precision):
        results.append(run(context, experts, x, ids, weights, activation))
        last = run(context, experts, x[-1:].copy(), ids[-1:], weights[-1:].copy(), activation)
        assert (last == results[-1][-1:]).all()
    assert all((result == results[0]).all() for result in results)
    expected = experts.expected(x, ids, weights, activation, precision)
    assert relative_error(results[0], expected) < EXPERTS_TOLERANCE[precision]


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        *itertools.permutations((Q4K(), Levels("iq3_s"), Affine(4, 32, "bf16")), 2),
        *itertools.permutations((Q5K(), Affine(5, 32, "bf16")), 2),
        *itertools.permutations((Levels("iq1_s"), ZeroPoint(2, 32, "f16")), 2),
    ],
    ids=lambda encoding: encoding.id,
)
def test_gate_and_up_may_have_the_same_codes_and_other_scales(gate: Encoding, up: Encoding) -> None:
    """One operand serves both, but not one loop."""
    columns, intermediate = 768, 256
    layout = lay_out_record(
        [
            PartSpec("gate", intermediate, columns, gate, None),
            PartSpec("up", intermediate, columns, up, None),
            PartSpec("down", columns, intermediate, MXFP4(), None),
        ]
    )
    record, rng = np.zeros(layout.record_bytes, np.uint8), np.random.default_rng(0)
    for part in layout.parts:
        fill(part, record, rng)
    x = rng.standard_normal((1, columns), np.float32)
    activation, chosen = abi.Activation(abi.SILU, 1.0, 1.0, False), [native.Chosen(record, np.arange(1))]
    results = []
    for context in contexts("exact", (1,)):
        results.append(np.full((1, columns), np.nan, np.float32))
        weights = np.ones((1, 1), np.float32)
        context.experts(native.expert_layout(layout, activation), chosen, x, weights, results[-1], None)
    (gates, _), (ups, _), (downs, _) = (decode_part(part, record) for part in layout.parts)
    expected = downs.astype(np.float64) @ activated(activation, gates @ x[0], ups @ x[0])
    assert all((result == results[0]).all() for result in results)
    assert relative_error(results[0], expected[None]) < EXPERTS_TOLERANCE["exact"]


@settings(max_examples=20)
@given(
    encoding=encodings,
    groups=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.sampled_from((1, 2, 9, 140)),
    eps=st.sampled_from((1e-8, 1e-5, 0.1)),
    scale_input=st.booleans(),
    precision=st.sampled_from(tuple(PRECISIONS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_experts_give_is_normalised_before_it_is_weighed(
    encoding: Encoding,
    groups: tuple[int, int],
    tokens: int,
    eps: float,
    scale_input: bool,
    precision: str,
    seed: int,
) -> None:
    """A token alone or among so many that they take several batches; every instruction set and number of threads."""
    experts = Experts(encoding, columns_of(encoding, groups[0]), columns_of(encoding, groups[1]), None, seed)
    hidden = experts.layout.parts[0].columns
    activation = abi.Activation(abi.SILU, 0.0, 0.0, scale_input)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden), np.float32)
    ids = np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(tokens)])
    weights = rng.random((tokens, 2), np.float32) + np.float32(0.1)
    weight = rng.random(hidden, np.float32) + np.float32(0.5)
    norm = abi.ExpertNorm(weight.ctypes.data, eps, 0)
    results = []
    for context in contexts(precision):
        results.append(run(context, experts, x, ids, weights, activation, norm))
        last = run(context, experts, x[-1:].copy(), ids[-1:], weights[-1:].copy(), activation, norm)
        assert (last == results[-1][-1:]).all()
    assert all((result == results[0]).all() for result in results)
    few = slice(0, 9)  # for what Python computes slowly
    expected = experts.expected(x[few], ids[few], weights[few], activation, precision, (weight, eps))
    assert relative_error(results[0][few], expected) < EXPERTS_TOLERANCE[precision]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_no_number_stays_none(level: str, value: float, precision: str) -> None:
    matrix = Matrix(Affine(4, 64, "bf16"), 20, 256, None, 0)
    x = np.ones((1, 256), np.float32)
    x[0, 100] = value
    with native.Context(1, precision, level) as context:
        assert not np.isfinite(context.linear(matrix.native, matrix.record.ctypes.data, x)).any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_times_anything_is_nothing(precision: str) -> None:
    matrix = Matrix(Affine(4, 64, "bf16"), 20, 256, None, 0)
    x = np.full((3, 256), 1e-38, np.float32)
    x[0] = 0
    for context in contexts(precision):
        assert (context.linear(matrix.native, matrix.record.ctypes.data, x) == 0).all()


def test_a_float16_means_the_same_as_in_numpy() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    matrix = matrix_of(Plain("f16"), len(every), 1, {"weight": 0})
    for context in contexts("exact", threads=(1,)):
        found = context.linear(matrix, every.ctypes.data, np.ones((1, 1), np.float32))
        assert (found[0] == to_float32(every, "f16")).all()


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"instruction set is z80, expected one of .*portable"):
        native.Context(1, "exact", "z80")
