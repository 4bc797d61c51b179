/* What one instruction set offers, and the one arithmetic that all of them follow to the bit.
 *
 * Coded weights, w = scale * code + bias: unsigned integer codes (enum code), a scale and a bias for every group along
 * the input axis. What an encoding stores for scales and biases becomes floats in groups.h. The activations of a group
 * are integers times one scale (struct operand), so the dot product of a group is a sum of integers, exact in any order:
 *
 *     fast, close            X in 8 or 16 bits, D = sum of code * X, v = D
 *     exact, codes to 6 bits X in as many bits, up to 24, as keep D within 32, v = D
 *     exact, wide codes      X in 24 bits, X = 65536 * digit0 + Y, H and L the sums for digit0 and for Y, v = fma(H, 65536, L)
 *
 * and only the sum over groups is rounded. Group g goes to lane g mod 16, in order of g:
 *
 *     lane = fma(scale[g] * operand.scale[g], v, lane)
 *     lane = fma(bias[g], operand.sum[g], lane)
 *
 * and at the end the 16 lanes are added as a fixed tree: q = (l0 + l2) + (l1 + l3) of each four, (q0 + q1) + (q2 + q3).
 *
 * Plain weights, FP8 times its scale among them: lane k mod 32 of 32 lanes takes fma(w[k], x[k], lane) in order of k; lane i takes lane i + 16, and
 * the 16 are added as above.
 *
 * So neither threads nor tiles nor the number of tokens can change a bit, and an instruction set that differs from
 * kernels_portable.c in one bit is wrong. A new encoding is one way to get integer codes and one to get their groups'
 * scales and biases.
 */
#ifndef SE_KERNELS_H
#define SE_KERNELS_H

#include "se_native.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

enum {
    BLOCK_GROUPS = 16, /* groups that are reduced together, one per lane */
    TILE_ROWS = 16,    /* rows whose lanes are added up together */
    ALIGNMENT = 64,
    PLAIN_LANES = 32,
    MAX_STREAMS = 2,
};

/* ---- codes */

/* How the codes of a row are packed: a stream of bits, code j in bits j * width and up. */
enum code { CODE_2, CODE_3, CODE_4, CODE_5, CODE_6, CODE_8, CODE_FP4, CODE_IQ4, CODE_IQ3, CODE_IQ2, CODE_IQ1, NUM_CODES };

static inline int code_width(int code) {
    return code == CODE_8 ? 8 : code == CODE_IQ2 || code == CODE_IQ1 ? 3 : code >= CODE_FP4 ? 4 : code + 2;
}

/* Codes that share a byte and nothing else: 4 of 2 bits, 2 of 4. */
static inline int codes_of_byte(int code) {
    const int width = code_width(code);
    return width == 2 || width == 4 ? 8 / width : 1;
}

/* From CODE_FP4 on codes stand for other integers, by nibble, or by 3 bits twice: (largest_code + 1) / 2 is zero, and what
 * lies above it is a multiple of the value; of FP4 (E2M1) twice. */
static const uint8_t CODE_INTEGERS[NUM_CODES - CODE_FP4][16] = {
    {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0},
    {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    {33, 37, 41, 45, 49, 53, 57, 62, 29, 25, 21, 17, 13, 9, 5, 0},
    {51, 68, 86, 43, 35, 18, 0, 43, 51, 68, 86, 43, 35, 18, 0, 43},
    {2, 10, 18, 9, 0, 8, 16, 9, 2, 10, 18, 9, 0, 8, 16, 9},
};

static inline int largest_code(int code) {
    switch (code) {
    case CODE_FP4: return 24;
    case CODE_IQ4: return 255; /* 241, but the middle is 128 */
    case CODE_IQ3: return 62;
    case CODE_IQ2: return 86;
    case CODE_IQ1: return 18;
    default: return (1 << code_width(code)) - 1;
    }
}

/* Of whole bytes, which are too large for what narrower ones do. */
static inline int is_wide(int code) {
    return code == CODE_8 || code == CODE_IQ4;
}

/* ---- operands: activations made ready for a matrix */

/* Where the digit of column j of a block stands in its plane; kernels unpack codes into that order. */
enum order {
    ORDER_PLAIN, /* at j */
    ORDER_PAIRS, /* two codes lie in a byte, or in 6 bits: all even columns, then all odd ones */
    ORDER_FOURS, /* 2-bit codes lie in fours: the columns of the first codes of all bytes, then of the second, and so on */
    ORDER_WIDE,  /* 16-bit digits, of every 32 columns the even ones, then the odd ones */
};

/* One token's activations for matrices of the same shape. In memory one after another:
 *     float scale[groups], float sum[groups]             groups: rounded up to whole blocks, zeros behind the end
 *     digits[blocks][planes][16 * group_size]            in order; most significant plane first
 * Where groups are cut into runs, of every 64 * runs digits the first run of each group comes first, then the second of
 * each: 64 digits, a vector, meet a run of several groups, and the next vector another run of the same in the same lanes.
 * Of pairs in two runs each four words, of 8 columns, have the outer two in the first and the inner two in the second.
 * sum is scale * (sum of the integers). Digits are int8_t, a plane each; or, where 8-bit codes meet ORDER_WIDE, int16_t:
 * X itself if it has two digits, of three digit0 and then Y + 128, which unlike Y never leaves 16 bits. */
struct shape {
    int64_t columns;
    int32_t code; /* enum code */
    int32_t group_size; /* 16, 32, 64 or 128 */
    int32_t order; /* enum order */
    int32_t runs; /* that the digits of a group are cut into */
    int32_t digits; /* enum se_precision; 0: plain weights, the operand is float x[columns rounded up to PLAIN_LANES] */
};

/* Columns of one byte, whose digits lie in as many parts of a plane. */
static inline int order_parts(int32_t order) {
    return order == ORDER_FOURS ? 4 : order == ORDER_PAIRS ? 2 : 1;
}

/* A run has 8 columns at least, and 4 bytes of codes. */
static inline int most_runs(int group_size, int parts) {
    return group_size / (parts == 4 ? 16 : 8);
}

static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

static inline int64_t shape_blocks(const struct shape *shape) {
    int64_t block = (int64_t)BLOCK_GROUPS * shape->group_size;
    return (shape->columns + block - 1) / block;
}

static inline int32_t num_planes(const struct shape *shape) {
    return shape->order == ORDER_WIDE ? (shape->digits + 1) / 2 : shape->digits;
}

/* Digits of which the sums, each worth 256 times the next, make one integer of 32 bits. */
static inline int joined_digits(int code, int digits) {
    return is_wide(code) && digits == SE_EXACT ? 1 : digits;
}

static inline int64_t plane_bytes(const struct shape *shape) {
    return (int64_t)BLOCK_GROUPS * shape->group_size * (shape->order == ORDER_WIDE ? 2 : 1);
}

static inline int64_t operand_bytes(const struct shape *shape) {
    if (shape->digits == 0) return round_up(4 * round_up(shape->columns, PLAIN_LANES), ALIGNMENT);
    return shape_blocks(shape) * (2 * 4 * BLOCK_GROUPS + num_planes(shape) * plane_bytes(shape));
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
    const uint8_t *biases; /* or what an encoding has in their place (enum se_encoding) */
    int64_t rows;
    int64_t weight_stride; /* bytes of a row */
    int64_t scales_stride;
    int64_t biases_stride;
    struct shape shape;
    int32_t encoding;  /* enum se_encoding */
    int32_t dtype;     /* of scales and biases, or of plain values */
    int64_t per_scale; /* groups that share a stored scale; FP8: columns that do */
    float unit;        /* of SE_Q6_K and what is stored as it is: scale = d * unit * stored, a power of two */
    float middle;      /* and the bias is minus this many scales */
    bool near;         /* struct kernels */
};

/* Groups whose scales and biases become floats together. */
enum { CHUNK_GROUPS = 16 * BLOCK_GROUPS };

/* Rows of one or two matrices of the same shape and encoding times `tokens` operands: row r of
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

/* Weights that are floats: those of enum se_dtype, and FP8 (E4M3) times a scale. */
enum value { VALUE_FP8 = SE_F32 + 1, NUM_VALUES };

/* 16, 32, 64 or 128. */
static inline int group_index(int group_size) {
    return group_size == 16 ? 0 : group_size == 32 ? 1 : group_size == 64 ? 2 : 3;
}

struct kernels {
    const char *name;
    /* Floats to an operand of that shape; `columns` are read, the rest is zero. */
    void (*prepare)(const struct shape *shape, const float *x, uint8_t *operand);
    /* How codes meet their digits. */
    enum order order[NUM_CODES];
    /* Whether one token's codes are asked for a little ahead into the first-level cache (docs/LEARNED.md 93, 98). */
    bool near;
    /* Runs of a group, by code and digits less one; most_runs at most. */
    int32_t runs[NUM_CODES][SE_EXACT];
    /* By code, group size (group_index) and digits less one, plain by enum value. NULL: no encoding has that. */
    tile_fn *coded[NUM_CODES][4][SE_EXACT];
    tile_fn *plain[NUM_VALUES];
    /* gate [n] becomes activation(gate, up). */
    void (*activate)(const se_activation *activation, float *gate, const float *up, int64_t n);
    /* y [n] += weight * x, one rounding each for product and sum, as NumPy has it. */
    void (*add_scaled)(float *y, const float *x, float weight, int64_t n);
    /* Reads n bytes, with or without a prefetch `ahead` of them. */
    uint64_t (*read)(const uint8_t *bytes, int64_t n, int64_t ahead);
};

/* By what is not the same everywhere: codes of 3 bits, of 8, and IQ4. */
#define ORDERS_OF(of_3, of_8, of_iq4)                                                                                   \
    {ORDER_FOURS, of_3, ORDER_PAIRS, ORDER_PLAIN, ORDER_PLAIN, of_8, ORDER_PAIRS, of_iq4, ORDER_PAIRS, of_3, of_3}

#define ONE_RUN \
    {{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}}

extern const struct kernels kernels_portable;
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx2_near; /* for Intel's processors */
extern const struct kernels kernels_avx512;
extern const struct kernels kernels_avx512vnni;
extern const struct kernels kernels_avx512vbmi;
extern const struct kernels kernels_neon;

/* ---- small floats */

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

/* FP8, E4M3FN: exact for every value; the one that is all ones is no number. */
static inline float e4m3_float(uint8_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x80) << 24, rest = (uint32_t)(bits & 0x7f) << 20;
    const uint32_t value = float_bits(bits_float(rest) * 0x1p120f);
    return bits_float(sign | (rest == 0x7f00000 ? 0x7fc00000 : value));
}

static inline float dtype_float(int32_t dtype, const uint8_t *values, int64_t i) {
    uint16_t half;
    float single;
    if (dtype == SE_F32) return memcpy(&single, values + 4 * i, sizeof single), single;
    memcpy(&half, values + 2 * i, sizeof half);
    return dtype == SE_BF16 ? bf16_float(half) : f16_float(half);
}

#endif
