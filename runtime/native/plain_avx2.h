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

/* One row of each stream times one or two operands: four vectors of lanes each. */
INLINE void plain_rows(const struct tile *tile, int64_t row, int streams, int tokens, int value) {
    const int64_t columns = tile->weights[0]->shape.columns;
    const bool near = tile->weights[0]->near;
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    __m256 lanes[MAX_STREAMS][2][4];
    __m256 scales[MAX_STREAMS] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t scaled[MAX_STREAMS] = {0}; /* columns that have had their scale */
    UNROLL
    for (int i = 0; i < 16; i++) lanes[i / 8][i / 4 % 2][i % 4] = _mm256_setzero_ps();
    for (int64_t k = 0; k < columns; k += PLAIN_LANES) {
        UNROLL
        for (int s = 0; s < streams; s++) {
            const struct weights *w = tile->weights[s];
            const uint8_t *values = w->weight + (tile->first[s] + row) * w->weight_stride + k * size;
            uint8_t copy[4 * PLAIN_LANES];
            if (columns - k < PLAIN_LANES) {
                memset(copy, 0, sizeof copy);
                values = memcpy(copy, values, (size_t)((columns - k) * size));
            }
            if (value == VALUE_FP8 && k == scaled[s]) {
                const uint8_t *stored = w->scales + (tile->first[s] + row) * w->scales_stride;
                scales[s] = _mm256_set1_ps(256.0f * dtype_float(w->dtype, stored, k / w->per_scale));
                scaled[s] += w->per_scale;
            }
            if (near) {
                UNROLL
                for (int i = 0; i < PLAIN_LANES * size; i += 64) _mm_prefetch(values + i + NEAR_BYTES, _MM_HINT_T0);
            } else {
                UNROLL
                for (int i = 0; i < PLAIN_LANES * size; i += 64) _mm_prefetch(values + i + AHEAD_BYTES, _MM_HINT_NTA);
            }
            const __m256i zero = _mm256_setzero_si256();
            __m256i halves[2] = {zero, zero}; /* values 0 to 7 and 16 to 23, 8 to 15 and 24 to 31 */
            if (value == VALUE_FP8) {
                const __m256i bytes = _mm256_loadu_si256((const void *)values);
                halves[0] = fp8_halves(_mm256_unpacklo_epi8(zero, bytes));
                halves[1] = fp8_halves(_mm256_unpackhi_epi8(zero, bytes));
            }
            UNROLL
            for (int i = 0; i < 4; i++) {
                __m256 v;
                if (value == VALUE_FP8) {
                    const __m256i pair = halves[i % 2];
                    v = _mm256_cvtph_ps(i < 2 ? _mm256_castsi256_si128(pair) : _mm256_extracti128_si256(pair, 1));
                    v = _mm256_mul_ps(v, scales[s]);
                } else {
                    v = load_values(values + 8 * i * size, value);
                }
                UNROLL
                for (int t = 0; t < tokens; t++) {
                    const float *x = (const float *)(const void *)tile->operands[t] + k + 8 * i;
                    lanes[s][t][i] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x), lanes[s][t][i]);
                }
            }
        }
    }
    UNROLL
    for (int s = 0; s < streams; s++) {
        UNROLL
        for (int t = 0; t < tokens; t++) {
            const __m256 *l = lanes[s][t];
            tile->y[s][t][tile->first[s] + row] =
                add_lanes(_mm256_add_ps(l[0], l[2]), _mm256_add_ps(l[1], l[3]));
        }
    }
}

INLINE void plain_tile(const struct tile *tile, int value) {
    if (tile->tokens > 2) { /* fewer do not make up for the turning */
        plain_tile_by_many(tile, value);
    } else {
        for (int64_t row = 0; row < tile->rows; row++) {
            if (tile->streams == 2 && tile->tokens == 2) plain_rows(tile, row, 2, 2, value);
            if (tile->streams == 2 && tile->tokens == 1) plain_rows(tile, row, 2, 1, value);
            if (tile->streams == 1 && tile->tokens == 2) plain_rows(tile, row, 1, 2, value);
            if (tile->streams == 1 && tile->tokens == 1) plain_rows(tile, row, 1, 1, value);
        }
    }
}

#include "plain.h"

#endif
