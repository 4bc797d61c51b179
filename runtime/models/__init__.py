"""One file per kind of model, each read from top to bottom as the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tokenizers import Tokenizer

from formats.config import (
    BailingHybridConfig,
    Cohere2MoeConfig,
    DecoderConfig,
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV41Config,
    Gemma4Config,
    Glm5NextConfig,
    GraniteMoeHybridConfig,
    HyV4Config,
    KimiK3Config,
    KimiLinearConfig,
    LongcatFlashConfig,
    MiniMaxM3Config,
    MistralLarge4Config,
    ModelConfig,
    MuseSparkConfig,
    NemotronHConfig,
    PhimoeConfig,
    Qwen3_5MoeConfig,
    Qwen4ExpConfig,
    Step3p5Config,
)
from runtime.backends.base import Ops
from runtime.backends.facts import Array, State, Wanted
from runtime.models.bailing_hybrid import BailingHybrid
from runtime.models.cohere2_moe import Cohere2Moe
from runtime.models.decoder import Decoder
from runtime.models.deepseek_v3 import DeepseekV3
from runtime.models.deepseek_v4 import DeepseekV4
from runtime.models.deepseek_v41 import DeepseekV41
from runtime.models.gemma4 import Gemma4
from runtime.models.glm5_next import Glm5Next
from runtime.models.granitemoehybrid import GraniteMoeHybrid
from runtime.models.hy_v4 import HyV4
from runtime.models.kimi_k3 import KimiK3
from runtime.models.kimi_linear import KimiLinear
from runtime.models.longcat_flash import LongcatFlash
from runtime.models.minimax_m3 import MiniMaxM3
from runtime.models.mistral_large4 import MistralLarge4
from runtime.models.muse_spark import MuseSpark
from runtime.models.nemotron_h import NemotronH
from runtime.models.phimoe import Phimoe
from runtime.models.qwen3_5_moe import Qwen3_5Moe
from runtime.models.qwen4_exp import Qwen4Exp
from runtime.session import Sequence as StepSequence
from runtime.token_classes import token_classes


class Model(Protocol):
    """What the engine asks of a model."""

    @property
    def config(self) -> ModelConfig:
        """Its facts."""

    @property
    def ops(self) -> Ops:
        """What it computes with."""

    def new_states(self) -> list[State]:
        """What every layer remembers of a sequence that has not begun."""

    def forward(self, token_ids: Sequence[int], sequences: Sequence[StepSequence], wanted: Wanted = None) -> Array:
        """Tokens of one step -> last hidden states [T, D]; replaces the states in sequences.

        Only those of the rows that are wanted come back: what the last layer does behind its attention is for them.
        """

    def logits(self, hidden: Array) -> Array:
        """[T, D] -> [T, vocab_size]."""


MODELS: Mapping[type[ModelConfig], Callable[[Any, Ops], Model]] = {
    BailingHybridConfig: BailingHybrid,
    Cohere2MoeConfig: Cohere2Moe,
    DecoderConfig: Decoder,
    DeepseekV3Config: DeepseekV3,
    DeepseekV4Config: DeepseekV4,
    DeepseekV41Config: DeepseekV41,
    Gemma4Config: Gemma4,
    Glm5NextConfig: Glm5Next,
    GraniteMoeHybridConfig: GraniteMoeHybrid,
    HyV4Config: HyV4,
    KimiK3Config: KimiK3,
    KimiLinearConfig: KimiLinear,
    LongcatFlashConfig: LongcatFlash,
    MiniMaxM3Config: MiniMaxM3,
    MistralLarge4Config: MistralLarge4,
    MuseSparkConfig: MuseSpark,
    NemotronHConfig: NemotronH,
    PhimoeConfig: Phimoe,
    Qwen3_5MoeConfig: Qwen3_5Moe,
    Qwen4ExpConfig: Qwen4Exp,
    Step3p5Config: Decoder,
}


def new_model(config: ModelConfig, ops: Ops, tokenizer: Callable[[], Tokenizer], made_up: bool) -> Model:
    """The model of a config; tokenizer and made_up as of `token_classes`."""
    model = MODELS[type(config)](config, ops)
    if isinstance(model, DeepseekV41):
        return replace(model, classes=token_classes(config, tokenizer, made_up))
    return model
