"""One file per model_type, each read from top to bottom as the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from runtime.backends.base import Array, Ops, State
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.models.qwen3_5_moe import Qwen3_5Moe
from runtime.models.qwen3_moe import Qwen3Moe
from runtime.session import Sequence as StepSequence


class Model(Protocol):
    """What the engine asks of a model."""

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""

    def forward(self, token_ids: Sequence[int], sequences: Sequence[StepSequence]) -> Array:
        """Tokens of one step -> last hidden states [T, D]; replaces the states in sequences."""

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""


MODELS: Mapping[str, Callable[[Any, Ops], Model]] = {
    "deepseek_v3": DeepseekV3,
    "qwen3_5_moe": Qwen3_5Moe,
    "qwen3_moe": Qwen3Moe,
}
