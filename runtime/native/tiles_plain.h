/* Plain weights times several operands: rows stand in lanes, and each of the 32 lanes that kernels.h has for a row is a
 * vector of rows, which stays in registers for a slice of columns. turn_block and store_values are the instruction set's. */
#ifndef SE_TILES_PLAIN_H
#define SE_TILES_PLAIN_H

#include "lanes.h"
#include "straight.h"

enum {
    PLAIN_TOKENS = 64, /* whose sums are kept at a time */
    PLAIN_STEPS = 8,   /* of PLAIN_LANES columns */
    PLAIN_SLICE = PLAIN_STEPS * PLAIN_LANES,
    PLAIN_OPERANDS = 4, /* that share each load of weights */
};

/* Columns k..k + n of a row as floats, zeros behind them up to whole steps. */
INLINE void plain_floats(const struct weights *w, int64_t row, int64_t k, int64_t n, int value, float *floats) {
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    const uint8_t *values = w->weight + row * w->weight_stride + k * size;
    uint8_t copy[4 * PLAIN_LANES];
    float scale = 1.0f;
    for (int64_t i = 0, scaled = 0; i < n; i += PLAIN_LANES) { /* columns before `scaled` have the scale */
        const uint8_t *some = values + i * size;
        if (n - i < PLAIN_LANES) {
            memset(copy, 0, sizeof copy);
            some = memcpy(copy, some, (size_t)((n - i) * size));
        }
        if (value == VALUE_FP8 && i == scaled) {
            const int64_t at = (k + i) / w->per_scale;
            scale = dtype_float(w->dtype, w->scales + row * w->scales_stride, at);
            scaled = (at + 1) * w->per_scale - k;
        }
        UNROLL
        for (int j = 0; j < PLAIN_LANES; j += VECTOR_ROWS) store_values(floats + i + j, some + j * size, scale, value);
    }
}

/* A slice of LANES rows, of which the last may stand for those that do not exist. slice: by lane of a row, and step */
INLINE void turn_plain(float (*slice)[PLAIN_STEPS][LANES], const struct weights *w, int64_t first, int64_t rows, int64_t k,
                       int64_t n, int value) {
    _Alignas(64) float floats[VECTOR_ROWS][PLAIN_SLICE];
    const uint8_t *row[VECTOR_ROWS];
    for (int64_t v = 0; v < LANES; v += VECTOR_ROWS) {
        for (int64_t r = 0; r < VECTOR_ROWS; r++) {
            plain_floats(w, first + (v + r < rows ? v + r : rows - 1), k, n, value, floats[r]);
            row[r] = (const uint8_t *)floats[r];
        }
        for (int64_t c = 0; c < n; c += VECTOR_ROWS) {
            turn_block(slice[c % PLAIN_LANES][c / PLAIN_LANES] + v, PLAIN_STEPS * LANES, row, c);
        }
    }
}

/* sums [operands][PLAIN_LANES][LANES] += a slice times some operands, from column k on. */
INLINE void plain_by_many(float (*sums)[PLAIN_LANES][LANES], const float (*slice)[PLAIN_STEPS][LANES], const float *const *x,
                          int operands, int64_t k, int64_t steps) {
    for (int64_t j = 0; j < PLAIN_LANES; j++) {
        lanes sum[PLAIN_OPERANDS];
        UNROLL
        for (int o = 0; o < operands; o++) sum[o] = k == 0 ? lanes_all(0.0f) : lanes_load(sums[o][j]);
        for (int64_t i = 0; i < steps; i++) {
            const lanes w = lanes_load(slice[j][i]);
            UNROLL
            for (int o = 0; o < operands; o++) sum[o] = lanes_fma(w, lanes_all(x[o][k + PLAIN_LANES * i + j]), sum[o]);
        }
        UNROLL
        for (int o = 0; o < operands; o++) lanes_store(sums[o][j], sum[o]);
    }
}

/* The 32 lanes of some rows to the tree of kernels.h. */
APART void add_plain(float *y, const float (*sums)[LANES], int64_t rows) {
    float all[LANES], lane[LANES];
    for (int r = 0; r < LANES; r++) {
        for (int i = 0; i < LANES; i++) lane[i] = sums[i][r] + sums[LANES + i][r];
        all[r] = lanes_sum(lane);
    }
    memcpy(y, all, (size_t)rows * sizeof *y);
}

/* All rows of all streams times all tokens. */
INLINE void plain_tile_by_many(const struct tile *tile, int value) {
    _Alignas(64) float sums[PLAIN_TOKENS][PLAIN_LANES][LANES], slice[PLAIN_LANES][PLAIN_STEPS][LANES];
    const int64_t columns = tile->weights[0]->shape.columns;
    for (int64_t s = 0; s < tile->streams; s++) {
        for (int64_t first = 0; first < tile->rows; first += LANES) {
            const int64_t rows = tile->rows - first < LANES ? tile->rows - first : LANES;
            for (int64_t token = 0; token < tile->tokens; token += PLAIN_TOKENS) {
                const int64_t left = tile->tokens - token, tokens = left < PLAIN_TOKENS ? left : PLAIN_TOKENS;
                const float *x[PLAIN_TOKENS];
                for (int64_t t = 0; t < tokens; t++) x[t] = (const float *)(const void *)tile->operands[token + t];
                for (int64_t k = 0; k < columns; k += PLAIN_SLICE) {
                    const int64_t n = columns - k < PLAIN_SLICE ? columns - k : PLAIN_SLICE;
                    const int64_t steps = (n + PLAIN_LANES - 1) / PLAIN_LANES;
                    turn_plain(slice, tile->weights[s], tile->first[s] + first, rows, k, n, value);
                    int64_t t = 0;
                    for (; t + PLAIN_OPERANDS <= tokens; t += PLAIN_OPERANDS) {
                        plain_by_many(sums + t, (void *)slice, x + t, PLAIN_OPERANDS, k, steps);
                    }
                    for (; t + 2 <= tokens; t += 2) plain_by_many(sums + t, (void *)slice, x + t, 2, k, steps);
                    for (; t < tokens; t++) plain_by_many(sums + t, (void *)slice, x + t, 1, k, steps);
                }
                for (int64_t t = 0; t < tokens; t++) {
                    add_plain(tile->y[s][token + t] + tile->first[s] + first, (void *)sums[t], rows);
                }
            }
        }
    }
}

#endif
