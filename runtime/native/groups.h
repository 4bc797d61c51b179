/* What encodings store for the scales and biases of groups, as floats: w = scale * code + bias (kernels.h).
 *
 * Plain loops that a compiler turns into any instruction set, included by elementwise.h; every product below is one
 * float operation, so the floats are the same everywhere. A symmetric code is biased by its middle, which no rounding
 * touches. Where a scale serves more columns than a kernel's group, several groups share it. */
#ifndef SE_GROUPS_H
#define SE_GROUPS_H

#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* Codes first..first + n of a row. */
static inline void unpack_codes(int code, const uint8_t *packed, int64_t first, int64_t n, uint8_t *codes) {
    const int width = code_width(code);
    for (int64_t i = 0; i < n; i++) {
        const int64_t bit = (first + i) * width, shift = bit % 8;
        uint32_t bits = packed[bit / 8];
        if (shift + width > 8) bits |= (uint32_t)packed[bit / 8 + 1] << 8;
        codes[i] = (uint8_t)(bits >> shift & ((1u << width) - 1));
        if (code >= CODE_FP4) codes[i] = CODE_INTEGERS[code - CODE_FP4][codes[i]];
    }
}

/* n floats from values of a dtype. */
static void to_floats(int32_t dtype, const uint8_t *values, int64_t n, float *floats) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; dtype == SE_F16 && i + 8 <= n; i += 8) {
        _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(values + 2 * i))));
    }
#elif defined(__ARM_NEON)
    for (; dtype == SE_F16 && i + 4 <= n; i += 4) {
        vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(values + 2 * i))));
    }
#endif
    if (dtype == SE_BF16) {
        for (; i < n; i++) {
            uint16_t half;
            memcpy(&half, values + 2 * i, sizeof half);
            floats[i] = bf16_float(half);
        }
    }
    for (; i < n; i++) floats[i] = dtype_float(dtype, values, i);
}

/* The stored scales of groups first..first + n of a row. */
static inline void stored_scales(const struct weights *w, const uint8_t *row, int64_t first, int64_t n, float *scales) {
    if (w->per_scale == 1) {
        to_floats(w->dtype, row + first * (w->dtype == SE_F32 ? 4 : 2), n, scales);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = (first + i) / w->per_scale;
        scales[i] = i > 0 && at == (first + i - 1) / w->per_scale ? scales[i - 1] : dtype_float(w->dtype, row, at);
    }
}

/* 2 ** (exponent - 128), half of what E8M0 means, for codes are twice the value; 255 is no number. In vectors for all
 * that are normal floats, as they always are, and then again if one was not. */
static void e8m0_halves(const uint8_t *exponents, int64_t n, float *scales) {
    int rare = 0;
    for (int64_t i = 0; i < n; i++) {
        scales[i] = bits_float((uint32_t)(exponents[i] - 1) << 23);
        rare |= (exponents[i] < 2) | (exponents[i] == 255);
    }
    for (int64_t i = 0; i < n && rare; i++) {
        if (exponents[i] < 2) scales[i] = bits_float(0x200000u << exponents[i]);
        if (exponents[i] == 255) scales[i] = bits_float(0x7fc00000u);
    }
}

/* Eight numbers of 6 bits from the low 48 bits, as bytes. */
static inline uint64_t six_to_eight(uint64_t bits) {
    bits = (bits & 0xffffff) | (bits & 0xffffff000000) << 8;
    bits = (bits & 0x00000fff00000fff) | (bits & 0x00fff00000fff000) << 4;
    return (bits & 0x003f003f003f003f) | (bits & 0x0fc00fc00fc00fc0) << 2;
}

/* One superblock of Q4_K or Q5_K: its three words are 8 scales, then 8 mins. */
static inline void q4_k_groups(const uint8_t *words, float d, float dmin, float *scales, float *biases) {
    uint64_t low, high;
    uint8_t scale[8], min[8];
    memcpy(&low, words, 8);
    memcpy(&high, words + 4, 8);
    low = six_to_eight(low & 0xffffffffffff);
    high = six_to_eight(high >> 16);
    memcpy(scale, &low, 8);
    memcpy(min, &high, 8);
    for (int i = 0; i < 8; i++) {
        scales[i] = d * (float)scale[i];
        biases[i] = -(dmin * (float)min[i]);
    }
}

/* What a 256th of an NVFP4 scale is multiplied with, or divided by: the row's global scale, so that half of their product
 * comes out, for codes are twice the value. */
static inline float nvfp4_global(int32_t encoding, const uint8_t *global) {
    return dtype_float(SE_F32, global, 0) * (encoding == SE_NVFP4_DIVIDE ? 0x1p-7f : 0x1p7f);
}

/* Groups of one row of NVFP4, of whose scales a 256th is given. */
static inline void nvfp4_groups(int32_t encoding, const uint8_t *global, int64_t n, float *scales, float *biases) {
    const float by = nvfp4_global(encoding, global);
    for (int64_t i = 0; i < n; i++) scales[i] = encoding == SE_NVFP4_DIVIDE ? scales[i] / by : scales[i] * by;
    for (int64_t i = 0; i < n; i++) biases[i] = -12.0f * scales[i];
}

/* Scales and biases of groups first..first + n of a row, n at most CHUNK_GROUPS; zeros up to a whole block. From first 0
 * on they may run into the rows behind it, whose groups follow at once in every array. Once per row or so, and long: every
 * kernel calls the same copy. first and, but for the last groups of a row, n are whole blocks. */
__attribute__((noinline, unused)) static void load_groups(const struct weights *w, int64_t row, int64_t first, int64_t n,
                                                  float *scales, float *biases) {
    const uint8_t *s = w->scales + row * w->scales_stride, *b = w->biases + row * w->biases_stride;
    const uint8_t *b2 = b + round_up(w->rows * w->biases_stride, ALIGNMENT); /* FORMAT.md: arrays follow one another */
    const float middle = (float)((largest_code(w->shape.code) + 1) / 2);
    const int64_t row_groups = w->shape.columns / w->shape.group_size;
    switch (w->encoding) {
    case SE_AFFINE:
        to_floats(w->dtype, s + first * (w->dtype == SE_F32 ? 4 : 2), n, scales);
        to_floats(w->dtype, b + first * (w->dtype == SE_F32 ? 4 : 2), n, biases);
        break;
    case SE_SYMMETRIC:
        stored_scales(w, s, first, n, scales);
        for (int64_t i = 0; i < n; i++) biases[i] = -middle * scales[i];
        break;
    case SE_ZERO_POINT:
        stored_scales(w, s, first, n, scales);
        for (int64_t i = 0; i < n && w->per_scale > 1; i++) biases[i] = -(float)b[(first + i) / w->per_scale] * scales[i];
        for (int64_t i = 0; i < n && w->per_scale == 1; i++) biases[i] = -(float)b[first + i] * scales[i];
        break;
    case SE_MXFP4:
        e8m0_halves(s + first, n, scales);
        for (int64_t i = 0; i < n; i++) biases[i] = -12.0f * scales[i];
        break;
    case SE_NVFP4_MULTIPLY:
    case SE_NVFP4_DIVIDE:
        for (int64_t i = 0; i < n; i++) scales[i] = e4m3_float(s[first + i]) * 0x1p-8f;
        for (int64_t i = 0; i < n; i += row_groups, b += sizeof(float)) {
            nvfp4_groups(w->encoding, b, n - i < row_groups ? n - i : row_groups, scales + i, biases + i);
        }
        break;
    case SE_Q4_K:
        for (int64_t i = 0; i < n; i += 8) {
            const int64_t at = (first + i) / 8;
            q4_k_groups(s + 12 * at, dtype_float(SE_F16, b, at), dtype_float(SE_F16, b2, at), scales + i, biases + i);
        }
        break;
    case SE_Q2_K: /* groups of 16, one d and dmin for 16 of them */
        for (int64_t i = 0; i < n; i += 16) {
            const float d = dtype_float(SE_F16, b, (first + i) / 16), dmin = dtype_float(SE_F16, b2, (first + i) / 16);
            for (int64_t j = i; j < i + 16; j++) scales[j] = d * (float)(s[first + j] & 15);
            for (int64_t j = i; j < i + 16; j++) biases[j] = -(dmin * (float)(s[first + j] >> 4));
        }
        break;
    default: /* SE_Q6_K, and what is stored as it is: one d for the groups of 256 columns */
        for (int64_t i = 0, each = 256 / w->shape.group_size; i < n; i += each) {
            const float d = dtype_float(SE_F16, b, (first + i) / each) * w->unit;
            for (int64_t j = i; j < i + each; j++) scales[j] = d * (float)(int8_t)s[first + j];
        }
        for (int64_t i = 0; i < n; i++) biases[i] = -w->middle * scales[i];
    }
    for (; n % BLOCK_GROUPS != 0; n++) scales[n] = biases[n] = 0.0f;
}

#endif
