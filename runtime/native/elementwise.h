/* Loops that a compiler turns into any instruction set: included once by each kernels_*.c, whose flags decide.
 * Every operation is one IEEE operation and fmaf is written where it is meant, so the bits are the same everywhere. */
#ifndef SE_ELEMENTWISE_H
#define SE_ELEMENTWISE_H

#include "groups.h"
#include "scalar.h"
#include "straight.h"

/* ---- operands */

enum { MAX_GROUP = 128 };

/* The largest |X|: every digit within 8 bits, of three 127 * (65536 + 256 + 1) less a little for rounding up; and, but
 * for wide codes in three digits, the whole sum within 31 bits, largest_code * group_size * limit < 2^31. */
INLINE float integer_limit(const struct shape *shape) {
    const int32_t digits = shape->digits == 1 ? 127 : shape->digits == 2 ? 127 * 257 : 8355584;
    const int32_t sum = 2147250000 / largest_code(shape->code) / shape->group_size;
    return (float)(is_wide(shape->code) || sum > digits ? digits : sum);
}

static const int32_t SMALLEST = 0x0d800000; /* 2^-100: a group below it counts as zero, its scale would be no number */

/* The integers X of one group, |X| <= limit, and the scale that gives x = scale * X. Infinity or NaN makes the scale so. */
INLINE float group_integers(const float *x, int64_t n, float limit, int32_t *integers) {
    int32_t largest = 0; /* of magnitudes as bits: the order of floats, and NaN above all */
    for (int64_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(float_bits(x[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    int finite = largest < 0x7f800000;
    float inverse = largest < SMALLEST || !finite ? 0.0f : limit / bits_float((uint32_t)largest);
    for (int64_t i = 0; i < n; i++) integers[i] = finite ? (int32_t)rintf(x[i] * inverse) : 1;
    if (largest < SMALLEST) return 0.0f;
    return bits_float((uint32_t)largest) / limit;
}

/* The lowest digit of an integer, -128..127, which leaves the others behind. */
INLINE int32_t take_digit(int32_t *X) {
    const int32_t digit = (int8_t)(*X & 255);
    *X = (*X - digit) >> 8;
    return digit;
}

/* The integers of a group, `group` of its block, to their places in a plane. */
INLINE void order_group(const struct shape *shape, const int32_t *integers, int64_t group, int32_t *ordered) {
    const int64_t parts = order_parts(shape->order), n = shape->group_size / parts, run = n / shape->runs;
    const bool outer_first = shape->order == ORDER_PAIRS && shape->runs == 2;
    const int64_t vectors = 64 * shape->runs, first = group * n / vectors * vectors;
    const int64_t at = shape->runs == 1 ? group * n : first + (group * n - first) / shape->runs;
    const int64_t step = shape->order == ORDER_WIDE ? 2 : parts; /* of a period every step-th column first */
    const int64_t period = shape->order == ORDER_WIDE ? 32 : shape->group_size, columns = period / step;
    int32_t turned[MAX_GROUP];
    for (int64_t i = 0; i < shape->group_size && step > 1; i += columns) {
        for (int64_t j = 0; j < columns; j++) turned[i + j] = integers[i / period * period + i % period / columns + step * j];
    }
    const int32_t *from = step == 1 ? integers : turned;
    for (int64_t part = 0; part < parts; part++) {
        int32_t *to = ordered + part * BLOCK_GROUPS * n + at;
        for (int64_t i = 0; i < n && outer_first; i += 4, from += 4) {
            const int64_t word = (group * n + i) / 4;
            memcpy(to + 64 * ((word + 1) / 2 % 2) + i / 8 * 4, from, 4 * sizeof *to);
        }
        for (int64_t r = 0; r < shape->runs && !outer_first; r++, to += 64) {
            for (int64_t i = 0; i < run; i += 4, from += 4) memcpy(to + i, from, 4 * sizeof *to);
        }
    }
}

/* A block of n integers that stand in the order of a plane, as digits. They are used up. */
INLINE void write_digits(const struct shape *shape, int32_t *X, int64_t n, int8_t *block) {
    const int64_t plane = plane_bytes(shape);
    if (shape->order == ORDER_WIDE) {
        int16_t *high = (int16_t *)(void *)block, *low = high + plane / 2;
        for (int64_t i = 0; i < n && shape->digits == 3; i++) {
            const int32_t digit2 = take_digit(&X[i]), digit1 = take_digit(&X[i]);
            low[i] = (int16_t)(256 * digit1 + digit2 + 128);
        }
        for (int64_t i = 0; i < n; i++) high[i] = (int16_t)X[i];
    } else {
        for (int p = shape->digits - 1; p >= 0; p--) {
            for (int64_t i = 0; i < n; i++) block[p * plane + i] = (int8_t)take_digit(&X[i]);
        }
    }
}

/* For coded weights. */
INLINE void prepare_coded(const struct shape *shape, const float *x, uint8_t *operand) {
    const int64_t n = shape->group_size, groups = shape->columns / n, padded = shape_blocks(shape) * BLOCK_GROUPS;
    float *scales = (float *)(void *)operand, *sums = scales + padded;
    int8_t *digits = (int8_t *)(operand + 8 * padded);
    const float limit = integer_limit(shape);
    int32_t integers[MAX_GROUP], ordered[BLOCK_GROUPS * MAX_GROUP];
    for (int64_t group = 0; group < padded; group++) {
        int32_t total = 0;
        if (group < groups) {
            scales[group] = group_integers(x + group * n, n, limit, integers);
            for (int64_t i = 0; i < n; i++) total += integers[i];
        } else {
            scales[group] = 0.0f;
            memset(integers, 0, (size_t)n * sizeof *integers);
        }
        sums[group] = scales[group] * (float)total;
        order_group(shape, integers, group % BLOCK_GROUPS, ordered);
        if (group % BLOCK_GROUPS != BLOCK_GROUPS - 1) continue;
        write_digits(shape, ordered, BLOCK_GROUPS * n, digits);
        digits += num_planes(shape) * plane_bytes(shape);
    }
}

static void prepare(const struct shape *shape, const float *x, uint8_t *operand) {
    if (shape->digits == 0) {
        memset(operand, 0, (size_t)operand_bytes(shape));
        memcpy(operand, x, (size_t)(4 * shape->columns));
        return;
    }
    /* Loops with constant ends take a third of the time: for 4-bit codes in the usual groups (docs/LEARNED.md 81). */
    switch (shape->order == ORDER_PAIRS && shape->runs == 1 ? 4 * shape->group_size + shape->digits : 0) {
#define KNOWN(group_size, digits)                                                                              \
    case 4 * group_size + digits:                                                                              \
        prepare_coded(&(struct shape){shape->columns, shape->code, group_size, ORDER_PAIRS, 1, digits}, x, operand); \
        break;
        KNOWN(32, SE_FAST) KNOWN(32, SE_CLOSE) KNOWN(32, SE_EXACT) KNOWN(64, SE_FAST) KNOWN(64, SE_CLOSE) KNOWN(64, SE_EXACT)
#undef KNOWN
    default: prepare_coded(shape, x, operand);
    }
}

/* ---- activations */

static void activate(const se_activation *activation, float *gate, const float *up, int64_t n) {
    const float alpha = activation->alpha, limit = activation->limit;
    switch (activation->kind) {
    case SE_SILU:
        for (int64_t i = 0; i < n; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
        break;
    case SE_SWIGLU_CLAMPED:
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i] > limit ? limit : gate[i];
            gate[i] = g * sigmoid(alpha * g) * (clamp(up[i], -limit, limit) + 1.0f);
        }
        break;
    case SE_SILU_CLAMPED:
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i] > limit ? limit : gate[i];
            gate[i] = g * sigmoid(g) * clamp(up[i], -limit, limit);
        }
        break;
    case SE_CLAMPED_SILU:
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i] * sigmoid(gate[i]);
            gate[i] = (g > limit ? limit : g) * clamp(up[i], -limit, limit);
        }
        break;
    case SE_SITU:
        for (int64_t i = 0; i < n; i++) {
            float g = alpha * tangent(gate[i] / alpha) * sigmoid(gate[i]);
            gate[i] = g * (limit * tangent(up[i] / limit));
        }
        break;
    default: /* 0.5 x (1 + tanh(u)) is x * sigmoid(2 u) */
        for (int64_t i = 0; i < n; i++) {
            float x = gate[i];
            float u = 0.7978845608f * fmaf(0.044715f * x * x, x, x);
            gate[i] = x * sigmoid(2.0f * u) * up[i];
        }
    }
}

static void add_scaled(float *y, const float *x, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float product = weight * x[i];
        y[i] += product;
    }
}

/* ---- reading alone: the ceiling that benchmarks divide by */

/* 512 bytes per step into eight registers; the prefetch, if any, runs that many bytes ahead into the second level. */
static uint64_t read_bytes(const uint8_t *bytes, int64_t n, int64_t ahead) {
    typedef uint64_t vector __attribute__((vector_size(64), aligned(8)));
    vector sum[8] = {{0}};
    for (int64_t i = 0; i + 512 <= n; i += 512) {
        const vector *v = (const vector *)(const void *)(bytes + i);
        for (int j = 0; j < 8; j++) {
            if (ahead > 0) __builtin_prefetch(bytes + i + 64 * j + ahead, 0, 2);
            sum[j] |= v[j];
        }
    }
    uint64_t all = 0;
    for (int j = 0; j < 64; j++) all |= sum[j / 8][j % 8];
    return all;
}

#endif
