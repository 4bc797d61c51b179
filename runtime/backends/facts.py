"""What operations are told: arrays, states and weights, and the facts of a layer that models hand over (base.py)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from formats.config import SOFTMAX, Activation, Rope

Array: TypeAlias = Any  # of the backend: supports + - * with broadcasting, slicing, .shape and .reshape
State: TypeAlias = Any  # of the backend: a KV cache, or an Array
Weight: TypeAlias = Any  # of the backend: a resident tensor in its encoding
Wanted: TypeAlias = Sequence[slice] | None  # rows of which results are asked for; None: all


class Routing(NamedTuple):
    """How a router chooses, in the names of config.json (source: transformers' DeepseekV3TopkRouter).

    Scores are the softmax, the sigmoid or the root of the softplus of the logits, and those of the chosen ones are the
    weights. What is compared is score + correction bias, or with sigmoid_of_chosen (Llama 4) logit + bias; with groups
    only experts of the topk_group best groups, by the sum of their two best; of a softmax (DeepSeek-V2) by the best.
    The softmax of the chosen logits alone (gpt-oss, Granite) is the normalised softmax of all.
    sparsemixer is `choose_by_sparsemixer` of numpy_route.py, which alone has a jitter.
    """

    top_k: int
    scoring_func: str = SOFTMAX  # or sigmoid, sigmoid_of_chosen, sqrtsoftplus, sparsemixer
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    jitter: float = 0.0


class Turn(NamedTuple):
    """What queries and keys go through before they meet: `rms_norm` by heads, where there are weights, then `rope`."""

    rope: Rope
    position: int
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    eps: float = 0.0
    offset: float = 0.0


class ScaledNorm(NamedTuple):
    """`scaled_norm`: what comes in is weighed, and what it gives is not."""

    weight: Weight
    eps: float
    offset: float = 0.0


class Rounding(NamedTuple):
    """To what values are rounded that were trained so: floats of 4 or 8 bits, blocks of them with a common scale."""

    bits: int  # 4: E2M1, 8: E4M3
    block: int
    e4m3_scales: bool = False  # of FP4; scales are powers of two otherwise


class Beside(NamedTuple):
    """Entries that queries see beside the tokens of a cache: of each query the first `seen`, of them those selected."""

    entries: State
    seen: Sequence[int]  # [T]
    selection: Array | None = None  # of `select_tokens`; None for all


class Attention(NamedTuple):
    """What `self_attention` of one layer has, where nothing else is done to what is projected."""

    projections: tuple[Weight, ...]  # to queries, keys and values
    biases: tuple[Weight, ...] | None
    output: Weight
    output_bias: Weight | None
    heads: int
    key_heads: int
    scale: float  # of scores
    rope: Rope | None  # None where positions are not known
    q_norm: Weight | None = None  # by heads
    k_norm: Weight | None = None
    whole_norms: tuple[Weight, Weight] | None = None  # of all queries together, and of all keys
    eps: float = 0.0
    offset: float = 0.0
    window: int | None = None
    sinks: Weight | None = None
    gated: bool = False  # the first projection gives per head a query, then a gate


class DeltaNet(NamedTuple):
    """What a gated DeltaNet of one layer has."""

    projections: tuple[Weight, ...]  # to q | k | v, z, b and a
    conv: Weight
    dt_bias: Weight
    a_log: Weight
    norm: Weight
    output: Weight
    key_heads: int
    heads: int  # of values
    key_dim: int  # of one head
    value_dim: int
    eps: float
    qk_eps: float
    gate: str  # SILU or SIGMOID of formats/config: what z does to the output
    grouped_qkvz: bool = False  # one projection to q | k | v | z of each key head (Qwen3-Next)
    grouped_ba: bool = False  # and one to its b | a
    tiled: bool = False  # value head h has key head h % key_heads, as GGUF files order them; else those together share


class Part(NamedTuple):
    """One sequence in a step."""

    rows: slice  # among the step's tokens
    position: int  # of its first token
    state: Any  # a cache of keys and values, or what a DeltaNet remembers: that of its convolution, and recurrent


class Shared(NamedTuple):
    """An expert that every token shares."""

    gate: Weight
    up: Weight
    down: Weight
    activation: Activation | None = None  # where it is not that of the model's experts


class Router(NamedTuple):
    """How a layer chooses its experts."""

    matrices: tuple[Weight, ...]  # the router's, and whatever else has its input
    biases: tuple[Weight, ...] | None
    routing: Routing
    correction: Weight | None = None


class Block(NamedTuple):
    """A layer up to the choice of its experts."""

    input_norm: Weight
    mixer: Attention | DeltaNet
    post_norm: Weight
    router: Router
    eps: float
    offset: float = 0.0  # of norms
    multiplier: float = 1.0  # of what is added to the stream


class RoutedLayer(NamedTuple):
    """A layer with experts."""

    block: Block
    shared: Shared | None
    following: Router | None  # of the layer after it, which guesses are made by


class Stack(NamedTuple):
    """Layers that follow each other."""

    first: int
    layers: tuple[RoutedLayer, ...]


class Routed(NamedTuple):
    """What experts are asked for."""

    x: Array  # [T, D]
    expert_ids: Array  # [T, k]
    routing_weights: Array  # [T, k]
    further: Sequence[Array] = ()  # what the router's further matrices give
