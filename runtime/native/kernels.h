/* What one instruction set offers, and the one arithmetic that all of them follow to the bit.
 *
 * Affine weights, w = scale * code + bias in groups along the input axis. The activations of a group are integers
 * times one scale (struct operand), so the dot product of a group is a sum of integers, exact in any order:
 *
 *     fast                X in 8 bits, D = sum of code * X, v = D
 *     exact, 4-bit codes  X in as many bits as keep D within 32 (21 to 23), v = D
 *     exact, 8-bit codes  X in 24 bits, X = 65536 * digit0 + Y, H and L the sums for digit0 and for Y, v = fma(H, 65536, L)
 *
 * and only the sum over groups is rounded. Group g goes to lane g mod 16, in order of g:
 *
 *     lane = fma(scale[g] * operand.scale[g], v, lane)
 *     lane = fma(bias[g], operand.sum[g], lane)
 *
 * and at the end the 16 lanes are added as a fixed tree: q = (l0 + l2) + (l1 + l3) of each four, (q0 + q1) + (q2 + q3).
 *
 * Plain weights: lane k mod 32 of 32 lanes takes fma(w[k], x[k], lane) in order of k; lane i takes lane i + 16, and
 * the 16 are added as above.
 *
 * So neither threads nor tiles nor the number of tokens can change a bit, and an instruction set that differs from
 * kernels_portable.c in one bit is wrong. A new encoding is one way to get integer codes, scales and biases of a block.
 */
#ifndef SE_KERNELS_H
#define SE_KERNELS_H

#include "se_native.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK_GROUPS = 16, /* groups that are reduced together, one per lane */
    TILE_ROWS = 16,    /* rows whose lanes are added up together */
    ALIGNMENT = 64,
    PLAIN_LANES = 32,
    MAX_STREAMS = 2,
};

/* ---- operands: activations made ready for a matrix */

/* One token's activations for matrices of the same columns, bits, group_size and precision. In memory one after another:
 *     float scale[groups], float sum[groups]           groups: rounded up to whole blocks, zeros behind the end
 *     int8_t digits[blocks][planes][16 * group_size]   planes: 3 exact, 1 fast; most significant first
 * sum is scale * (sum of the integers). In a plane, 8-bit codes meet the values in order; 4-bit codes lie in pairs in
 * their bytes, so all even columns come first, then all odd ones. */
struct shape {
    int64_t columns;
    int32_t bits;
    int32_t group_size;
    int32_t planes; /* 0: plain weights, the operand is float x[columns rounded up to PLAIN_LANES] */
};

static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

static inline int64_t shape_blocks(const struct shape *shape) {
    int64_t block = (int64_t)BLOCK_GROUPS * shape->group_size;
    return (shape->columns + block - 1) / block;
}

static inline int64_t operand_bytes(const struct shape *shape) {
    if (shape->planes == 0) return round_up(4 * round_up(shape->columns, PLAIN_LANES), ALIGNMENT);
    int64_t values = (int64_t)BLOCK_GROUPS * shape->group_size;
    return shape_blocks(shape) * (2 * 4 * BLOCK_GROUPS + shape->planes * values);
}

struct operand {
    const float *scale;
    const float *sum;
    const int8_t *digits;
};

static inline struct operand operand_at(const struct shape *shape, const uint8_t *bytes) {
    int64_t groups = shape_blocks(shape) * BLOCK_GROUPS;
    const float *scale = (const float *)(const void *)bytes;
    return (struct operand){scale, scale + groups, (const int8_t *)(bytes + 8 * groups)};
}

/* ---- tiles */

/* A matrix in memory, ready for a kernel. */
struct weights {
    const uint8_t *weight;
    const uint8_t *scales;
    const uint8_t *biases;
    int64_t rows;
    int64_t weight_stride; /* bytes of a row */
    int64_t scales_stride;
    struct shape shape;
    int32_t dtype; /* of scales and biases, or of plain values */
};

/* Rows of one or two matrices of the same shape times `tokens` operands: row r of
 * stream s, first[s] <= r < first[s] + rows, goes to y[s][t][r].
 * Two streams share every load of the operands. They lie far apart in memory (gate and up, or the two halves of a
 * matrix): the prefetchers of the hardware follow two distant streams at full speed, two in one page at half of it. */
struct tile {
    const struct weights *weights[MAX_STREAMS];
    int64_t first[MAX_STREAMS];
    float *const *y[MAX_STREAMS]; /* [tokens] */
    int64_t streams;
    int64_t rows;
    const uint8_t *const *operands; /* [tokens] */
    int64_t tokens;
};

typedef void tile_fn(const struct tile *tile);

struct kernels {
    const char *name;
    /* Floats to an operand of that shape; `columns` are read, the rest is zero. */
    void (*prepare)(const struct shape *shape, const float *x, uint8_t *operand);
    /* By bits 4 and 8, group size 32, 64 and 128, and precision; plain by dtype. */
    tile_fn *affine[2][3][2];
    tile_fn *plain[3];
    /* gate [n] becomes activation(gate, up). */
    void (*activate)(const se_activation *activation, float *gate, const float *up, int64_t n);
    /* y [n] += weight * x, one rounding each for product and sum, as NumPy has it. */
    void (*add_scaled)(float *y, const float *x, float weight, int64_t n);
    /* Reads n bytes, with or without a prefetch `ahead` of them. */
    uint64_t (*read)(const uint8_t *bytes, int64_t n, int64_t ahead);
};

extern const struct kernels kernels_portable;
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx512;
extern const struct kernels kernels_avx512vnni;
extern const struct kernels kernels_neon;

/* ---- 16-bit floats */

static inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_float(uint16_t bits) {
    return bits_float((uint32_t)bits << 16);
}

/* Exact for every value; subnormals by way of a float that is normal. */
static inline float f16_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return bits_float(sign | float_bits((float)rest * 0x1p-24f));
    return bits_float(sign | ((rest << 13) + 0x38000000));
}

static inline float dtype_float(int32_t dtype, const uint8_t *values, int64_t i) {
    uint16_t half;
    float single;
    if (dtype == SE_F32) return memcpy(&single, values + 4 * i, sizeof single), single;
    memcpy(&half, values + 2 * i, sizeof half);
    return dtype == SE_BF16 ? bf16_float(half) : f16_float(half);
}

#endif
