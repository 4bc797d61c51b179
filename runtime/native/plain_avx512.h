/* Plain weights, FP8 times its scale among them, for AVX-512. */
#ifndef SE_PLAIN_AVX512_H
#define SE_PLAIN_AVX512_H

#include "groups_avx512.h"

/* The tree of kernels.h for the lanes of one row. */
INLINE float add_lanes(__m512 v) {
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4e));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    return _mm512_cvtss_f32(_mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e)));
}

/* One row of each stream times `tokens` operands. */
INLINE void plain_rows(const struct tile *tile, int64_t row, int64_t token, int streams, int tokens, int value) {
    const int64_t columns = tile->weights[0]->shape.columns;
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    __m512 sum[MAX_STREAMS][4][2];
    const uint8_t *w[MAX_STREAMS];
    const float *x[4];
    UNROLL
    for (int s = 0; s < streams; s++) {
        w[s] = tile->weights[s]->weight + (tile->first[s] + row) * tile->weights[s]->weight_stride;
        UNROLL
        for (int t = 0; t < tokens; t++) sum[s][t][0] = sum[s][t][1] = _mm512_setzero_ps();
    }
    UNROLL
    for (int t = 0; t < tokens; t++) x[t] = (const float *)(const void *)tile->operands[token + t];
    for (int64_t k = 0; k < columns; k += PLAIN_LANES) {
        UNROLL
        for (int s = 0; s < streams; s++) {
            __m512 scale = _mm512_setzero_ps();
            if (value == VALUE_FP8) {
                const struct weights *fp8 = tile->weights[s];
                const uint8_t *scales = fp8->scales + (tile->first[s] + row) * fp8->scales_stride;
                scale = _mm512_set1_ps(256.0f * dtype_float(fp8->dtype, scales, k / fp8->per_scale));
            }
            _mm_prefetch(w[s] + k * size + AHEAD_BYTES, _MM_HINT_T1);
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int64_t at = k + 16 * half;
                __m512 v = load_values(w[s] + at * size, present(columns - at), value);
                if (value == VALUE_FP8) v = _mm512_mul_ps(v, scale);
                UNROLL
                for (int t = 0; t < tokens; t++) {
                    sum[s][t][half] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x[t] + at), sum[s][t][half]);
                }
            }
        }
    }
    UNROLL
    for (int s = 0; s < streams; s++) {
        UNROLL
        for (int t = 0; t < tokens; t++) {
            tile->y[s][token + t][tile->first[s] + row] = add_lanes(_mm512_add_ps(sum[s][t][0], sum[s][t][1]));
        }
    }
}

INLINE void plain_tile(const struct tile *tile, int value) {
    for (int64_t row = 0; row < tile->rows; row++) {
        int64_t token = 0;
        if (tile->streams == 2) {
            for (; token + 4 <= tile->tokens; token += 4) plain_rows(tile, row, token, 2, 4, value);
            for (; token < tile->tokens; token++) plain_rows(tile, row, token, 2, 1, value);
        } else {
            for (; token + 4 <= tile->tokens; token += 4) plain_rows(tile, row, token, 1, 4, value);
            for (; token < tile->tokens; token++) plain_rows(tile, row, token, 1, 1, value);
        }
    }
}

static void plain_bf16(const struct tile *tile) {
    plain_tile(tile, SE_BF16);
}

static void plain_f16(const struct tile *tile) {
    plain_tile(tile, SE_F16);
}

static void plain_f32(const struct tile *tile) {
    plain_tile(tile, SE_F32);
}

static void plain_fp8(const struct tile *tile) {
    plain_tile(tile, VALUE_FP8);
}

#endif
