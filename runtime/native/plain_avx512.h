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

/* Two vectors as four halves in memory: to turn f16 to floats takes one instruction that loads, and two that do not. */
INLINE const __m256i *in_memory(__m512i (*vectors)[2]) {
#ifndef SE_EMULATED
    __asm__("" : "+m"(*vectors));
#endif
    return (const __m256i *)*vectors;
}

/* 64 values of FP8, a 256th of each; what is none may be any number, but is the largest byte of a lane of `largest`, whose
 * signs are all set. */
INLINE void fp8_values(__m512 *v, __m512i bytes, __m512i *largest) {
    *largest = _mm512_max_epu8(*largest, _mm512_or_si512(bytes, _mm512_set1_epi8(INT8_MIN)));
#if defined(SE_VBMI)
    /* Both bytes of a bf16 are looked up by the bits without the sign: subnormals, numbers, and what is none. First the
     * bytes are placed so that they meet as 32-bit lanes of two columns that are 16 apart. */
#define DOWN 0, 16, 32, 48, 64, 80, 96, 112
#define UP 128, 144, 160, 176, 192, 208, 224
#define EIGHT(x) x, x, x, x, x, x, x, x
#define LANE(i) 0x11011000 + 0x01010101 * (i)
    static const uint8_t low[128] = {0, 0, 128, 192, 0, 32, 64, 96, UP, 240, DOWN, UP, 240, DOWN, UP, 240, DOWN, UP, 240,
                                     DOWN, UP, 240, DOWN, UP, 240, DOWN, UP, 240, DOWN, UP, 192};
    static const uint8_t high[128] = {0, 55, 55, 55, 56, 56, 56, 56, EIGHT(56), EIGHT(57), EIGHT(57), EIGHT(58),
                                      EIGHT(58), EIGHT(59), EIGHT(59), EIGHT(60), EIGHT(60), EIGHT(61), EIGHT(61),
                                      EIGHT(62), EIGHT(62), 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 127};
    const __m512i places = _mm512_setr_epi32(LANE(0), LANE(2), LANE(32), LANE(34), LANE(4), LANE(6), LANE(36), LANE(38),
                                             LANE(8), LANE(10), LANE(40), LANE(42), LANE(12), LANE(14), LANE(44), LANE(46));
#undef DOWN
#undef UP
#undef EIGHT
#undef LANE
    const __m512i x = _mm512_permutexvar_epi8(places, bytes), top = _mm512_set1_epi8(INT8_MIN);
    const __m512i lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(low), x, _mm512_loadu_si512(low + 64));
    const __m512i rest = _mm512_permutex2var_epi8(_mm512_loadu_si512(high), x, _mm512_loadu_si512(high + 64));
    const __m512i upper = _mm512_ternarylogic_epi32(rest, x, top, 0xf8); /* rest | (x & top) */
    const __m512i pairs[2] = {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
    UNROLL
    for (int i = 0; i < 2; i++) {
        v[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
        v[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], _mm512_set1_epi32((int)0xffff0000)));
    }
#else
    /* As f16, whose subnormals cost nothing: the sign twice, then its place is cleared. */
    __m512i halves[2] = {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)),
                         _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1))};
    UNROLL
    for (int i = 0; i < 2; i++) {
        halves[i] = _mm512_and_si512(_mm512_slli_epi16(halves[i], 7), _mm512_set1_epi16((int16_t)0xbf80));
    }
    const __m256i *quarters = in_memory(&halves);
    UNROLL
    for (int i = 0; i < 4; i++) v[i] = _mm512_cvtph_ps(_mm256_load_si256(quarters + i));
#endif
}

/* Columns that plain_values takes at a time. */
INLINE int plain_step(int value) {
    return value == VALUE_FP8 ? 2 * PLAIN_LANES : PLAIN_LANES;
}

/* plain_step values of a row, zeros behind the `left` that it has; of FP8 a 256th of them (fp8_values). */
INLINE void plain_values(__m512 *v, const uint8_t *values, int64_t left, int value, __m512i *largest) {
    if (value == VALUE_FP8) {
        const __mmask64 mask = left >= 64 ? UINT64_MAX : ((uint64_t)1 << left) - 1;
        fp8_values(v, left >= 64 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi8(mask, values), largest);
    } else {
        v[0] = load_values(values, present(left), value);
        v[1] = load_values(values + (value == SE_F32 ? 64 : 32), present(left - 16), value);
    }
}

/* One row of each stream times `tokens` operands. */
INLINE void plain_rows(const struct tile *tile, int64_t row, int64_t token, int streams, int tokens, int value) {
    const int64_t columns = tile->weights[0]->shape.columns;
    const bool near = tile->weights[0]->near;
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    __m512 sum[MAX_STREAMS][4][2], scale[MAX_STREAMS];
    __m512i largest[MAX_STREAMS];
    int64_t scaled[MAX_STREAMS] = {0}; /* columns before this one have the scale */
    const uint8_t *w[MAX_STREAMS], *scales[MAX_STREAMS];
    const float *x[4];
    UNROLL
    for (int s = 0; s < streams; s++) {
        w[s] = tile->weights[s]->weight + (tile->first[s] + row) * tile->weights[s]->weight_stride;
        scales[s] = tile->weights[s]->scales + (tile->first[s] + row) * tile->weights[s]->scales_stride;
        scale[s] = _mm512_setzero_ps();
        largest[s] = _mm512_setzero_si512();
        UNROLL
        for (int t = 0; t < tokens; t++) sum[s][t][0] = sum[s][t][1] = _mm512_setzero_ps();
    }
    UNROLL
    for (int t = 0; t < tokens; t++) x[t] = (const float *)(const void *)tile->operands[token + t];
    for (int64_t k = 0; k < columns; k += plain_step(value)) {
        UNROLL
        for (int s = 0; s < streams; s++) {
            __m512 v[4];
            if (near) {
                _mm_prefetch(w[s] + k * size + NEAR_BYTES, _MM_HINT_T0);
            } else {
                _mm_prefetch(w[s] + k * size + AHEAD_BYTES, _MM_HINT_T1);
            }
            plain_values(v, w[s] + k * size, columns - k, value, &largest[s]);
            UNROLL
            for (int i = 0; i < plain_step(value) / 16; i++) {
                const int64_t at = k + 16 * i;
                if (i == 2 && at >= columns) break;
                if (value == VALUE_FP8 && i % 2 == 0 && at == scaled[s]) {
                    const struct weights *fp8 = tile->weights[s];
                    scale[s] = _mm512_set1_ps(256.0f * dtype_float(fp8->dtype, scales[s], 0));
                    scales[s] += fp8->dtype == SE_F32 ? 4 : 2;
                    scaled[s] += fp8->per_scale;
                }
                if (value == VALUE_FP8) v[i] = _mm512_mul_ps(v[i], scale[s]);
                UNROLL
                for (int t = 0; t < tokens; t++) {
                    sum[s][t][i % 2] = _mm512_fmadd_ps(v[i], _mm512_loadu_ps(x[t] + at), sum[s][t][i % 2]);
                }
            }
        }
    }
    UNROLL
    for (int s = 0; s < streams; s++) {
        const bool number = value != VALUE_FP8 || _mm512_cmpeq_epi8_mask(largest[s], _mm512_set1_epi8(-1)) == 0;
        UNROLL
        for (int t = 0; t < tokens; t++) {
            if (!number) sum[s][t][0] = _mm512_set1_ps(NAN);
            tile->y[s][token + t][tile->first[s] + row] = add_lanes(_mm512_add_ps(sum[s][t][0], sum[s][t][1]));
        }
    }
}

/* Rows first..first + rows of all streams times all tokens, four at a time. */
INLINE void plain_rows_by_all(const struct tile *tile, int64_t first, int64_t rows, int streams, int value) {
    int64_t token = 0;
    for (; token + 4 <= tile->tokens; token += 4) {
        for (int64_t row = first; row < first + rows; row++) plain_rows(tile, row, token, streams, 4, value);
    }
    for (; token < tile->tokens; token++) {
        for (int64_t row = first; row < first + rows; row++) plain_rows(tile, row, token, streams, 1, value);
    }
}

/* A few rows stay in the second-level cache while all tokens pass by. */
INLINE void plain_tile(const struct tile *tile, int value) {
    for (int64_t first = 0; first < tile->rows; first += TILE_ROWS) {
        const int64_t rows = tile->rows - first < TILE_ROWS ? tile->rows - first : TILE_ROWS;
        if (tile->streams == 2) {
            plain_rows_by_all(tile, first, rows, 2, value);
        } else {
            plain_rows_by_all(tile, first, rows, 1, value);
        }
    }
}

#include "plain.h"

#endif
