/* Loops over one row: norms, element by element, rotation, convolution. Included by loops_all.h. */
#ifndef SE_LOOPS_ROWS_H
#define SE_LOOPS_ROWS_H

#include "loops.h"

static inline float sum_of_squares(const float *x, int64_t n) {
    lanes sum = lanes_all(0.0f);
    float lane[LANES];
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        lanes v = lanes_load(x + k);
        sum = lanes_fma(v, v, sum);
    }
    lanes_store(lane, sum);
    for (int i = 0; k + i < n; i++) lane[i] = fmaf(x[k + i], x[k + i], lane[i]);
    return lanes_sum(lane);
}

static void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    float root = sqrtf(sum_of_squares(x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] / root * weight[i];
}

static void scaled_norm(float *x, const float *weight, float eps, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * weight[i];
    float root = sqrtf(sum_of_squares(x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / root;
}

static void l2_norm(const float *x, float eps, float scale, int64_t n, float *y) {
    float root = sqrtf(sum_of_squares(x, n) + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] / root * scale;
}

static void map(int32_t map, const float *x, int64_t n, float *y) {
    switch (map) {
    case SE_MAP_SIGMOID:
        for (int64_t i = 0; i < n; i++) y[i] = sigmoid(x[i]);
        break;
    default:
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * sigmoid(x[i]);
    }
}

static void rotate(const float *x, const float *cosine, const float *sine, int64_t half, int64_t d, int32_t interleaved,
                   float *y) {
    for (int64_t i = 0; i < half; i++) {
        const int64_t one = interleaved ? 2 * i : i, other = interleaved ? 2 * i + 1 : half + i;
        const float first = x[one], second = x[other];
        y[one] = first * cosine[i] - second * sine[i];
        y[other] = second * cosine[i] + first * sine[i];
    }
    memcpy(y + 2 * half, x + 2 * half, (size_t)(d - 2 * half) * sizeof *y);
}

static float largest(const float *x, int64_t n) {
    float lane[LANES], top = -INFINITY;
    int64_t k = 0;
    for (int i = 0; i < LANES; i++) lane[i] = top;
    for (; k + LANES <= n; k += LANES) {
        for (int i = 0; i < LANES; i++) lane[i] = x[k + i] > lane[i] ? x[k + i] : lane[i];
    }
    for (; k < n; k++) top = x[k] > top ? x[k] : top;
    for (int i = 0; i < LANES; i++) top = lane[i] > top ? lane[i] : top;
    return top;
}

static float exponents(float *x, float largest, int64_t n) {
    lanes sum = lanes_all(0.0f);
    float lane[LANES];
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) x[i] = exp_nonpositive(x[i] - largest);
    for (; k + LANES <= n; k += LANES) sum = lanes_add(sum, lanes_load(x + k));
    lanes_store(lane, sum);
    for (int i = 0; k + i < n; i++) lane[i] += x[k + i];
    return lanes_sum(lane);
}

static void convolve(const float *const *inputs, const float *taps, int64_t kernel, int64_t channels, float *y) {
    memset(y, 0, (size_t)channels * sizeof *y);
    for (int64_t j = 0; j < kernel; j++) {
        const float *x = inputs[j], *tap = taps + j * channels;
        for (int64_t c = 0; c < channels; c++) {
            float product = tap[c] * x[c];
            y[c] += product;
        }
    }
}

#endif
