"""Ops: all that a model may call, as a Protocol with shapes.

Shapes: T tokens of one step, H heads, d width of a head, D hidden_size, k experts per token. Arrays are float32 in
meaning and opaque in type: NumPy arrays here, lazy ones elsewhere; models only slice, reshape, add and multiply them.
A cache or state is changed by no one: an operation returns the new one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from formats.config import Activation, Rope
from runtime.backends.facts import (
    Array,
    Attention,
    Beside,
    Block,
    DeltaNet,
    Part,
    Rounding,
    Routed,
    Router,
    Routing,
    ScaledNorm,
    Shared,
    Stack,
    State,
    Turn,
    Wanted,
    Weight,
)
from runtime.session import Sequence as StepSequence


class Ops(Protocol):
    """One backend. The NumPy implementation (numpy_ops.py) is the definition of every operation."""

    name: str

    def weight(self, name: str) -> Weight:
        """The resident tensor of that name."""

    def values(self, name: str) -> tuple[float, ...]:
        """Those of a short resident vector."""

    def embed(self, token_ids: Sequence[int]) -> Array:
        """Rows of the token embedding: [T, D]."""

    def embed_ngrams(self, rows: Sequence[Sequence[int]]) -> Array:
        """Rows [T, n] of the embedding of n-grams, those of a token side by side: [T, n * columns]."""

    def linear(self, x: Array, weight: Weight, bias: Weight | None = None) -> Array:
        """x @ weight.T + bias: [T, columns], weight [rows, columns], bias [rows] -> [T, rows]."""

    def linears(self, x: Array, weights: Sequence[Weight], biases: Sequence[Weight] | None = None) -> list[Array]:
        """`linear` with each of the weights and biases: what shares its input is one call."""

    def feed_forward(
        self, x: Array, gate: Weight | None, up: Weight, down: Weight, activation: Activation | None = None
    ) -> Array:
        """down(activation(gate(x), up(x))): a dense layer, or an expert that every token shares. [T, D] -> [T, D].

        The activation is that of the model's experts if none is given; it takes up(x) alone where they have no gate.
        """

    def rms_norm(self, x: Array, weight: Weight, eps: float, offset: float = 0.0) -> Array:
        """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis; weight [last axis]."""

    def scaled_norm(self, x: Array, norm: ScaledNorm) -> Array:
        """s / sqrt(mean(s^2) + eps) of s = x * (offset + weight), over the last axis."""

    def add_norm(
        self, h: Array, y: Array, weight: Weight, eps: float, *, offset: float = 0.0, multiplier: float = 1.0
    ) -> tuple[Array, Array]:
        """What stands between the halves of a layer: s = h + y * multiplier, and rms_norm(s): [T, D] each."""

    def layer_norm(self, x: Array, weight: Weight, bias: Weight | None, eps: float) -> Array:
        """(x - mean) / sqrt(variance + eps) * weight + bias, if there is one, over the last axis."""

    def l2_norm(self, x: Array, eps: float, scale: float = 1.0) -> Array:
        """x / sqrt(sum(x^2) + eps) * scale over the last axis."""

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x)."""

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x))."""

    def softplus(self, x: Array, bias: Weight | None = None) -> Array:
        """log(1 + exp(x + bias)): x [T, C], bias [C]."""

    def gate(self, x: Array, gate: Array, kind: str) -> Array:
        """x * silu(gate), or x * sigmoid(gate): kind is SILU or SIGMOID of formats/config; both of one shape."""

    def clip(self, x: Array, limit: float) -> Array:
        """x, but no smaller than -limit and no larger than limit."""

    def decay(self, a: Array, dt_bias: Weight, a_log: Weight) -> Array:
        """Log of the DeltaNet's decay, -exp(a_log) * softplus(a + dt_bias): a [T, C], dt_bias [C] -> [T, C].

        a_log [H]: each for C / H channels that follow each other.
        """

    def bounded_decay(self, a: Array, dt_bias: Weight, a_log: Weight, lower_bound: float) -> Array:
        """As `decay`, but lower_bound * sigmoid(exp(a_log) * (a + dt_bias))."""

    def softmax(self, x: Array) -> Array:
        """Over the last axis, which is short."""

    def residual_gate(self, gate: Weight, temperature: float) -> tuple[Array, Array]:
        """What a stream and what is added to it are multiplied by: gate [D] -> [D] each.

        b = sigmoid(gate / temperature) is of what is added, sqrt(max((1 - b) * (1 + b), 0.001)) of the stream.
        Source: transformers' MuseSparkResidualGate.
        """

    def root_gate(self, x: Array, y: Array) -> Array:
        """[..., D] twice -> [..., 1]: sigmoid(sign(d) * sqrt(max(|d|, 1e-6))), d = x . y / sqrt(D).

        Source: transformers' Qwen4ExpTextPLELayer.
        """

    def scale(self, x: Array, weight: Weight) -> Array:
        """x * weight over the last axis; weight [1] or [last axis]."""

    def scale_streams(self, x: Array, weight: Weight) -> Array:
        """x [T, N, D] * weight [N, D]."""

    def scale_heads(self, x: Array, weight: Weight) -> Array:
        """x [T, H, d] times a number of each head, weight [H]."""

    def scale_by_position(self, x: Array, position: int, weight: Weight, bias: Weight) -> Array:
        """x [T, H, d] at position, position + 1, ..., times weight * log(position + 1) + bias; of each head, [H]."""

    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Join along an axis."""

    def rows(self, x: Array, wanted: Wanted) -> Array:
        """The rows of x [T, ...] that are wanted, one slice after the other."""

    def rope(self, x: Array, position: int, rope: Rope) -> Array:
        """Rotary embedding of x [T, H, d] at position, position + 1, ...: the first rope.dim values are turned.

        Pair j is (j, j + dim/2), or (2j, 2j + 1) if rope.interleaved; it turns by position * rope.inv_freq[j] and
        grows by rope.attention_factor. Values stay in their places.
        """

    def new_kv_cache(
        self,
        num_heads: int,
        head_dim: int,
        window: int | None = None,
        max_tokens: int | None = None,
        value_dim: int | None = None,
    ) -> State:
        """An empty cache of keys and values of the whole context, or of max_tokens if those are fewer.

        With a window it may forget what no later token sees. Values are as wide as keys, or value_dim.
        """

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: State,
        scale: float,
        *,
        window: int | None = None,
        sinks: Weight | None = None,
        turn: Turn | None = None,
        beside: Beside | None = None,
        selection: Array | None = None,
    ) -> tuple[Array, State]:
        """Causal softmax attention of q [T, Hq, d] over the cache and k [T, Hkv, d], v [T, Hkv, e].

        With a window a token sees itself and the window - 1 tokens before it. sinks [Hq]: a score per head that takes
        part in the softmax and brings no value. turn: q and k come as they were projected. beside: keys, each its own
        value, that share the softmax; for a cache of one key head. A selection of `block_tokens` leaves out all other
        keys. Returns ([T, Hq, e], new cache).
        """

    def new_latent_cache(self, kv_lora_rank: int, rope_dim: int) -> State:
        """An empty cache of latents and of the keys with position that all heads share."""

    def latent_attention(
        self,
        q: Array,
        q_rope: Array,
        latent: Array,
        k_rope: Array,
        kv_b: Sequence[Weight],
        cache: State,
        scale: float,
        selection: Array | None = None,
        sinks: Weight | None = None,
    ) -> tuple[Array, State]:
        """Causal multi-head latent attention, absorbed: neither keys nor values are ever made, only latents are kept.

        q [T, H, n] without position, q_rope [T, H, r] and k_rope [T, r] turned by `rope`, latent [T, L] normalised;
        kv_b is one matrix [H * (n + v), L] that holds per head W_k [n, L], then W_v [v, L], or two: that of all W_k
        turned, [H * L, n], and that of all W_v, [H * v, L]. For a head of token i, over j <= i:
        score_j = ((q W_k) . latent_j + q_rope . k_rope_j) * scale; output = W_v (sum_j softmax(score)_j latent_j).
        A selection of `select_tokens` leaves out all other j. sinks [H]: as those of `attention`.
        Returns ([T, H, v], new cache). How a sequence is cut into steps changes no sum.
        Source: DeepSeek-V2 (2405.04434), 2.1; transformers' DeepseekV3Attention expands keys and values instead.
        """

    def new_index_cache(self, head_dim: int, rate: int = 1) -> State:
        """An empty cache of an indexer's keys, one for each `rate` tokens."""

    def select_tokens(
        self, q: Array, k: Array, weights: Array, cache: State, top_k: int, seen: Sequence[int] | None = None
    ) -> tuple[Array, State]:
        """The top_k tokens j <= i of the highest sum over heads of weights * relu(q . k_j), of equals the first.

        q [T, H, d], k [T, d], weights [T, H]; or k [any, d] where `seen` tells of how many keys each query chooses.
        Returns (selection for `latent_attention` or `Beside`, new cache).
        Source: DeepSeek-V3.2; transformers' DeepseekV32Indexer.
        """

    def select_among(
        self,
        q: Array,
        weights: Array,
        cache: State,
        top_k: int,
        seen: Sequence[int],
        candidates: Array | None = None,
    ) -> Array:
        """As `select_tokens`, of keys that a cache holds; only among the candidates [T, keys], if any are given."""

    def select_candidates(
        self, q: Array, weights: Array, cache: State, top_k: int, seen: Sequence[int], block: int, blocks: int
    ) -> tuple[Array, Array]:
        """As `select_among`, and the keys of the best `blocks` blocks of each query, of equals the first: [T, keys].

        The last block that a query sees is one of them; of the others those with the highest sum of any key.
        Source: DeepSeek-V4.1; mlx-lm's deepseek_v41.
        """

    def select_blocks(
        self, q: Array, k: Array, cache: State, block: int, top_k: int, local: int
    ) -> tuple[Array, State]:
        """Which blocks of `block` tokens each head of q [T, H, d] chooses: the `local` last ones, the token's own among
        them, and of the others those with the highest q . k_j of a token j <= i, top_k in all, of equals the first.

        k [T, d]. Returns (chosen [H, T, whole blocks] for `block_tokens`, new cache).
        Source: MiniMax-M3; transformers' MiniMaxM3VLIndexer.
        """

    def block_tokens(self, chosen: Array, position: int, block: int) -> Array:
        """What tokens from `position` on see of blocks of `block` tokens: a selection for `attention`.

        That is the tokens of the blocks chosen [T, any], and all after the last block that is whole.
        """

    def new_entries(self, width: int, rate: int) -> State:
        """An empty cache of keys that are their own values, one for each `rate` tokens."""

    def add_entries(self, entries: State, keys: Array) -> State:
        """With the next keys [any, width]; of an indexer's cache, too."""

    def new_open_window(self, rate: int, width: int, overlap: bool) -> State:
        """What `compress` remembers, before the first token; width is that of its projections."""

    def compress(self, kv: Array, gate: Array, position_bias: Weight | None, window: State) -> tuple[Array, State]:
        """One entry for each window of `rate` tokens that these complete: ([any, d], what remains open).

        kv, gate [T, width], position_bias [rate, width], or none where windows do not overlap. An entry is, channel by
        channel, the mean of the kv of its tokens, weighed by the softmax of their gate + position_bias. Where windows
        overlap width is 2 d, and an entry takes the first half of each token of the window before and the second half
        of each of its own.
        Source: DeepSeek-V4; transformers' DeepseekV4CSACompressor and DeepseekV4HCACompressor.
        """

    def rounded(self, x: Array, rounding: Rounding) -> Array:
        """The nearest values that blocks of the last axis have in few bits; a scale brings the largest into range."""

    def stream_gates(self, mixes: Array, scale: Weight, base: Weight, eps: float) -> Array:
        """sigmoid(mixes * scale + base) + eps: mixes [T, N] and base [N], scale [1], or [n] each of N / n in turn."""

    def stream_weights(
        self, mixes: Array, scale: Weight, base: Weight, streams: int, iterations: int, eps: float
    ) -> tuple[Array, Array, Array]:
        """What weighs N residual streams before and after a layer: pre [T, N], post [T, N], comb [T, N, N].

        mixes [T, (2 + N) N] and base alike hold pre, post and comb; scale [3] is of each. pre is
        sigmoid(.) + eps, post 2 sigmoid(.), comb the softmax of its rows + eps, then made doubly stochastic:
        columns, then iterations - 1 times rows and columns are divided by their sum + eps.
        Source: manifold-constrained hyper-connections (Xie et al.); transformers' DeepseekV4HyperConnection.
        """

    def collapse_streams(self, h: Array, pre: Array) -> Array:
        """Sum over streams of h [T, N, D] weighed by pre [T, N]: [T, D]."""

    def expand_streams(self, h: Array, y: Array, post: Array, comb: Array | None) -> Array:
        """Stream j becomes post_j * y + sum over i of comb[i, j] * h_i: h [T, N, D], y [T, D] -> [T, N, D].

        Without comb no stream is mixed into another: post_j * y + h_j.
        """

    def grouped_linear(self, x: Array, weight: Weight) -> Array:
        """Each group's rows of weight [G * r, columns] times its own x [T, G, columns]: [T, G * r]."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Zeros of that shape, such as a convolution's state before the first token."""

    def new_delta_state(self, num_heads: int, key_dim: int, value_dim: int) -> State:
        """An empty state of the gated delta rule."""

    def causal_conv1d(
        self, x: Array, weight: Weight, state: Array, dilation: int = 1, bias: Weight | None = None
    ) -> tuple[Array, Array]:
        """Depthwise convolution of x [T, C] with weight [C, K], every dilation-th input, + bias: ([T, C], new state).

        The state is the last (K-1) * dilation inputs, [.., C].
        """

    def gated_delta_rule(
        self, q: Array, k: Array, v: Array, log_decay: Array, beta: Array | None, state: State
    ) -> tuple[Array, State]:
        """Recurrence over T: q, k [T, Hk, dk], v [T, H, dv], beta [T, H], state S [H, dk, dv].

        log_decay [T, H] is of heads, or [T, H, dk] of key channels (Kimi Delta Attention).
        Value head h reads key head h // (H / Hk). Per token: S *= exp(log_decay); S += outer(k, beta * (v - S^T k));
        o = S^T q. Returns (o [T, H, dv], S). Without beta, as in Mamba2, S += outer(k, v), and log_decay is of heads.
        Source: Yang et al., Gated Delta Networks (2412.06464); transformers' torch_recurrent_gated_delta_rule.
        """

    def route(
        self,
        logits: Array,
        routing: Routing,
        correction_bias: Weight | None = None,
        expert_scale: Weight | None = None,
    ) -> tuple[Array, Array]:
        """logits [T, num_experts] -> ids [T, k] and routing_weights [T, k], best first; of equals the lower id.

        correction_bias and expert_scale [num_experts]: the latter multiplies the weight of an expert that was chosen.
        """

    def route_by_token(
        self, logits: Array, token_ids: Sequence[int], table: Weight, routing: Routing
    ) -> tuple[Array, Array]:
        """As `route`, but the experts of a token are its row of table [vocab_size, k], in that order."""

    # ---- made of the others (composed.py)

    def self_attention(self, x: Array, own: Attention, parts: Sequence[Part]) -> tuple[Array, list[State]]:
        """Attention with its projections: x [T, D] -> [T, D], and the caches of the parts, which are all of x."""

    def delta_net(self, x: Array, own: DeltaNet, parts: Sequence[Part]) -> tuple[Array, list[State]]:
        """A gated DeltaNet with its projections: as `self_attention`."""

    def route_input(self, x: Array, router: Router) -> Routed:
        """What a router, and whatever else has its input, makes of x [T, D]."""

    def layers(
        self, h: Array, y: Array, stack: Stack, sequences: Sequence[StepSequence], wanted: Wanted = None
    ) -> tuple[Array, Array]:
        """Layers one after another, and reads of what they want: of the stream h and what is to be added to it [T, D],
        the same after them, of the rows that are wanted. Replaces the states.

        What comes back is valid until the next layer.
        All of it is one call where a backend can: what stands between kernels is cold (docs/LEARNED.md 72, 80).
        """

    def mix_and_route(
        self, h: Array, y: Array, own: Block, parts: Sequence[Part], wanted: Wanted = None
    ) -> tuple[Array, Routed, list[State]]:
        """Adds y to the stream h, then its mixer, each behind a norm, and routes: (stream, input of experts, states).

        Stream and input are of the rows that are wanted, the states of all tokens.
        """

    def routed_experts(self, layer: int, routed: Routed, shared: Shared | None = None) -> Array:
        """`experts`, and the shared one: [T, D]. It is weighed by the sigmoid of routed.further, if there is any.

        What comes back is valid until the next layer.
        """

    def fetch(self, layer: int, expert_ids: Array) -> None:
        """Tell which experts the next call of `experts` wants: they are read while something else is computed."""

    def look_ahead(self, layer: int, route: Callable[[], Array]) -> None:
        """Tell how to guess which experts a later layer will want: route() gives ids [T, k].

        Called between the layer's own `fetch`, if there is one, and `experts`; a layer without experts is no error.
        Several tokens are not guessed for the last layer, where few of them may be wanted.
        """

    def fetch_routed(self, layer: int, routed: Routed, following: Router | None) -> None:
        """`fetch` what was chosen, and `look_ahead` by the router of the layer after it, given the same input."""

    def experts(
        self, layer: int, x: Array, expert_ids: Array, routing_weights: Array, norm: ScaledNorm | None = None
    ) -> Array:
        """Sum over k, in that order, of routing_weights * expert(x): x [T, D] -> [T, D]. Reads the experts.

        expert(x) = down(activation(gate(x), up(x))), the activation that of the model's config, which may take no gate,
        and then `scaled_norm`, if a norm is given;
        or x itself, for ids that are no expert's of the layer but lie behind them (LongCat-Flash).
        """
