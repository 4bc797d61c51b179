/* Plain weights times floats, for NEON: sums of 32 lanes as kernels.h has them. */
#ifndef SE_PLAIN_NEON_H
#define SE_PLAIN_NEON_H

#include "tiles_neon.h"

enum { QUADS = BLOCK_GROUPS / 4 };

/* The tree of kernels.h for the lanes of one row. */
INLINE float add_lanes(const float32x4_t *lanes) {
    float32x2_t q[4];
    UNROLL
    for (int i = 0; i < 4; i++) q[i] = vadd_f32(vget_low_f32(lanes[i]), vget_high_f32(lanes[i]));
    const float32x2_t halves = vpadd_f32(vpadd_f32(q[0], q[1]), vpadd_f32(q[2], q[3]));
    return vget_lane_f32(halves, 0) + vget_lane_f32(halves, 1);
}

/* Four values. FP8 is a small float whose exponent is moved; the one that is all ones is no number. */
INLINE float32x4_t load_values(const uint8_t *values, int value) {
    if (value == SE_F32) return vreinterpretq_f32_u8(vld1q_u8(values));
    if (value == VALUE_FP8) {
        uint32_t four;
        memcpy(&four, values, sizeof four);
        const uint32x4_t bits = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
        const uint32x4_t rest = vandq_u32(bits, vdupq_n_u32(0x7f)), sign = vshlq_n_u32(vandq_u32(bits, vdupq_n_u32(0x80)), 24);
        const float32x4_t small = vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(rest, 20), sign));
        return vbslq_f32(vceqq_u32(rest, vdupq_n_u32(0x7f)), vdupq_n_f32(NAN), vmulq_n_f32(small, 0x1p120f));
    }
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(values));
    if (value == SE_F16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}

/* Four values of a row, those of FP8 times a scale, as floats. */
INLINE void store_values(float *floats, const uint8_t *values, float scale, int value) {
    const float32x4_t v = load_values(values, value);
    vst1q_f32(floats, value == VALUE_FP8 ? vmulq_n_f32(v, scale) : v);
}

#include "tiles_plain.h"

/* One row times one or two operands. */
INLINE void plain_row(const struct weights *w, int64_t row, const uint8_t *const *operands, float *const *y,
                      int tokens, int value) {
    const int64_t columns = w->shape.columns, size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    const uint8_t *values = w->weight + row * w->weight_stride;
    uint8_t copy[4 * PLAIN_LANES];
    float32x4_t sum[2][8];
    UNROLL
    for (int i = 0; i < 8 * tokens; i++) sum[i / 8][i % 8] = vdupq_n_f32(0);
    for (int64_t k = 0; k < columns; k += PLAIN_LANES) {
        const uint8_t *at = values + k * size;
        float scale = 1.0f;
        if (value == VALUE_FP8) scale = dtype_float(w->dtype, w->scales + row * w->scales_stride, k / w->per_scale);
        __builtin_prefetch(at + AHEAD_BYTES, 0, 0);
        if (columns - k < PLAIN_LANES) {
            memset(copy, 0, sizeof copy);
            at = memcpy(copy, at, (size_t)((columns - k) * size));
        }
        UNROLL
        for (int i = 0; i < 8; i++) {
            float32x4_t v = load_values(at + 4 * i * size, value);
            if (value == VALUE_FP8) v = vmulq_n_f32(v, scale);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                const float *x = (const float *)(const void *)operands[t] + k + 4 * i;
                sum[t][i] = vfmaq_f32(sum[t][i], v, vld1q_f32(x));
            }
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) sum[t][i] = vaddq_f32(sum[t][i], sum[t][i + 4]);
        y[t][row] = add_lanes(sum[t]);
    }
}

INLINE void plain_tile(const struct tile *tile, int value) {
    if (tile->tokens > 2) { /* fewer do not make up for the turning */
        plain_tile_by_many(tile, value);
        return;
    }
    for (int s = 0; s < tile->streams; s++) {
        for (int64_t row = tile->first[s]; row < tile->first[s] + tile->rows; row++) {
            if (tile->tokens == 2) plain_row(tile->weights[s], row, tile->operands, tile->y[s], 2, value);
            if (tile->tokens == 1) plain_row(tile->weights[s], row, tile->operands, tile->y[s], 1, value);
        }
    }
}

#include "plain.h"

#endif
