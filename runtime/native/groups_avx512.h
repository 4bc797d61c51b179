/* What encodings store for the scales and biases of a block of 16 groups, as vectors: the floats of groups.h, by the same
 * operations, without a way through memory. */
#ifndef SE_GROUPS_AVX512_H
#define SE_GROUPS_AVX512_H

#include "elementwise.h"
#include "straight.h"

#include <immintrin.h>

/* What the compiler must know of an encoding and a precision to make straight code. */
struct kind {
    int code;
    int group_size;
    int planes; /* of digits */
};

/* A bit for each of the next 16 values that exist. */
INLINE __mmask16 present(int64_t left) {
    return (__mmask16)(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}

/* Sixteen values, 0 where the mask has none; of FP8 a 256th of them, by way of f16, whose subnormals cost nothing. All
 * ones is no number. */
INLINE __m512 load_values(const uint8_t *values, __mmask16 mask, int value) {
    if (value == SE_F32) return _mm512_maskz_loadu_ps(mask, values);
    if (value == VALUE_FP8) {
        const __m256i bits = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, values));
        const __m256i rest = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
        const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
        const __m256i none = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f));
        return _mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(rest, 7), sign), none));
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, values);
    if (value == SE_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Sixteen bytes as unsigned numbers of 32 bits. */
INLINE __m512i load_bytes(const uint8_t *bytes, __mmask16 mask) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
}

/* 2 ** (exponent - 128), as e8m0_halves has it. */
INLINE __m512 e8m0_vector(__m512i exponents) {
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)), 23);
    const __mmask16 small = _mm512_cmplt_epi32_mask(exponents, _mm512_set1_epi32(2));
    const __mmask16 none = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
    const __m512i bits = _mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x200000), exponents);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, none, _mm512_set1_epi32(0x7fc00000)));
}

/* Where scales and biases of a row come from: as they are stored, or as floats that load_groups has made. */
struct groups {
    const struct weights *stored; /* or NULL */
    const uint8_t *scales, *biases;
    __mmask16 present; /* of the block's groups those that the row has; of floats all, zeros behind them */
};

/* Whether sixteen_groups can take the groups as they are stored. */
INLINE int taken_as_stored(const struct tile *tile) {
    int stored = 1;
    for (int64_t s = 0; s < tile->streams; s++) {
        const struct weights *w = tile->weights[s];
        stored &= w->per_scale == 1 && w->encoding != SE_Q4_K && w->encoding != SE_Q6_K;
    }
    return stored;
}

INLINE struct groups stored_groups(const struct weights *w, int64_t row, __mmask16 mask) {
    return (struct groups){w, w->scales + row * w->scales_stride, w->biases + row * w->biases_stride, mask};
}

INLINE struct groups float_groups(const float *scales, const float *biases) {
    return (struct groups){NULL, (const uint8_t *)scales, (const uint8_t *)biases, 0xffff};
}

/* Sixteen groups from `at` on: the floats of load_groups (groups.h), by the same operations. Of groups that the row does
 * not have, finite ones: their digits are zeros. */
INLINE void sixteen_groups(__m512 *scale, __m512 *bias, const struct groups *from, int64_t at, struct kind kind) {
    const struct weights *w = from->stored;
    const __mmask16 mask = from->present;
    if (w == NULL) {
        *scale = load_values(from->scales + 4 * at, mask, SE_F32);
        *bias = load_values(from->biases + 4 * at, mask, SE_F32);
    } else if (kind.code == CODE_FP4) {
        if (kind.group_size == 32) {
            *scale = e8m0_vector(load_bytes(from->scales + at, mask));
        } else {
            const __m512 global = _mm512_set1_ps(dtype_float(SE_F32, from->biases, 0));
            *scale = _mm512_mul_ps(load_values(from->scales + at, mask, VALUE_FP8), _mm512_set1_ps(256.0f));
            *scale = w->encoding == SE_NVFP4_DIVIDE ? _mm512_div_ps(*scale, global) : _mm512_mul_ps(*scale, global);
            *scale = _mm512_maskz_mul_ps(mask, *scale, _mm512_set1_ps(0.5f));
        }
        *bias = _mm512_mul_ps(*scale, _mm512_set1_ps(-12.0f));
    } else {
        const int64_t byte = (w->dtype == SE_F32 ? 4 : 2) * at;
        *scale = load_values(from->scales + byte, mask, w->dtype);
        if (w->encoding == SE_AFFINE) {
            *bias = load_values(from->biases + byte, mask, w->dtype);
        } else if (w->encoding == SE_SYMMETRIC) {
            *bias = _mm512_mul_ps(*scale, _mm512_set1_ps(-(float)((largest_code(kind.code) + 1) / 2)));
        } else {
            const __m512 zeros = _mm512_cvtepi32_ps(load_bytes(from->biases + at, mask));
            *bias = _mm512_mul_ps(*scale, _mm512_sub_ps(_mm512_set1_ps(-0.0f), zeros));
        }
    }
}

#endif
