/* The affine encoder as loops that a compiler turns into any instruction set: included once by each
 * encode_affine*.c, whose flags decide. formats/encodings/affine.py is the definition; every operation is one IEEE
 * operation in its order (true divisions: a reciprocal changes codes), so the bits are the same everywhere. */
#ifndef SE_ENCODE_AFFINE_H
#define SE_ENCODE_AFFINE_H

#include "kernels.h"

#include <stdbool.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

enum {
    ENCODE_GROUPS = 16, /* groups whose scales are found together: what they hold stays in the first cache */
    ENCODE_MAX_GROUP = 128,
    ENCODE_AHEAD = 4096, /* bytes that are asked for: what was just read from a disk may be in no cache */
};

/* se_encode_affine at one level. */
typedef int32_t encode_affine_fn(int32_t bits, int64_t group_size, int32_t dtype, int32_t scale_dtype,
                                 const uint8_t *values, int64_t groups, uint8_t *codes, uint8_t *scales,
                                 uint8_t *biases);

encode_affine_fn encode_affine_portable, encode_affine_avx2, encode_affine_avx512;

/* Floats as integers of the same order, -0 below 0, NaN beyond the infinities; its own inverse. */
static inline int32_t ordered(int32_t bits) {
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static const int32_t LARGEST = 0x7f7fffff; /* of finite magnitudes */

/* As f16_float, without a branch. */
static inline float f16_float_select(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t normal = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
    uint32_t subnormal = float_bits((float)(int32_t)rest * 0x1p-24f);
    return bits_float(sign | (rest < 0x400 ? subnormal : normal));
}

/* n values, a multiple of 32. */
static inline void load_floats(int32_t dtype, const uint8_t *values, int64_t n, float *x) {
    const uint16_t *half = (const uint16_t *)(const void *)values;
    switch (dtype) {
    case SE_BF16:
        for (int64_t i = 0; i < n; i++) x[i] = bf16_float(half[i]);
        break;
    case SE_F16:
#if defined(__F16C__)
        for (int64_t i = 0; i < n; i += 8) {
            _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(half + i))));
        }
#else
        for (int64_t i = 0; i < n; i++) x[i] = f16_float_select(half[i]);
#endif
        break;
    default:
        memcpy(x, values, (size_t)n * sizeof *x);
    }
}

/* Scales or biases in their dtype, to nearest, ties to even. False when one is too large for it. */
static inline bool store_floats(int32_t dtype, const float *x, int64_t n, uint8_t *to) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(x[i]), magnitude = bits & 0x7fffffff;
        uint32_t sign = bits >> 16 & 0x8000, half;
        if (dtype == SE_F32) {
            memcpy(to + 4 * i, x + i, sizeof *x);
            bad |= magnitude >= 0x7f800000;
            continue;
        }
        if (dtype == SE_BF16) {
            half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            bad |= (half & 0x7fff) >= 0x7f80;
        } else {
            uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
            /* A sum with 0.5, whose unit in the last place is the smallest f16. */
            uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
            half = sign | (magnitude < 0x38800000 ? subnormal : normal);
            bad |= magnitude >= 0x477ff000;
        }
        uint16_t stored = (uint16_t)half;
        memcpy(to + 2 * i, &stored, sizeof stored);
    }
    return bad == 0;
}

/* The extremes of each group. False when a value is not finite. */
static inline bool find_extremes(int64_t group_size, const float *x, int64_t groups, float *low, float *high) {
    int32_t least = LARGEST, most = ordered((int32_t)0xff7fffff);
    for (int64_t g = 0; g < groups; g++) {
        int32_t a = INT32_MAX, b = INT32_MIN;
        for (int64_t i = 0; i < group_size; i++) {
            int32_t value;
            memcpy(&value, x + g * group_size + i, sizeof value);
            value = ordered(value);
            a = value < a ? value : a;
            b = value > b ? value : b;
        }
        least = a < least ? a : least;
        most = b > most ? b : most;
        low[g] = bits_float((uint32_t)ordered(a));
        high[g] = bits_float((uint32_t)ordered(b));
    }
    return least >= ordered((int32_t)0xff7fffff) && most <= LARGEST;
}

/* To the nearest integer, ties to even, at any magnitude. */
static inline float round_even(float x) {
    float magnitude = fabsf(x);
    float rounded = (magnitude + 0x1p23f) - 0x1p23f;
    return copysignf(magnitude < 0x1p23f ? rounded : magnitude, x);
}

/* low and high of each group become its scale and bias; the edge larger in magnitude is met exactly. */
static inline void find_scales(float levels, int64_t groups, float *low, float *high) {
    for (int64_t g = 0; g < groups; g++) {
        bool low_edge = fabsf(low[g]) > fabsf(high[g]);
        float scale = (high[g] - low[g]) / levels;
        scale = scale > 1e-7f ? scale : 1e-7f;
        scale = low_edge ? scale : -scale;
        float edge = low_edge ? low[g] : high[g];
        float code_of_edge = round_even(edge / scale);
        bool on_grid = code_of_edge != 0.0f;
        float exact = edge / (on_grid ? code_of_edge : 1.0f);
        low[g] = on_grid ? exact : scale;
        high[g] = on_grid ? edge : 0.0f;
    }
}

#if defined(__AVX512BW__)

/* 16 codes as bytes. Instructions by name, as gcc makes masks of the comparisons. */
static inline __m128i codes_of_16(const float *x, __m512 scale, __m512 bias, __m512 levels) {
    __m512 code = _mm512_div_ps(_mm512_sub_ps(_mm512_loadu_ps(x), bias), scale);
    code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), levels); /* the second one where one is no number */
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code));
}

/* The codes of one group, packed. What is no number (0 / 0: all values equal and enormous) is code 0. */
static inline void store_codes(int32_t bits, int64_t group_size, const float *x, float scale, float bias, uint8_t *to) {
    const __m512 levels = _mm512_set1_ps((float)((1 << bits) - 1));
    const __m512 scales = _mm512_set1_ps(scale), biases = _mm512_set1_ps(bias);
    for (int64_t i = 0; i < group_size; i += 32) {
        __m256i codes = _mm256_set_m128i(codes_of_16(x + i + 16, scales, biases, levels),
                                         codes_of_16(x + i, scales, biases, levels));
        if (bits == 8) {
            _mm256_storeu_si256((__m256i *)(void *)(to + i), codes);
        } else { /* low half of a byte: even column; high half: odd column */
            __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
            _mm_storeu_si128((__m128i *)(void *)(to + i / 2), _mm256_cvtepi16_epi8(pairs));
        }
    }
}

#else

/* The codes of one group, packed. What is no number (0 / 0: all values equal and enormous) is code 0. */
static inline void store_codes(int32_t bits, int64_t group_size, const float *x, float scale, float bias, uint8_t *to) {
    const float levels = (float)((1 << bits) - 1);
    float cut[ENCODE_MAX_GROUP]; /* a loop of its own: gcc would carry the comparisons on as masks of bytes */
    uint8_t codes[ENCODE_MAX_GROUP];
    for (int64_t i = 0; i < group_size; i++) {
        float code = (x[i] - bias) / scale;
        code = code > 0.0f ? code : 0.0f;
        cut[i] = code < levels ? code : levels;
    }
    for (int64_t i = 0; i < group_size; i++) {
        codes[i] = (uint8_t)(float_bits(cut[i] + 0x1.8p23f) & 0xff); /* rounded: the unit in the last place is 1 */
    }
    if (bits == 8) {
        memcpy(to, codes, (size_t)group_size);
        return;
    }
    for (int64_t i = 0; i < group_size / 2; i++) {
        uint16_t pair; /* low byte: even column; high byte: odd column */
        memcpy(&pair, codes + 2 * i, sizeof pair);
        to[i] = (uint8_t)(pair | pair >> 4);
    }
}

#endif

static inline __attribute__((always_inline)) int32_t
encode_groups(int32_t bits, int64_t group_size, int32_t dtype, int32_t scale_dtype, const uint8_t *values,
              int64_t groups, uint8_t *codes, uint8_t *scales, uint8_t *biases) {
    const int64_t value_bytes = dtype == SE_F32 ? 4 : 2, scale_bytes = scale_dtype == SE_F32 ? 4 : 2;
    _Alignas(64) float x[ENCODE_GROUPS * ENCODE_MAX_GROUP], scale[ENCODE_GROUPS], bias[ENCODE_GROUPS];
    for (int64_t first = 0; first < groups; first += ENCODE_GROUPS) {
        int64_t n = groups - first < ENCODE_GROUPS ? groups - first : ENCODE_GROUPS;
        const uint8_t *ahead = values + first * group_size * value_bytes + ENCODE_AHEAD;
        for (int64_t i = 0; i < n * group_size * value_bytes; i += 64) __builtin_prefetch(ahead + i);
        load_floats(dtype, values + first * group_size * value_bytes, n * group_size, x);
        if (!find_extremes(group_size, x, n, scale, bias)) return SE_NOT_FINITE;
        find_scales((float)((1 << bits) - 1), n, scale, bias);
        for (int64_t g = 0; g < n; g++) {
            uint8_t *to = codes + (first + g) * group_size * bits / 8;
            store_codes(bits, group_size, x + g * group_size, scale[g], bias[g], to);
        }
        bool fits = store_floats(scale_dtype, scale, n, scales + first * scale_bytes);
        if (!store_floats(scale_dtype, bias, n, biases + first * scale_bytes) || !fits) return SE_TOO_LARGE;
    }
    return SE_OK;
}

/* Each setting with its numbers as constants. */
#define ENCODE_SETTING(BITS, GROUP_SIZE)                                                                             \
    case BITS << 8 | GROUP_SIZE:                                                                                     \
        return encode_groups(BITS, GROUP_SIZE, dtype, scale_dtype, values, groups, codes, scales, biases)
#define ENCODE_AFFINE(NAME)                                                                                          \
    int32_t NAME(int32_t bits, int64_t group_size, int32_t dtype, int32_t scale_dtype, const uint8_t *values,        \
                 int64_t groups, uint8_t *codes, uint8_t *scales, uint8_t *biases) {                                 \
        switch (bits << 8 | group_size) {                                                                            \
            ENCODE_SETTING(4, 32);                                                                                   \
            ENCODE_SETTING(4, 64);                                                                                   \
            ENCODE_SETTING(4, 128);                                                                                  \
            ENCODE_SETTING(8, 32);                                                                                   \
            ENCODE_SETTING(8, 64);                                                                                   \
            ENCODE_SETTING(8, 128);                                                                                  \
        }                                                                                                            \
        return SE_UNSUPPORTED;                                                                                       \
    }

#endif
