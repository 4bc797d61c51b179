/* The inner loops of all that is not a product with weights: norms, rotation, attention, convolution, delta rule.
 *
 * They are compiled once per instruction set (loops_*.c include loops_*.h) and give the same bits with each: sums of
 * squares and of probabilities go to lane i mod 16 in order of i and end as the tree of lanes_sum; every other sum is
 * one chain in the order of its terms. What a token gets depends on no other token of the call.
 */
#ifndef SE_LOOPS_H
#define SE_LOOPS_H

#include "kernels.h"
#include "lanes.h"

#include <stdbool.h>

enum {
    KEY_LANES = LANES, /* keys that lie side by side in the cache */
    BLOCK_KEYS = 128,  /* keys whose softmax is taken together, from a position that is a multiple of it */
    TILE_QUERIES = 64, /* query rows at most that share a pass over a block */
};

/* The rows of one tile: queries of consecutive tokens that share a key head, token by token, `group` of each. */
struct queries {
    const float *q; /* [rows, width] */
    int64_t rows;
    int64_t group;
    int64_t position; /* of the first token */
    bool together;    /* all tokens see up to this position, not one more each */
    int64_t width;
    int64_t value_width; /* rounded up to LANES */
    int64_t window;      /* a query sees that many positions, its own the last; no limit: INT64_MAX */
    float scale;
    const uint8_t *selection; /* of the first token, or NULL: 1 for each position that it sees */
    int64_t selection_stride; /* to the next token's */
};

/* Softmax not yet divided: sum of exp(score - largest) and of that times the values. */
struct partial {
    float *sum;     /* [rows] */
    float *largest; /* [rows], -infinity where a row saw no key */
    float *mixed;   /* [rows, value_width] */
};

/* One value head, LANES of its columns. */
struct delta_panel {
    const float *q, *k; /* of the first token: [key_width], the next tokens key_stride on */
    const float *v;     /* [lanes used], value_stride on */
    const float *decay; /* [1], or [key_width] where each key channel has its own, decay_stride on */
    const float *beta;  /* [1], head_stride on; or NULL */
    bool decay_by_channel;
    int64_t key_stride, value_stride, decay_stride, head_stride;
    int64_t tokens, key_width;
    int64_t columns;    /* of the panel, at most LANES */
    const float *state; /* [key_width, LANES] */
    float *new_state;
    float *y; /* [columns], value_stride on */
};

struct loops {
    /* y [n] = x / sqrt(mean of squares + eps) * weight. */
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *y);
    /* x [n] becomes s / sqrt(mean of squares of s + eps), s = x * weight. */
    void (*scaled_norm)(float *x, const float *weight, float eps, int64_t n);
    /* y [n] = x / sqrt(sum of squares + eps) * scale. */
    void (*l2_norm)(const float *x, float eps, float scale, int64_t n, float *y);
    void (*map)(int32_t map, const float *x, int64_t n, float *y);
    /* Pairs (i, i + half), or (2i, 2i + 1), turned by angle i, the rest of d as it was. */
    void (*rotate)(const float *x, const float *cosine, const float *sine, int64_t half, int64_t d, int32_t interleaved,
                   float *y);
    float (*largest)(const float *x, int64_t n);
    /* x [n] becomes exp(x - largest); returns the sum. */
    float (*exponents)(float *x, float largest, int64_t n);
    /* y [channels] = sum over j of taps[j] * inputs[j], one rounding each for product and sum, as NumPy has it. */
    void (*convolve)(const float *const *inputs, const float *taps, int64_t kernel, int64_t channels, float *y);
    /* Queries against the keys of one block: keys [BLOCK_KEYS / 16, width, 16], values [BLOCK_KEYS, value_width], or
     * NULL where they are the first value_width of the keys.
     * scores: scratch [TILE_QUERIES, BLOCK_KEYS]. */
    void (*attend)(const struct queries *queries, int64_t first_key, const float *keys, const float *values,
                   float *scores, const struct partial *partial);
    /* total becomes total and partial together. */
    void (*merge)(const struct queries *queries, const struct partial *total, const struct partial *partial);
    void (*delta)(const struct delta_panel *panel);
    /* Rows of a matrix as floats [rows, columns]. */
    void (*decode_rows)(const struct weights *weights, int64_t first, int64_t rows, float *values);
    /* y [columns] += sum over rows of x[row] * values[row]; y [rows] = values . x. */
    void (*add_rows)(const float *values, int64_t rows, int64_t columns, const float *x, float *y);
    void (*dot_rows)(const float *values, int64_t rows, int64_t columns, const float *x, float *y);
};

extern const struct loops loops_portable; /* on aarch64 this is NEON, which every one has */
extern const struct loops loops_avx2;
extern const struct loops loops_avx512;

#endif
