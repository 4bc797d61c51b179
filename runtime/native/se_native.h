/* The native kernels of streaming-experts: a plain C ABI, loaded with ctypes (formats/native.py and
 * runtime/backends/abi.py mirror it).
 *
 * Shapes: T tokens, D hidden_size, F intermediate size, k experts per token. All arrays are C-contiguous float32
 * unless said otherwise; sizes and offsets are int64_t. Functions return SE_OK or an error code and never print.
 *
 * What every result promises: it is the same to the bit for every number of threads, every number of tokens that
 * share a call, and every instruction set (kernels.h tells how).
 */
#ifndef SE_NATIVE_H
#define SE_NATIVE_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SE_API __attribute__((visibility("default")))
#else
#define SE_API
#endif

#define SE_ABI_VERSION 11

enum se_status {
    SE_OK = 0,
    SE_NO_MEMORY = 1,   /* scratch memory could not be had */
    SE_UNSUPPORTED = 2, /* an encoding, a shape or a parameter that no kernel implements */
    SE_BUSY = 3,        /* another thread is inside a call with the same context */
    SE_NOT_FINITE = 4,  /* a weight to encode is infinite or no number */
    SE_TOO_LARGE = 5,   /* a scale or bias is too large for its dtype */
    SE_READ_FAILED = 6, /* a slot holds no record: its state tells why (reader.h) */
    SE_STOPPED = 7,     /* se_reader_stop ended it */
    SE_MISSED = 8,      /* an expert has no slot (SE_RUN_FIND) */
};

/* How many 8-bit digits the integers have that stand for the activations of a group, where they meet quantized weights.
 * Errors of a product are for Gaussian inputs. Plain weights (bf16, f16, f32) are always exact. */
enum se_precision {
    SE_FAST = 1,  /* 9e-3 */
    SE_CLOSE = 2, /* 4e-5 */
    SE_EXACT = 3, /* 21 to 24 bits of them: 2e-6 */
};

enum se_dtype { SE_BF16 = 0, SE_F16 = 1, SE_F32 = 2 };

/* formats/encodings, by id; FORMAT.md says what each means. Codes are u32 streams, but for FP8. */
enum se_encoding {
    SE_PLAIN = 0,          /* bf16, f16, f32: `dtype` values */
    SE_AFFINE = 1,         /* codes of `bits`, scales and biases of `dtype` */
    SE_SYMMETRIC = 2,      /* codes of `bits`, scales of `dtype` */
    SE_ZERO_POINT = 3,     /* codes of `bits`, scales of `dtype`; biases: zeros, u8 */
    SE_MXFP4 = 4,          /* E2M1 codes, E8M0 scales */
    SE_NVFP4_MULTIPLY = 5, /* E2M1 codes, E4M3 scales; biases: the global scale of each row, f32, which multiplies */
    SE_NVFP4_DIVIDE = 6,   /* or divides */
    SE_FP8 = 7,            /* E4M3 values, scales of `dtype` */
    SE_Q4_K = 8,           /* codes of `bits`, 4 or 5, of Q4_K or Q5_K, scales; biases: d, and dmin on the next multiple of 64 behind it */
    SE_Q6_K = 9,           /* codes, scales; biases: d */
    SE_Q2_K = 10,          /* as Q4_K, scale and min of a group in one byte of scales */
    SE_Q3_K = 11,          /* and all below, but for the one that says else: as Q6_K */
    SE_IQ4_NL = 12,        /* codes, scales of `dtype` */
    SE_IQ4_XS = 13,
    SE_IQ3_S = 14,
    SE_IQ3_XXS = 15,
    SE_IQ2_XXS = 16,
    SE_IQ2_XS = 17,
    SE_IQ1_S = 18,
    SE_IQ1_M = 19,
};

/* A matrix [rows, columns] inside a record or tensor: where its arrays lie, in bytes from the start of it. Scales follow
 * codes, so that a kernel may read a few bytes beyond the last code. */
typedef struct {
    int64_t rows;
    int64_t columns; /* the input axis */
    int64_t weight_offset;      /* plain values, or packed codes; on a multiple of 4 */
    int64_t scales_offset;
    int64_t biases_offset;      /* or what enum se_encoding names */
    int64_t linear_bias_offset; /* added to the product; -1 for none */
    int32_t encoding;           /* enum se_encoding */
    int32_t dtype;              /* enum se_dtype */
    int32_t bits;               /* affine, symmetric, zero_point */
    int32_t group_size;         /* affine, symmetric, zero_point, fp8: columns of a scale */
    int32_t linear_bias_dtype;  /* enum se_dtype */
    int32_t reserved;           /* zero */
} se_matrix;
static_assert(sizeof(se_matrix) == 72, "mirrored in runtime/backends/abi.py");
static_assert(offsetof(se_matrix, encoding) == 48, "mirrored in runtime/backends/abi.py");

/* What joins gate and up: h = activation(gate, up), element by element. */
enum se_activation_kind {
    SE_SILU = 0,           /* silu(gate) * up */
    SE_SWIGLU_CLAMPED = 1, /* gpt-oss: g = min(gate, limit), u = clip(up, -limit, limit); g * sigmoid(alpha g) * (u + 1) */
    SE_GELU_TANH = 2,      /* gelu(gate) by its tanh approximation, * up */
    SE_SILU_CLAMPED = 3,   /* DeepSeek-V4: g = min(gate, limit), u = clip(up, -limit, limit); silu(g) * u */
    SE_SITU = 4,           /* Kimi K3: alpha tanh(gate / alpha) sigmoid(gate) * limit tanh(up / limit) */
    SE_RELU2 = 5,          /* Nemotron: max(up, 0)^2, without a gate */
    SE_CLAMPED_SILU = 6,   /* Step-3.5: min(silu(gate), limit) * clip(up, -limit, limit) */
};

typedef struct {
    int32_t kind; /* enum se_activation_kind */
    float alpha;
    float limit;
    int32_t scale_input; /* routing weights multiply the experts' input, not their output (Llama 4) */
} se_activation;
static_assert(sizeof(se_activation) == 16, "mirrored in runtime/backends/abi.py");

/* One expert of a call, and the (token, place) pairs that chose it; pair = token * k + place. */
typedef struct {
    const uint8_t *record;
    const int64_t *pairs;
    int64_t num_pairs;
} se_expert;
static_assert(sizeof(se_expert) == 24, "mirrored in runtime/backends/abi.py");

/* The layout that all experts of a layer share. */
typedef struct {
    se_matrix gate; /* [F, D]; all zero with an activation that takes none */
    se_matrix up;   /* [F, D] */
    se_matrix down; /* [D, F] */
    se_activation activation;
} se_expert_layout;
static_assert(sizeof(se_expert_layout) == 3 * 72 + 16, "mirrored in runtime/backends/abi.py");

/* What an expert gives goes through this before it is weighed (Muse Spark): s = down(h) * weight, then
 * s / sqrt(mean of squares of s + eps). */
typedef struct {
    const float *weight; /* [D] */
    float eps;
    int32_t reserved; /* zero */
} se_expert_norm;
static_assert(sizeof(se_expert_norm) == 16, "mirrored in runtime/backends/abi.py");

/* ---- context: an instruction set, a pool of threads, scratch memory. One call at a time. */

typedef struct se_context se_context;

SE_API int32_t se_abi_version(void);

/* Names of the levels that this machine can run, best first, separated by spaces: "avx512vbmi avx512vnni avx512
 * avx2 portable". */
SE_API const char *se_levels(void);

/* level: one of se_levels, or NULL for the best. threads counts the caller. spin_us: how long an idle thread spins
 * before it sleeps. NULL when the level is not among se_levels, threads < 1, or there is no memory. */
SE_API se_context *se_open(const char *level, int64_t threads, int64_t spin_us);
SE_API void se_close(se_context *context);
SE_API const char *se_level(const se_context *context);
SE_API int64_t se_scratch_bytes(const se_context *context);

/* Nanoseconds spent inside calls so far, whatever they did. */
SE_API int64_t se_kernel_ns(const se_context *context);

/* Wakes all threads and waits for them: the price of a call. */
SE_API int32_t se_dispatch(se_context *context);

/* ---- products */

/* y = x [T, columns] . matrix^T + linear bias for each of count matrices (8 at most) of the same columns, one [T, rows]
 * after another. base: first byte of the record or tensor that they all lie in. */
SE_API int32_t se_linear(se_context *context, int32_t precision, const se_matrix *matrices, int64_t count,
                         const uint8_t *base, const float *x, int64_t tokens, float *y);

/* outputs [T * k, D]: row `pair` becomes expert(x[pair / k]) for every pair of the experts given; other rows stay.
 * weights [T, k]: routing weights, read here only where they scale the input. norm or NULL: of every such row. */
SE_API int32_t se_experts(se_context *context, int32_t precision, const se_expert_layout *layout,
                          const se_expert *experts, int64_t num_experts, const float *x, const float *weights,
                          int64_t tokens, int64_t k, const se_expert_norm *norm, float *outputs);

/* y [T, D] = sum over k, in that order, of weights[t, i] * outputs[t * k + i]. weights NULL: all one. */
SE_API int32_t se_weighted_sum(se_context *context, const float *outputs, const float *weights, int64_t tokens,
                               int64_t k, int64_t columns, float *y);

/* ---- encoding (formats/native.py); no context: any number of threads at once */

/* Names of what compiled loops this machine can run: 0 the best, and so on; NULL behind the last. */
SE_API const char *se_encode_level(int32_t number);

/* values [groups, group_size] of dtype (bf16, f16, f32) become packed codes of 4 or 8 bits [groups, group_size],
 * scales [groups] and biases [groups] of scale_dtype, to the bit as formats/encodings/affine.py has it.
 * level: one of se_encode_level, or NULL for the best. All arrays begin on a multiple of their elements' size.
 * SE_NOT_FINITE or SE_TOO_LARGE leaves the output unfinished. */
SE_API int32_t se_encode_affine(const char *level, int32_t bits, int64_t group_size, int32_t dtype,
                                int32_t scale_dtype, const uint8_t *values, int64_t groups, uint8_t *codes,
                                uint8_t *scales, uint8_t *biases);

/* ---- exact transcodes (formats/transcode.py); no context either */

enum se_block_type { /* of ggml */
    SE_BLOCKS_Q4_0 = 0,
    SE_BLOCKS_Q4_1 = 1,
    SE_BLOCKS_Q5_0 = 2,
    SE_BLOCKS_Q5_1 = 3,
    SE_BLOCKS_Q8_0 = 4,
    SE_BLOCKS_Q4_K = 5,
    SE_BLOCKS_Q5_K = 6,
    SE_BLOCKS_Q6_K = 7,
    SE_BLOCKS_MXFP4 = 8,
    SE_BLOCKS_Q2_K = 9,
    SE_BLOCKS_Q3_K = 10,
    SE_BLOCKS_IQ4_NL = 11,
    SE_BLOCKS_IQ4_XS = 12,
    SE_BLOCKS_IQ3_S = 13,
    SE_BLOCKS_IQ3_XXS = 14,
    SE_BLOCKS_IQ2_S = 15,
    SE_BLOCKS_IQ2_XS = 16,
    SE_BLOCKS_IQ2_XXS = 17,
    SE_BLOCKS_IQ1_S = 18,
    SE_BLOCKS_IQ1_M = 19,
};

/* Blocks that follow each other become the arrays of the container's encoding that means the same, in its order
 * (codes, scales...), each of them whole; grid: of types that have one, a byte for each of its weights. SE_NOT_FINITE
 * where a scale is infinite, no number, or an E8M0 above 0xfc. */
SE_API int32_t se_transcode_blocks(int32_t type, int64_t blocks, const uint8_t *from, const uint8_t *grid,
                                   uint8_t *const arrays[4]);

/* AWQ's words, each of eight rows: word w of a column at from[column * stride + w] -> codes [8 * words, columns / 8]. */
SE_API int32_t se_transcode_awq(const uint32_t *from, int64_t stride, int64_t words, int64_t columns, uint32_t *codes);

/* ---- between the products: row by row (rows.c, route.c)
 *
 * What a row of the result holds depends on its own row of the input alone. */

/* y [rows, columns] = x / sqrt(mean of squares + eps) * weight [columns], over columns. */
SE_API int32_t se_rms_norm(se_context *context, const float *x, int64_t rows, int64_t columns, const float *weight,
                           float eps, float *y);

/* y [rows, columns] = x / sqrt(sum of squares + eps) * scale. */
SE_API int32_t se_l2_norm(se_context *context, const float *x, int64_t rows, int64_t columns, float eps, float scale,
                          float *y);

enum se_map_kind { SE_MAP_SIGMOID = 0, SE_MAP_SILU = 1 };

/* y [n] = map(x [n]). */
SE_API int32_t se_map(se_context *context, int32_t map, const float *x, int64_t n, float *y);

/* y [n] = x [n] * map(gate [n]). */
SE_API int32_t se_gate(se_context *context, int32_t map, const float *x, const float *gate, int64_t n, float *y);

/* y [T, channels] = -exp(a_log [channels]) * softplus(a [T, channels] + dt_bias [channels]). */
SE_API int32_t se_decay(se_context *context, const float *a, const float *dt_bias, const float *a_log, int64_t tokens,
                        int64_t channels, float *y);

/* y [T, heads, d]: x with the pairs (i, i + half), or interleaved (2i, 2i + 1), turned by the angles of their token:
 * cosine, sine [T, half]. */
/* What a layer does between its halves: sum = h + multiplier * y, x = sum / sqrt(mean of squares + eps) * weight; all
 * but weight [columns] are [rows, columns]. */
SE_API int32_t se_add_norm(se_context *context, const float *h, const float *y, float multiplier, int64_t rows,
                           int64_t columns, const float *weight, float eps, float *sum, float *x);

SE_API int32_t se_rope(se_context *context, const float *x, int64_t tokens, int64_t heads, int64_t d, int64_t half,
                       int32_t interleaved, const float *cosine, const float *sine, float *y);

/* How a router chooses: runtime/backends/base.py, Routing. */
enum se_scoring {
    SE_SCORE_SOFTMAX = 0,
    SE_SCORE_SIGMOID = 1,
    SE_SCORE_CHOSEN_SIGMOID = 2,
    SE_SCORE_SQRT_SOFTPLUS = 3,
};

typedef struct {
    int64_t num_experts;
    int64_t top_k;
    int64_t n_group; /* 1: no groups */
    int64_t topk_group;
    int32_t scoring; /* enum se_scoring */
    int32_t normalize;
    float scaling_factor;
    int32_t chosen; /* 1: ids say which experts, and only weights are made */
} se_routing;
static_assert(sizeof(se_routing) == 48, "mirrored in runtime/backends/abi.py");

/* ids and weights [T, top_k] of logits [T, num_experts], best first, of equals the lower id. correction_bias
 * [num_experts] or NULL. */
SE_API int32_t se_route(se_context *context, const se_routing *routing, const float *logits,
                        const float *correction_bias, int64_t tokens, int64_t *ids, float *weights);

/* ---- several residual streams, and entries that stand for tokens (streams.c)
 *
 * What they compute: runtime/backends/base.py, stream_weights, collapse_streams, expand_streams, compress. */

/* mixes [T, (2 + streams) streams] with scale [3] and base [(2 + streams) streams] become pre and post [T, streams] and
 * comb [T, streams, streams]. */
SE_API int32_t se_stream_weights(se_context *context, const float *mixes, const float *scale, const float *base,
                                 int64_t tokens, int64_t streams, int64_t iterations, float eps, float *pre, float *post,
                                 float *comb);

/* y [T, columns] = sum over streams of pre [T, streams] * h [T, streams, columns]. */
SE_API int32_t se_collapse_streams(se_context *context, const float *h, const float *pre, int64_t tokens,
                                   int64_t streams, int64_t columns, float *y);

/* next [T, streams, columns] = post * y [T, columns] + sum over i of comb[t, i, j] * h[t, i]. */
SE_API int32_t se_expand_streams(se_context *context, const float *h, const float *y, const float *post,
                                 const float *comb, int64_t tokens, int64_t streams, int64_t columns, float *next);

/* y [windows, width]: of each channel the mean of values [windows, slots, width], weighed by the softmax of its gates. */
SE_API int32_t se_pool(se_context *context, const float *values, const float *gates, int64_t windows, int64_t slots,
                       int64_t width, float *y);

/* ---- attention (attention.c) */

/* Keys [heads, capacity / 16, width, 16] and values [heads, capacity, value_width rounded up to 16]; 16 keys lie side by
 * side. capacity is a multiple of 16. values NULL: the values are the first value_width of the keys, a multiple of 16
 * (latent attention). */
typedef struct {
    float *keys;
    float *values;
    int64_t capacity;
    int64_t heads;
    int64_t width;
    int64_t value_width;
} se_kv_cache;
static_assert(sizeof(se_kv_cache) == 48, "mirrored in runtime/backends/abi.py");

/* What queries and keys go through first, head by head: y = x / sqrt(mean of squares + eps) * norm [width] where there is
 * one, then a rotation as in se_rope, cosine and sine [T, half]. */
typedef struct {
    const float *q_norm, *k_norm; /* or NULL */
    const float *cosine, *sine;
    int64_t half;
    int32_t interleaved;
    float eps;
} se_turn;
static_assert(sizeof(se_turn) == 48, "mirrored in runtime/backends/abi.py");

/* Keys, each its own value, that queries see beside those of a cache of one head: [capacity / 16, width, 16], `count` of
 * them, width a multiple of 16. selection [T, count]: 1 for those that a token sees. gathered: 0, or 1 where a token's keys
 * are first laid side by side, `most` at most, which pays where they are few; it changes the order of sums. */
typedef struct {
    const float *keys;
    int64_t count;
    const uint8_t *selection;
    int64_t gathered;
    int64_t most;
} se_beside;
static_assert(sizeof(se_beside) == 40, "mirrored in runtime/backends/abi.py");

/* Causal softmax attention of q [T, heads, width], after `length` tokens of the cache; k [T, cache heads, width] and
 * v [T, cache heads, value_width], if any, are written into it. A query sees `window` positions at most, its own the last, or all
 * if window is 0. sinks [heads] or NULL: logits that take part in the softmax without a value. selection
 * [T, length + T] or NULL: 1 for the keys that a token sees at all. turn or NULL: q and k as they were projected.
 * beside or NULL: what shares the softmax.
 * y [T, heads, value_width].
 * The result of a token is the same whatever chunk it came in. */
SE_API int32_t se_attention(se_context *context, const se_kv_cache *cache, int64_t length, const float *q,
                            const float *k, const float *v, int64_t tokens, int64_t heads, float scale, int64_t window,
                            const float *sinks, const uint8_t *selection, const se_turn *turn,
                            const se_beside *beside, float *y);

/* ---- a matrix in heads (heads.c) */

/* `count` heads of `stride` rows each, of which those from `first` on are meant, `rows` of them. */
typedef struct {
    int64_t count;
    int64_t stride;
    int64_t first;
    int64_t rows;
} se_heads;
static_assert(sizeof(se_heads) == 32, "mirrored in runtime/backends/abi.py");

/* Each head's rows W times its own input: y [T, count, rows] = W x, x [T, count, columns]; or transposed,
 * y [T, count, columns] = x W, x [T, count, rows]. In float32, the weights decoded. */
SE_API int32_t se_heads_product(se_context *context, const se_matrix *matrix, const uint8_t *base, const se_heads *heads,
                                int32_t transposed, const float *x, int64_t tokens, float *y);

/* ---- gated DeltaNet (delta.c) */

/* Depthwise convolution of x [T, channels] with taps [kernel, channels] after state [kernel - 1, channels]:
 * y [T, channels], and the last kernel - 1 inputs to new_state. */
SE_API int32_t se_causal_conv1d(se_context *context, const float *x, const float *taps, const float *state,
                                int64_t tokens, int64_t channels, int64_t kernel, float *y, float *new_state);

/* The state of one layer: [heads, ceil(value_width / 16), key_width, 16], panels of 16 columns. key_width is even. */
typedef struct {
    int64_t heads;
    int64_t key_heads; /* value head h reads key head h / (heads / key_heads) */
    int64_t key_width;
    int64_t value_width;
    int64_t decay_by_channel; /* 1: each key channel has a decay of its own; 0: each head has one */
} se_delta_shape;
static_assert(sizeof(se_delta_shape) == 40, "mirrored in runtime/backends/abi.py");

/* Per token: S *= exp(log_decay); S += outer(k, beta * (v - S^T k)); y = S^T q. q, k [T, key_heads, key_width],
 * v, y [T, heads, value_width], beta [T, heads], log_decay [T, heads] or [T, heads, key_width]. beta NULL: S += outer(k, v),
 * as Mamba2 has it, with log_decay [T, heads]. Reads state and writes new_state, which may be the same. */
SE_API int32_t se_delta_rule(se_context *context, const se_delta_shape *shape, const float *q, const float *k,
                             const float *v, const float *log_decay, const float *beta, int64_t tokens,
                             const float *state, float *new_state, float *y);

/* ---- several calls in one (run.c) */

enum se_function {
    SE_RUN_LINEAR = 0,
    SE_RUN_EXPERTS = 1,
    SE_RUN_RMS_NORM = 2,
    SE_RUN_ADD_NORM = 3,
    SE_RUN_L2_NORM = 4,
    SE_RUN_MAP = 5,
    SE_RUN_GATE = 6,
    SE_RUN_DECAY = 7,
    SE_RUN_ROUTE = 8,
    SE_RUN_ATTENTION = 9,
    SE_RUN_CAUSAL_CONV1D = 10,
    SE_RUN_DELTA_RULE = 11,
    SE_RUN_EXPERTS_STREAMED = 12, /* reader.h */
    SE_RUN_COPY = 13,       /* rows of `columns` values, `stride` apart, side by side: x, rows, columns, stride, y */
    SE_RUN_ADD_SCALED = 14, /* y [n] += weight [1] * x [n]: x, weight, n, y */
    SE_RUN_FIND = 15, /* arriving[i].slot = slots[ids[i]]: slots [E], E, ids [k], k, arriving [k]; SE_MISSED below zero */
};

/* A call of the function of that name: what it takes after the context, in its order. Integers and addresses as they
 * are, of a float the bits. */
typedef struct {
    int64_t function; /* enum se_function */
    int64_t arguments[15];
} se_call;
static_assert(sizeof(se_call) == 128, "mirrored in runtime/backends/abi.py");

/* One call after another, until one of them is not SE_OK; done: how many were. What the calls of a layer are stays the
 * same from token to token: they are written down once, and between them nothing but C runs (docs/LEARNED.md 72, 80). */
SE_API int32_t se_run(se_context *context, const se_call *calls, int64_t count, int64_t *done);

/* ---- ceilings */

/* Ways to read memory that se_read knows: the best of them is what a kernel is measured against. */
enum se_read_loop {
    SE_READ_PLAIN = 0,    /* widest vectors, the hardware's prefetchers */
    SE_READ_NEAR = 1,     /* with a prefetch 1 KiB ahead */
    SE_READ_FAR = 2,      /* with a prefetch 4 KiB ahead */
    SE_READ_STREAMS = 3,  /* two distant streams, as the kernels read, with the far prefetch */
};

/* Reads num_pieces pieces of `bytes` each, in that order, shared among the threads; returns SE_OK. */
SE_API int32_t se_read(se_context *context, int32_t loop, const uint8_t *const *pieces, int64_t num_pieces,
                       int64_t bytes);

#endif
