/* What encodings store for the scales and biases of 8 groups, as vectors: the floats of groups.h, by the same operations,
 * without a way through memory. */
#ifndef SE_GROUPS_AVX2_H
#define SE_GROUPS_AVX2_H

#include "elementwise.h"
#include "straight.h"

#include <immintrin.h>

enum {
    HALF_GROUPS = 8,
    AHEAD_BYTES = 4096, /* how far ahead codes are asked for: past the caches, which others need (docs/LEARNED.md 38) */
};

/* What the compiler must know of an encoding and a precision to make straight code. */
struct kind {
    int code;
    int group_size;
    int planes;
};

/* Eight values; of FP8 a 256th of them, by way of f16, whose subnormals cost nothing. All ones is no number. */
INLINE __m256 load_values(const uint8_t *values, int value) {
    if (value == SE_F32) return _mm256_loadu_ps((const float *)(const void *)values);
    if (value == VALUE_FP8) {
        const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)values));
        const __m128i rest = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
        const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
        const __m128i none = _mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f));
        return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(_mm_slli_epi16(rest, 7), sign), none));
    }
    const __m128i halves = _mm_loadu_si128((const void *)values);
    if (value == SE_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* 2 ** (exponent - 128), as e8m0_halves has it. */
INLINE __m256 e8m0_vector(const uint8_t *exponents) {
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)exponents));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    const __m256i none = _mm256_and_si256(_mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x7fc00000));
    const __m256i bits = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, none));
}

/* Where scales and biases of a row come from: as they are stored, or as floats that load_groups has made. */
struct groups {
    const struct weights *stored; /* or NULL */
    const uint8_t *scales, *biases;
};

/* Whether every half of every row can be taken as it is stored. */
INLINE int taken_as_stored(const struct tile *tile, struct kind kind) {
    int stored = tile->weights[0]->shape.columns / kind.group_size % HALF_GROUPS == 0;
    for (int64_t s = 0; s < tile->streams; s++) {
        const struct weights *w = tile->weights[s];
        stored &= w->per_scale == 1 && w->encoding != SE_Q2_K && w->encoding != SE_Q4_K && w->encoding != SE_Q6_K;
    }
    return stored;
}

INLINE struct groups stored_groups(const struct weights *w, int64_t row) {
    return (struct groups){w, w->scales + row * w->scales_stride, w->biases + row * w->biases_stride};
}

INLINE struct groups float_groups(const float *scales, const float *biases) {
    return (struct groups){NULL, (const uint8_t *)scales, (const uint8_t *)biases};
}

/* Eight groups from `at` on: the floats of load_groups (groups.h), by the same operations. */
INLINE void eight_groups(__m256 *scale, __m256 *bias, const struct groups *from, int64_t at, struct kind kind) {
    const struct weights *w = from->stored;
    if (w == NULL) {
        *scale = load_values(from->scales + 4 * at, SE_F32);
        *bias = load_values(from->biases + 4 * at, SE_F32);
    } else if (kind.code == CODE_FP4) {
        if (kind.group_size == 32) {
            *scale = e8m0_vector(from->scales + at);
        } else {
            const __m256 by = _mm256_set1_ps(nvfp4_global(w->encoding, from->biases));
            *scale = load_values(from->scales + at, VALUE_FP8);
            *scale = w->encoding == SE_NVFP4_DIVIDE ? _mm256_div_ps(*scale, by) : _mm256_mul_ps(*scale, by);
        }
        *bias = _mm256_mul_ps(*scale, _mm256_set1_ps(-12.0f));
    } else {
        const int64_t byte = (w->dtype == SE_F32 ? 4 : 2) * at;
        *scale = load_values(from->scales + byte, w->dtype);
        if (w->encoding == SE_AFFINE) {
            *bias = load_values(from->biases + byte, w->dtype);
        } else if (w->encoding == SE_SYMMETRIC) {
            *bias = _mm256_mul_ps(*scale, _mm256_set1_ps(-(float)((largest_code(kind.code) + 1) / 2)));
        } else {
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(from->biases + at)));
            *bias = _mm256_mul_ps(*scale, _mm256_sub_ps(_mm256_set1_ps(-0.0f), _mm256_cvtepi32_ps(zeros)));
        }
    }
}

#endif
