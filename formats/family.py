"""What a family of models is: which tensors it has, their shapes, their names in checkpoints, what becomes of each.

Shapes are words of symbols: D hidden, V vocabulary, E experts, I expert intermediate, S shared expert intermediate, F
intermediate of a dense layer, Q queries and their gates, O attention output, K keys or values, h head; of values that
are not as wide as keys: Ov and Kv; in layers with a window: sK and sKv, sO, sOv and sH; of linear attention: C
convolution channels, k convolution kernel, v values, H value heads, d value head; of latent attention: q and L the
ranks of queries and of keys with values, r rotary part of a head; of its indexer: i heads, x the width of one, X of
all; of DeepSeek-V4: N residual streams, G the outputs of all groups of heads, m and M tokens of an entry; of Kimi K3: l
what experts read; of Qwen3.8-Flash-Next: s streams, R the rank of their mixture, n an embedding of n-grams and nk the
kernel of its convolution, ngrams and ngram the rows and columns of one of its shards, which DeepSeek-V4.1 has by layer
(ngrams1...), and (N+1)D a key for each stream and a value; of LongCat-Flash: Z experts that
compute nothing; of Mistral Large 4: QV keys and values of all heads in layers without positions; of GLM-5.3-Flash: m
tokens of a pool; of Hunyuan 4: 2N what weighs streams before and after half a layer. `1` is itself.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from formats.config import ModelConfig


class Tensor(NamedTuple):
    """A resident tensor: its name in the container; in a source the prefix and suffix are added."""

    name: str
    shape: str
    keep: bool = False  # small and sensitive: stays in the encoding it arrives in; vectors always do
    suffix: str = ".weight"
    when: Callable[[Any], bool] | None = None  # it is only there for such a config
    where: Callable[[Any, int], bool] | None = None  # and in such layers
    source: str = ""  # its name in a source, where that is another
    also: str = ""  # its names in other carriers, MLX, GGUF or as transformers saves it, a space between them
    dtype: str = "BF16"  # as published where it is not quantized; whole numbers are those of experts
    padded: str = ""  # its shape as published, where that has more at its end than is meant
    transposed: bool = False  # columns come first in a source
    part: int = 0  # the nth of
    parts: int = 1  # so many tensors of a module whose rows they are, one after another

    @property
    def base(self) -> str:
        """Its name in a source, without prefix and suffix."""
        return self.source or self.name

    @property
    def published(self) -> str:
        """Its name in a source, without prefix."""
        return self.base + self.suffix


class Experts(NamedTuple):
    """A module of experts: the rows of `parts`, one part after another, or in turns.

    With `{expert}` in its name it belongs to one expert; without, all experts are stacked on its first axis. Which
    encoding it is in, and so which tensors beside `name + suffix` it has (`name + "_blocks"`, `name + ".qweight"`,
    scales...), repack/detect.py finds out.
    """

    name: str
    shape: str  # of one expert, rows first
    parts: tuple[str, ...]
    suffix: str = ".weight"  # of its tensor when it is a plain or FP8 one; "" for a bare parameter
    interleaved: bool = False  # rows of the parts take turns: gate, up, gate, up...
    transposed: bool = False  # when plain, columns come first
    either: bool = False  # or rows, as the shape tells
    bias: str = ""  # suffix of the projection's bias, "_bias" or ".bias"; "" without one


EMBEDDING = Tensor("embed_tokens", "V D")
FINAL_NORM = Tensor("norm", "D")
LM_HEAD = Tensor("lm_head", "V D")  # has head_prefix
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"
NGRAM_HASHES = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
NGRAM_SHARD = "ple.ple_embedding.ngram_embedding.shard_{}"
NGRAM_SCALE = "ple.ple_embedding.ngram_embedding.weight_scale"  # one for all shards, where they are FP8


@dataclass(frozen=True)
class Family:
    """All tensors of a model type, in model order."""

    prefixes: tuple[str, ...]  # one of them, the same for the whole checkpoint
    dims: Callable[[Any], Mapping[str, int]]  # symbol -> length
    before_mixer: tuple[Tensor, ...]
    mixers: Mapping[str, tuple[Tensor, ...]]  # by layer type
    after_mixer: tuple[Tensor, ...]  # of every layer
    moe: tuple[Tensor, ...]  # of a layer with experts, beside them
    expert_layouts: tuple[tuple[Experts, ...], ...]  # alternatives, decided by the names found
    skipped: Mapping[str, str]  # prefix of names that a text model does not need -> what they are
    skipped_ends: Mapping[str, str] = field(default_factory=dict)  # and by ends of names
    dense: tuple[Tensor, ...] = ()  # of a layer without experts
    unread: tuple[Tensor, ...] = ()  # that some checkpoints have in such a layer, too, and no model reads
    ngrams: tuple[Tensor, ...] = ()  # of layers that an embedding of n-grams is added to, its table not counted
    ngram_shards: Callable[[Any], Iterable[tuple[int, Tensor]]] = lambda config: ()  # its parts by layer, rows in order
    last: tuple[Tensor, ...] = (FINAL_NORM,)  # between the last layer and the head
    norms_around_zero: bool = False  # RMSNorm multiplies by 1 + weight; MLX's files have the 1 in the weight
    extra_layers: str = ""  # what layers beyond num_hidden_layers are, where they are known
    other_experts: str = ""  # what as many experts after num_experts are, and `mlp.gate.weight_1`, their router
    routers: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)  # more of a layer, by mlp_layer_types
    mlx: bool = True  # mlx-lm has this model, and so names of its own for the tensors
    never_quantized: tuple[str, ...] = ()  # modules or globs, beside those that no family quantizes
    embedding: Tensor = EMBEDDING
    head: Tensor = LM_HEAD
    of_head: tuple[Tensor, ...] = ()  # what stands beside it, and before it in a container

    def shape(self, words: str, config: ModelConfig) -> tuple[int, ...]:
        """The shape that a word of symbols means for this config."""
        dims = self.dims(config)
        return tuple(1 if word == "1" else dims[word] for word in words.split())

    def checkpoint(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(name, shape, dtype) of every tensor of a whole checkpoint, by the first prefix and layout of experts."""
        prefix = self.prefixes[0]

        def named(prefix: str, tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
            rows, *others = self.shape(tensor.padded or tensor.shape, config)
            shape = (rows * tensor.parts, *others)
            return prefix + tensor.published, shape[::-1] if tensor.transposed else shape, tensor.dtype

        yield named(prefix, self.embedding)
        for i in range(config.num_hidden_layers):
            for tensor in self.layer_tensors(config, i):
                if tensor.part == 0:
                    yield named(f"{prefix}layers.{i}.", tensor)
            for rule in self.expert_layouts[0] if config.has_experts(i) else ():
                yield from self._experts(rule, f"{prefix}layers.{i}.", config)
        for layer, shard in self.ngram_shards(config):
            yield named(f"{prefix}layers.{layer}.", shard)
        for tensor in _present(self.last, config):
            yield named(prefix, tensor)
        if not config.tie_word_embeddings:
            yield named(head_prefix(prefix), self.head)
        for tensor in _present(self.of_head, config):
            yield named(head_prefix(prefix), tensor)

    def _experts(self, rule: Experts, at: str, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """As `checkpoint`, of one rule in one layer."""
        rows, columns = self.shape(rule.shape, config)
        plain = (columns, rows) if rule.transposed else (rows, columns)
        stacked = "{expert}" not in rule.name
        stack = (config.num_experts,) if stacked else ()
        for expert in range(1 if stacked else config.num_experts):
            name = f"{at}{rule.name.format(expert=expert)}"
            yield f"{name}{rule.suffix}", (*stack, *plain), "BF16"
            if rule.bias:
                yield f"{name}{rule.bias}", (*stack, rows), "BF16"

    def resident(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """(`layers.N.` or nothing, tensor) of every resident tensor but the head, in the order of containers."""
        for i in range(config.num_hidden_layers):
            for tensor in self.layer_tensors(config, i):
                yield f"layers.{i}.", tensor
        for tensor in _present(self.last, config):
            yield "", tensor
        for tensor in _present(self.of_head, config):
            yield "", tensor

    def stored_shape(self, tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
        """Its shape in a container: a convolution's [channels, 1, kernel] is [channels, kernel]."""
        shape = self.shape(tensor.shape, config)
        return (shape[0], *(n for n in shape[1:-1] if n != 1), shape[-1]) if len(shape) > 2 else shape

    def layer_tensors(self, config: Any, layer: int) -> tuple[Tensor, ...]:
        """Resident tensors of a layer, in model order."""
        feed_forward = self.moe if config.has_experts(layer) else self.dense
        added = self.ngrams if layer in config.ngram_layers else ()
        tensors = added + self.before_mixer + self.mixers[config.layer_types[layer]] + self.after_mixer + feed_forward
        if self.routers:
            tensors += self.routers[config.mlp_layer_types[layer]]
        return tuple(t for t in _present(tensors, config) if t.where is None or t.where(config, layer))

    def skip_reason(self, name: str, prefix: str, config: ModelConfig) -> str | None:
        """What a tensor is that a text model does not need, or None."""
        for start, what in self.skipped.items():
            if name.startswith(start):
                return what
        for end, what in self.skipped_ends.items():
            if name.endswith(end):
                return what
        if name.endswith(ROTARY_FREQUENCIES):
            return "rotary frequencies, which config.json states too"
        tables = [f"{prefix}layers.{layer}.ple.ple_embedding." for layer in config.ngram_layers]
        if name in {f"{table}{what}" for table in tables for what in NGRAM_HASHES}:
            return "hashes of n-grams, which follow from config.json"
        layer = re.match(rf"{re.escape(prefix)}layers\.(\d{{1,9}})\.", name)
        if self.extra_layers and layer and int(layer[1]) >= config.num_hidden_layers:
            return self.extra_layers
        if self.other_experts and layer and _is_of_other_experts(name[layer.end() :], config.num_experts):
            return self.other_experts
        unread = {tensor.published for tensor in _present(self.unread, config)}
        if layer and name[layer.end() :] in unread and not config.has_experts(int(layer[1])):
            return "tensors of dense layers that no model reads"
        return None


def _is_of_other_experts(name: str, num_experts: int) -> bool:
    """Whether a layer's tensor is one of as many experts after the model's own, or their router."""
    expert = re.match(r"mlp\.experts\.(\d{1,9})\.", name)
    return name == "mlp.gate.weight_1" or (expert is not None and num_experts <= int(expert[1]) < 2 * num_experts)


def _present(tensors: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor.when is None or tensor.when(config))


def head_prefix(prefix: str) -> str:
    """What stands before lm_head: the head lies beside the model, as in language_model.model. and language_model."""
    return prefix.removesuffix("model.") if prefix.endswith(".model.") else ""
