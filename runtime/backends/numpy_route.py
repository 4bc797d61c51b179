"""The router in NumPy: how it scores and chooses experts, and what they weigh (Routing in base.py)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from formats.config import CHOSEN_SIGMOID, SOFTMAX, SPARSEMIXER, SQRT_SOFTPLUS
from formats.dtypes import Float32
from formats.errors import FormatError
from runtime.backends.facts import Routing
from runtime.backends.numpy_latent import softmax

Integers = npt.NDArray[np.int64]


def route(logits: Float32, routing: Routing, correction_bias: Float32 | None) -> tuple[Integers, Float32]:
    """As Ops.route, without a scale of experts."""
    if routing.scoring_func == SPARSEMIXER:
        return choose_by_sparsemixer(logits, routing)
    scores = scores_of(logits, routing)
    compared = logits if routing.scoring_func == CHOSEN_SIGMOID else scores
    if correction_bias is not None:
        compared = compared + correction_bias
    if routing.n_group > 1:
        groups = compared.reshape(len(logits), routing.n_group, -1).copy()
        ranked_by = 1 if routing.scoring_func == SOFTMAX else 2  # experts
        best = np.sort(groups, axis=2)[..., -ranked_by:].sum(axis=2)  # [T, n_group]
        lost = np.argsort(-best, axis=1, kind="stable")[:, routing.topk_group :]
        np.put_along_axis(groups, lost[..., None], -np.inf, axis=1)
        compared = groups.reshape(scores.shape)
    expert_ids: Integers = np.argsort(-compared, axis=1, kind="stable")[:, : routing.top_k]
    return expert_ids, routing_weights(scores, expert_ids, routing)


def choose_by_sparsemixer(logits: Float32, routing: Routing) -> tuple[Integers, Float32]:
    """The largest logit, then the largest of the others; as `route`.

    A weight is the softmax of the logits that are left and no further below the largest of them than twice the jitter,
    as a share of what is larger, that one or the logit without its sign.
    Source: Liu et al., GRIN (2409.12136); transformers' sparsemixer, which does not normalise either.
    """
    expert_ids, weights, left = [], [], logits.copy()
    for _ in range(routing.top_k):
        best = left.argmax(axis=1)[:, None]  # [T, 1]
        largest = np.take_along_axis(left, best, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # where both are 0, none is far
            far = (largest - logits) / np.maximum(np.abs(logits), largest) > np.float32(2 * routing.jitter)
        expert_ids.append(best)
        weights.append(np.take_along_axis(softmax(np.where(far, np.float32(-np.inf), left)), best, axis=1))
        np.put_along_axis(left, best, -np.inf, axis=1)
    scale = np.float32(routing.routed_scaling_factor)
    return np.concatenate(expert_ids, axis=1), np.concatenate(weights, axis=1) * scale


def scores_of(logits: Float32, routing: Routing) -> Float32:
    """Of all experts: [T, num_experts]."""
    if routing.scoring_func == SOFTMAX:
        return softmax(logits)
    if routing.scoring_func == SQRT_SOFTPLUS:
        scores: Float32 = np.sqrt(np.logaddexp(np.float32(0), logits))
        return scores
    return sigmoid(logits)


def routing_weights(scores: Float32, expert_ids: Integers, routing: Routing) -> Float32:
    """Of the chosen experts [T, k]."""
    weights: Float32 = np.take_along_axis(scores, expert_ids, axis=1)
    if routing.norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return weights * np.float32(routing.routed_scaling_factor)


def expert_ids_of(rows: Float32, token_ids: Sequence[int], top_k: int, num_experts: int) -> Integers:
    """Rows of a table of experts [T, top_k] as integers. Raises FormatError for a row that is no choice of experts."""
    if rows.shape[1] != top_k:
        raise FormatError(
            f"resident.bin: the table of experts (tid2eid) has {rows.shape[1]} columns, expected top_k {top_k}"
        )
    ranked = np.sort(rows, axis=1)
    good = (ranked[:, 0] >= 0) & (ranked[:, -1] < num_experts) & (np.diff(ranked) >= 1).all(axis=1)
    good &= (rows == np.floor(rows)).all(axis=1)
    if not good.all():
        bad = int(np.argmin(good))
        raise FormatError(
            f"resident.bin: the table of experts (tid2eid) has {rows[bad].tolist()} for token {token_ids[bad]}, "
            f"expected distinct whole numbers from 0 to {num_experts - 1}"
        )
    return rows.astype(np.int64)


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x))."""
    y = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, np.float32(1), y) / (1 + y)
