"""The native library as ctypes has it: what mirrors native/se_native.h, and nothing that calls it."""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache

from formats import native
from formats.kernels import Matrix

READ_LOOPS = 4  # enum se_read_loop
READ_FAILED, STOPPED, MISSED = 6, 7, 8  # enum se_status


class Activation(ctypes.Structure):
    """se_activation: what joins gate and up."""

    _fields_ = (("kind", c_int32), ("alpha", c_float), ("limit", c_float), ("scale_input", c_int32))


class Expert(ctypes.Structure):
    """se_expert: a record and the pairs (token * k + place) that chose it."""

    _fields_ = (("record", c_void_p), ("pairs", c_void_p), ("num_pairs", c_int64))


class ExpertLayout(ctypes.Structure):
    """se_expert_layout: what all experts of a layer share."""

    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix), ("activation", Activation))


class ExpertNorm(ctypes.Structure):
    """se_expert_norm: what an expert gives goes through this before it is weighed."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("reserved", c_int32))


SILU, SWIGLU_CLAMPED, GELU_TANH, SILU_CLAMPED, SITU, RELU2, CLAMPED_SILU = range(7)


class KVCache(ctypes.Structure):
    """se_kv_cache: where keys and values lie, and their shape."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("heads", c_int64),
        ("width", c_int64),
        ("value_width", c_int64),
    )


class Turn(ctypes.Structure):
    """se_turn: what queries and keys go through first."""

    _fields_ = (
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("half", c_int64),
        ("interleaved", c_int32),
        ("eps", c_float),
    )


class Beside(ctypes.Structure):
    """se_beside: keys that queries see beside those of a cache."""

    _fields_ = (
        ("keys", c_void_p),
        ("count", c_int64),
        ("selection", c_void_p),
        ("gathered", c_int64),
        ("most", c_int64),
    )


class Heads(ctypes.Structure):
    """se_heads: which rows of a matrix each head has."""

    _fields_ = (("count", c_int64), ("stride", c_int64), ("first", c_int64), ("rows", c_int64))


class DeltaShape(ctypes.Structure):
    """se_delta_shape: heads and widths of a gated DeltaNet."""

    _fields_ = (
        ("heads", c_int64),
        ("key_heads", c_int64),
        ("key_width", c_int64),
        ("value_width", c_int64),
        ("decay_by_channel", c_int64),
    )


class Routing(ctypes.Structure):
    """se_routing: how a router chooses."""

    _fields_ = (
        ("num_experts", c_int64),
        ("top_k", c_int64),
        ("n_group", c_int64),
        ("topk_group", c_int64),
        ("scoring", c_int32),
        ("normalize", c_int32),
        ("scaling_factor", c_float),
        ("chosen", c_int32),
    )


FUNCTIONS = (  # enum se_function
    "se_linear", "se_experts", "se_rms_norm", "se_add_norm", "se_l2_norm", "se_map", "se_gate", "se_decay", "se_route",
    "se_attention", "se_causal_conv1d", "se_delta_rule", "se_experts_streamed", "copy", "add_scaled", "find",
)  # fmt: skip
CALL_WORDS = 16  # int64 of se_call: which function, then its arguments
MAP_SIGMOID, MAP_SILU = 0, 1  # enum se_map_kind
SCORE_SOFTMAX, SCORE_SIGMOID, SCORE_CHOSEN_SIGMOID, SCORE_SQRT_SOFTPLUS = 0, 1, 2, 3  # enum se_scoring


@cache
def load_library() -> ctypes.CDLL | None:
    """The shared library with the kernels declared; None when there is none.

    Raises UnsupportedError for a library of another version.
    """
    library = native.load_library()
    if library is not None:
        declare(library)
    return library


def declare(library: ctypes.CDLL) -> None:
    """Argument and result types, so that no size is guessed."""
    sizes = (ctypes.sizeof(Matrix), ctypes.sizeof(Activation), ctypes.sizeof(Expert), ctypes.sizeof(ExpertLayout))
    assert sizes == (72, 16, 24, 232)  # static_assert of se_native.h
    context, floats = c_void_p, c_void_p
    signatures = {
        "se_levels": (c_char_p, ()),
        "se_open": (c_void_p, (c_char_p, c_int64, c_int64)),
        "se_close": (None, (context,)),
        "se_level": (c_char_p, (context,)),
        "se_kernel_ns": (c_int64, (context,)),
        "se_scratch_bytes": (c_int64, (context,)),
        "se_dispatch": (c_int32, (context,)),
        "se_linear": (
            c_int32, (context, c_int32, POINTER(Matrix), c_int64, c_void_p, floats, c_int64, floats),
        ),
        "se_experts": (
            c_int32,
            (
                context, c_int32, POINTER(ExpertLayout), POINTER(Expert), c_int64, floats, floats,
                c_int64, c_int64, POINTER(ExpertNorm), floats,
            ),
        ),
        "se_experts_streamed": (
            c_int32,
            (
                context, c_void_p, c_int32, POINTER(ExpertLayout), c_void_p, c_void_p, c_int64,
                floats, floats, c_int64, c_int64, POINTER(ExpertNorm), floats, floats,
            ),
        ),
        "se_weighted_sum": (c_int32, (context, floats, floats, c_int64, c_int64, c_int64, floats)),
        "se_rms_norm": (c_int32, (context, floats, c_int64, c_int64, floats, c_float, floats)),
        "se_add_norm": (
            c_int32, (context, floats, floats, c_float, c_int64, c_int64, floats, c_float, floats, floats),
        ),
        "se_l2_norm": (c_int32, (context, floats, c_int64, c_int64, c_float, c_float, floats)),
        "se_map": (c_int32, (context, c_int32, floats, c_int64, floats)),
        "se_gate": (c_int32, (context, c_int32, floats, floats, c_int64, floats)),
        "se_decay": (c_int32, (context, floats, floats, floats, c_int64, c_int64, floats)),
        "se_rope": (
            c_int32, (context, floats, c_int64, c_int64, c_int64, c_int64, c_int32, floats, floats, floats),
        ),
        "se_route": (c_int32, (context, POINTER(Routing), floats, floats, c_int64, c_void_p, floats)),
        "se_attention": (
            c_int32,
            (
                context, POINTER(KVCache), c_int64, floats, floats, floats,
                c_int64, c_int64, c_float, c_int64, floats, c_void_p, POINTER(Turn),
                POINTER(Beside), floats,
            ),
        ),
        "se_stream_weights": (
            c_int32,
            (context, floats, floats, floats, c_int64, c_int64, c_int64, c_float, floats, floats, floats),
        ),
        "se_collapse_streams": (c_int32, (context, floats, floats, c_int64, c_int64, c_int64, floats)),
        "se_expand_streams": (
            c_int32, (context, floats, floats, floats, floats, c_int64, c_int64, c_int64, floats),
        ),
        "se_pool": (c_int32, (context, floats, floats, c_int64, c_int64, c_int64, floats)),
        "se_heads_product": (
            c_int32, (context, POINTER(Matrix), c_void_p, POINTER(Heads), c_int32, floats, c_int64, floats),
        ),
        "se_causal_conv1d": (
            c_int32, (context, floats, floats, floats, c_int64, c_int64, c_int64, floats, floats),
        ),
        "se_delta_rule": (
            c_int32,
            (
                context, POINTER(DeltaShape), floats, floats, floats, floats, floats,
                c_int64, floats, floats, floats,
            ),
        ),
        "se_run": (c_int32, (context, c_void_p, c_int64, POINTER(c_int64))),
        "se_read": (c_int32, (context, c_int32, POINTER(c_void_p), c_int64, c_int64)),
    }  # fmt: skip
    native.declare(library, signatures)
