"""SparseMixer, as Phi-3.5-MoE chooses its experts, against its definition expert by expert."""

import math

import numpy as np
import pytest

from formats.config import SPARSEMIXER
from runtime.backends.facts import Routing
from runtime.backends.numpy_route import route


def by_definition(logits: list[float], jitter: float) -> tuple[list[int], list[float]]:
    """One token."""
    ids: list[int] = []
    weights = []
    for _ in range(2):
        left = [i for i in range(len(logits)) if i not in ids]
        best = max(left, key=lambda i: logits[i])
        near = [
            logits[i]
            for i in left
            if logits[best] - logits[i] <= 2 * jitter * max(logits[best], abs(logits[i])) or logits[i] == logits[best]
        ]
        ids.append(best)
        weights.append(1 / sum(math.exp(x - logits[best]) for x in near))
    return ids, weights


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.filterwarnings("error")
def test_each_expert_weighs_the_softmax_of_those_that_come_near_it(jitter: float) -> None:
    drawn = np.random.default_rng(5).normal(size=(64, 6)).astype(np.float32)
    some_alike = np.array([[0.0] * 6, [1.0] * 6, [-1.0] * 6, [0, -1, -2, 0, -3, -4], [5, 4.9, -5, 0, 0, 1e-30]])
    logits = np.concatenate([drawn, some_alike.astype(np.float32)])
    ids, weights = route(logits, Routing(2, SPARSEMIXER, False, jitter=jitter), None)
    for row, found_ids, found in zip(logits.tolist(), ids.tolist(), weights, strict=True):
        expected_ids, expected = by_definition(row, jitter)
        assert found_ids == expected_ids
        assert found == pytest.approx(expected, rel=1e-5)
