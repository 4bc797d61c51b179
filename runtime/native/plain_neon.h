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

/* PLAIN_LANES values of a row, of FP8 a 256th of them; what is none may be any number, but is the largest byte of a lane of
 * `largest`, whose signs are all set. */
INLINE void plain_values(float32x4_t *v, const uint8_t *values, uint8x16_t *largest, int value) {
    if (value != VALUE_FP8) {
        const int size = value == SE_F32 ? 4 : 2;
        UNROLL
        for (int i = 0; i < 8; i++) v[i] = load_values(values + 4 * i * size, value);
        return;
    }
    /* As f16, whose subnormals cost nothing: the sign twice, then its place is cleared. */
    UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8x16_t bytes = vld1q_u8(values + 16 * i);
        const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(vreinterpretq_s8_u8(bytes))), vmovl_high_s8(vreinterpretq_s8_u8(bytes))};
        UNROLL
        for (int j = 0; j < 2; j++) {
            const int16x8_t kept = vandq_s16(vshlq_n_s16(wide[j], 7), vdupq_n_s16((int16_t)0xbf80));
            v[4 * i + 2 * j] = vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_s16(kept)));
            v[4 * i + 2 * j + 1] = vcvt_high_f32_f16(vreinterpretq_f16_s16(kept));
        }
        *largest = vmaxq_u8(*largest, vorrq_u8(bytes, vdupq_n_u8(0x80)));
    }
}

/* One row times one or two operands. */
INLINE void plain_row(const struct weights *w, int64_t row, const uint8_t *const *operands, float *const *y,
                      int tokens, int value) {
    const int64_t columns = w->shape.columns, size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    const uint8_t *values = w->weight + row * w->weight_stride, *scales = w->scales + row * w->scales_stride;
    uint8_t copy[4 * PLAIN_LANES];
    float32x4_t sum[2][8];
    uint8x16_t largest = vdupq_n_u8(0);
    float scale = 0.0f;
    int64_t scaled = 0; /* columns before this one have had their scale */
    UNROLL
    for (int i = 0; i < 8 * tokens; i++) sum[i / 8][i % 8] = vdupq_n_f32(0);
    for (int64_t k = 0; k < columns; k += PLAIN_LANES) {
        const uint8_t *at = values + k * size;
        float32x4_t v[8];
        if (value == VALUE_FP8 && k == scaled) {
            scale = 256.0f * dtype_float(w->dtype, scales, 0);
            scales += w->dtype == SE_F32 ? 4 : 2;
            scaled += w->per_scale;
        }
        __builtin_prefetch(at + AHEAD_BYTES, 0, 0);
        if (columns - k < PLAIN_LANES) {
            memset(copy, 0, sizeof copy);
            at = memcpy(copy, at, (size_t)((columns - k) * size));
        }
        plain_values(v, at, &largest, value);
        UNROLL
        for (int i = 0; i < 8; i++) {
            if (value == VALUE_FP8) v[i] = vmulq_n_f32(v[i], scale);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                const float *x = (const float *)(const void *)operands[t] + k + 4 * i;
                sum[t][i] = vfmaq_f32(sum[t][i], v[i], vld1q_f32(x));
            }
        }
    }
    const bool number = value != VALUE_FP8 || vmaxvq_u8(largest) != UINT8_MAX;
    UNROLL
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) sum[t][i] = vaddq_f32(sum[t][i], sum[t][i + 4]);
        y[t][row] = number ? add_lanes(sum[t]) : NAN;
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
