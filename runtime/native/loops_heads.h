/* Rows of a weight matrix as floats, and their products with one input. Included by loops_all.h. */
#ifndef SE_LOOPS_HEADS_H
#define SE_LOOPS_HEADS_H

#include "groups.h"
#include "loops_rows.h"

enum { SIDE = 4 }; /* rows, or lanes of a result, whose sums run side by side */

static void decode_coded(const struct weights *w, int64_t row, float *values) {
    const struct shape *shape = &w->shape;
    const int64_t n = shape->group_size, groups = shape->columns / n;
    const uint8_t *packed = w->weight + row * w->weight_stride;
    float scales[CHUNK_GROUPS], biases[CHUNK_GROUPS];
    uint8_t codes[128];
    for (int64_t g = 0; g < groups; g++) {
        const int64_t chunk = g / CHUNK_GROUPS * CHUNK_GROUPS, left = groups - chunk;
        if (g == chunk) load_groups(w, row, g, left < CHUNK_GROUPS ? left : CHUNK_GROUPS, scales, biases);
        if (shape->code == CODE_8) {
            memcpy(codes, packed + g * n, (size_t)n);
        } else if (shape->code == CODE_4) {
            for (int64_t i = 0; i < n / 2; i++) {
                const uint8_t two = packed[g * n / 2 + i];
                codes[2 * i] = two & 15;
                codes[2 * i + 1] = two >> 4;
            }
        } else {
            unpack_codes(shape->code, packed, g * n, n, codes);
        }
        const float scale = scales[g - chunk], bias = biases[g - chunk];
        for (int64_t i = 0; i < n; i++) values[g * n + i] = fmaf(scale, (float)codes[i], bias);
    }
}

static void decode_rows(const struct weights *w, int64_t first, int64_t rows, float *values) {
    const int64_t columns = w->shape.columns;
    for (int64_t row = first; row < first + rows; row++, values += columns) {
        const uint8_t *stored = w->weight + row * w->weight_stride, *scales = w->scales + row * w->scales_stride;
        if (w->encoding == SE_PLAIN) {
            to_floats(w->dtype, stored, columns, values);
        } else if (w->encoding == SE_FP8) {
            for (int64_t i = 0; i < columns; i++) {
                values[i] = e4m3_float(stored[i]) * dtype_float(w->dtype, scales, i / w->per_scale);
            }
        } else {
            decode_coded(w, row, values);
        }
    }
}

/* y [columns] += sum over rows, in order, of x[row] * values[row]. */
static void add_rows(const float *values, int64_t rows, int64_t columns, const float *x, float *y) {
    int64_t i = 0;
    for (; i + SIDE * LANES <= columns; i += SIDE * LANES) {
        lanes sum[SIDE];
        for (int s = 0; s < SIDE; s++) sum[s] = lanes_load(y + i + s * LANES);
        for (int64_t r = 0; r < rows; r++) {
            const lanes factor = lanes_all(x[r]);
            const float *row = values + r * columns + i;
            for (int s = 0; s < SIDE; s++) sum[s] = lanes_fma(factor, lanes_load(row + s * LANES), sum[s]);
        }
        for (int s = 0; s < SIDE; s++) lanes_store(y + i + s * LANES, sum[s]);
    }
    for (; i < columns; i++) {
        for (int64_t r = 0; r < rows; r++) y[i] = fmaf(x[r], values[r * columns + i], y[i]);
    }
}

/* y [rows] = values . x: column i goes to lane i mod 16 in order of i. */
static void dot_rows(const float *values, int64_t rows, int64_t columns, const float *x, float *y) {
    for (int64_t r = 0; r < rows; r += SIDE) {
        const int64_t side = rows - r < SIDE ? rows - r : SIDE;
        float lane[SIDE][LANES];
        lanes sum[SIDE];
        const float *row[SIDE];
        int64_t i = 0;
        for (int s = 0; s < SIDE; s++) {
            sum[s] = lanes_all(0.0f);
            row[s] = values + (r + (s < side ? s : 0)) * columns;
        }
        for (; i + LANES <= columns; i += LANES) {
            const lanes factor = lanes_load(x + i);
            for (int s = 0; s < SIDE; s++) sum[s] = lanes_fma(factor, lanes_load(row[s] + i), sum[s]);
        }
        for (int s = 0; s < side; s++) {
            lanes_store(lane[s], sum[s]);
            for (int64_t j = i; j < columns; j++) lane[s][j - i] = fmaf(x[j], row[s][j], lane[s][j - i]);
            y[r + s] = lanes_sum(lane[s]);
        }
    }
}

#endif
