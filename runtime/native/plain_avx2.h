/* Plain weights times floats, for AVX2: sums of 32 lanes as kernels.h has them. */
#ifndef SE_PLAIN_AVX2_H
#define SE_PLAIN_AVX2_H

#include "tiles_avx2.h"

/* Eight values of a row, those of FP8 times a scale, as floats. */
INLINE void store_values(float *floats, const uint8_t *values, float scale, int value) {
    const __m256 v = load_values(values, value);
    _mm256_store_ps(floats, value == VALUE_FP8 ? _mm256_mul_ps(v, _mm256_set1_ps(256.0f * scale)) : v);
}

#include "tiles_plain.h"

/* The tree of kernels.h: lanes 0..7 and 8..15. */
INLINE float add_lanes(__m256 low, __m256 high) {
    low = _mm256_add_ps(low, _mm256_shuffle_ps(low, low, 0x4e));
    high = _mm256_add_ps(high, _mm256_shuffle_ps(high, high, 0x4e));
    low = _mm256_add_ps(low, _mm256_shuffle_ps(low, low, 0xb1));
    high = _mm256_add_ps(high, _mm256_shuffle_ps(high, high, 0xb1));
    const __m128 first = _mm_add_ss(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    const __m128 second = _mm_add_ss(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
    return _mm_cvtss_f32(_mm_add_ss(first, second));
}

/* PLAIN_LANES values of a row, of FP8 a 256th of them; what is none may be any number, but is the largest byte of a lane of
 * `largest`, whose signs are all set. */
INLINE void plain_values(__m256 *v, const uint8_t *values, __m256i *largest, int value) {
    if (value != VALUE_FP8) {
        const int size = value == SE_F32 ? 4 : 2;
        UNROLL
        for (int i = 0; i < 4; i++) v[i] = load_values(values + 8 * i * size, value);
        return;
    }
    /* As f16, whose subnormals cost nothing: the sign twice, then its place is cleared. To turn f16 to floats takes one
     * instruction that loads, and two that do not. */
    const __m256i bytes = _mm256_loadu_si256((const void *)values), kept = _mm256_set1_epi16((int16_t)0xbf80);
    __m256i halves[2] = {_mm256_and_si256(_mm256_srai_epi16(_mm256_unpacklo_epi8(bytes, bytes), 1), kept),
                         _mm256_and_si256(_mm256_srai_epi16(_mm256_unpackhi_epi8(bytes, bytes), 1), kept)};
#ifndef SE_EMULATED
    __asm__("" : "+m"(halves)); /* in memory */
#endif
    UNROLL
    for (int i = 0; i < 4; i++) v[i] = _mm256_cvtph_ps(_mm_load_si128((const __m128i *)&halves[i % 2] + i / 2));
    *largest = _mm256_max_epu8(*largest, _mm256_or_si256(bytes, _mm256_set1_epi8(INT8_MIN)));
}

/* A row of a stream, and what its products come to: eight vectors of lanes for one operand of two streams, or for two of one,
 * stay in registers, unless a loop calls a function. */
struct plain_row {
    const struct weights *weights;
    const uint8_t *values, *scales;
    int64_t scaled; /* columns before this one have had their scale */
    __m256 scale;
    __m256i largest;
    __m256 lanes[2][4]; /* of each operand */
};

/* PLAIN_LANES columns from k on, which lie at `values`. */
INLINE void plain_columns(struct plain_row *row, const uint8_t *values, const uint8_t *const *operands, int64_t k, int tokens,
                          int value) {
    __m256 v[4];
    if (value == VALUE_FP8 && k == row->scaled) {
        row->scale = _mm256_set1_ps(256.0f * dtype_float(row->weights->dtype, row->scales, 0));
        row->scales += row->weights->dtype == SE_F32 ? 4 : 2;
        row->scaled += row->weights->per_scale;
    }
    plain_values(v, values, &row->largest, value);
    UNROLL
    for (int t = 0; t < tokens; t++) {
        const float *x = opaque((const float *)(const void *)operands[t] + k);
        UNROLL
        for (int i = 0; i < 4; i++) {
            const __m256 own = value == VALUE_FP8 ? _mm256_mul_ps(v[i], row->scale) : v[i];
            row->lanes[t][i] = _mm256_fmadd_ps(own, _mm256_loadu_ps(x + 8 * i), row->lanes[t][i]);
        }
    }
}

/* Row `at` of so many streams from `first` on, times one or two operands. */
INLINE void plain_rows(const struct tile *tile, int first, int64_t at, int streams, int tokens, int value) {
    const int64_t columns = tile->weights[0]->shape.columns, whole = columns / PLAIN_LANES * PLAIN_LANES;
    const bool near = tile->weights[0]->near;
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    struct plain_row rows[MAX_STREAMS];
    UNROLL
    for (int s = 0; s < streams; s++) {
        const struct weights *w = tile->weights[first + s];
        const int64_t number = tile->first[first + s] + at;
        rows[s] = (struct plain_row){.weights = w, .values = w->weight + number * w->weight_stride,
                                     .scales = w->scales + number * w->scales_stride};
    }
    for (int64_t k = 0; k < whole; k += PLAIN_LANES) {
        UNROLL
        for (int s = 0; s < streams; s++) {
            const uint8_t *values = rows[s].values + k * size;
            if (near) {
                UNROLL
                for (int i = 0; i < PLAIN_LANES * size; i += 64) _mm_prefetch(values + i + NEAR_BYTES, _MM_HINT_T0);
            } else {
                UNROLL
                for (int i = 0; i < PLAIN_LANES * size; i += 64) _mm_prefetch(values + i + AHEAD_BYTES, _MM_HINT_NTA);
            }
            plain_columns(&rows[s], values, tile->operands, k, tokens, value);
        }
    }
    UNROLL
    for (int s = 0; s < streams; s++) {
        struct plain_row *row = &rows[s];
        if (whole < columns) {
            uint8_t copy[4 * PLAIN_LANES] = {0};
            memcpy(copy, row->values + whole * size, (size_t)((columns - whole) * size));
            plain_columns(row, copy, tile->operands, whole, tokens, value);
        }
        const __m256i none = _mm256_cmpeq_epi8(row->largest, _mm256_set1_epi8(-1));
        UNROLL
        for (int t = 0; t < tokens; t++) {
            __m256 *l = row->lanes[t];
            if (value == VALUE_FP8 && _mm256_movemask_epi8(none) != 0) l[0] = _mm256_set1_ps(NAN);
            tile->y[first + s][t][tile->first[first + s] + at] =
                add_lanes(_mm256_add_ps(l[0], l[2]), _mm256_add_ps(l[1], l[3]));
        }
    }
}

INLINE void plain_tile(const struct tile *tile, int value) {
    if (tile->tokens > 2) { /* fewer do not make up for the turning */
        plain_tile_by_many(tile, value);
        return;
    }
    for (int64_t row = 0; row < tile->rows; row++) {
        if (tile->streams == 2 && tile->tokens == 1) {
            plain_rows(tile, 0, row, 2, 1, value);
            continue;
        }
        for (int s = 0; s < tile->streams; s++) {
            if (tile->tokens == 2) {
                plain_rows(tile, s, row, 1, 2, value);
            } else {
                plain_rows(tile, s, row, 1, 1, value);
            }
        }
    }
}

#include "plain.h"

#endif
