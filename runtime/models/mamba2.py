"""Mamba2 (Dao and Gu, 2405.21060): a state per head that decays and is written to, behind a short convolution.

Source: transformers' modeling_nemotron_h.py. Shapes: T tokens of one step, H heads, p width of a head, G groups of
heads, n state_size.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items

from formats.config import SILU, Mamba2
from runtime.backends.base import Ops
from runtime.backends.facts import Array, State, Weight
from runtime.models.norms import unit_norm
from runtime.session import Sequence


def new_mamba2_state(ops: Ops, mamba: Mamba2) -> State:
    """Of a sequence that has not begun: inputs of the convolution, and [H, n, p]."""
    convolution = ops.zeros((mamba.conv_kernel - 1, mamba.conv_channels))
    return convolution, ops.new_delta_state(mamba.num_heads, mamba.state_size, mamba.head_dim)


def mamba2(
    ops: Ops,
    mamba: Mamba2,
    eps: float,
    w: Callable[[str], Weight],
    x: Array,
    sequences: Items[Sequence],
    layer: int,
) -> Array:
    """x [T, D] -> [T, D]; w gives the layer's weights by name. Replaces the states of the layer."""
    heads, groups, width, channels = mamba.num_heads, mamba.n_groups, mamba.width, mamba.conv_channels
    in_group = groups * mamba.state_size
    projected = ops.linear(x, w("in_proj"))
    z, xbc, dt = (projected[:, a:b] for a, b in ((0, width), (width, width + channels), (width + channels, None)))
    step = ops.softplus(dt, w("dt_bias"))[..., None]  # [T, H, 1]
    log_decay = ops.decay(dt, w("dt_bias"), w("A_log"))  # [T, H]
    bias = w("conv1d.bias") if mamba.conv_bias else None
    outputs = []
    for s in sequences:
        convolution, recurrent = s.states[layer]
        mixed, convolution = ops.causal_conv1d(xbc[s.rows], w("conv1d"), convolution, bias=bias)
        mixed = ops.silu(mixed)
        values = mixed[:, :width].reshape(-1, heads, mamba.head_dim)
        b = mixed[:, width : width + in_group].reshape(-1, groups, mamba.state_size)
        c = mixed[:, width + in_group :].reshape(-1, groups, mamba.state_size)
        # S = exp(step * A) S + outer(b, step * x), y = S^T c + D x
        written = values * step[s.rows]
        y, recurrent = ops.gated_delta_rule(c, b, written, log_decay[s.rows], None, recurrent)
        s.states[layer] = (convolution, recurrent)
        outputs.append(y + ops.scale_heads(values, w("D")))  # [tokens, H, p]
    gated = ops.gate(ops.concatenate(outputs).reshape(-1, width), z, SILU)
    normed = unit_norm(ops, gated.reshape(-1, groups, width // groups), eps).reshape(-1, width)
    return ops.linear(ops.scale(normed, w("norm")), w("out_proj"))
