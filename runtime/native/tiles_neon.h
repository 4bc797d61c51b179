/* Tiles of many operands for NEON (tiles.h). */
#ifndef SE_TILES_NEON_H
#define SE_TILES_NEON_H

#include "codes_neon.h"

enum {
    VECTOR_ROWS = 4,
    TURNED_VECTORS = 4,
    TURNED_TOKENS = 32,
    SLICE_COLUMNS = 512, /* 8 KiB of codes */
};
#define TURNED_OPERANDS(kind) 4

#include "tiles.h"

/* Four rows of 4 words become columns: word w of all rows at to[w]. */
INLINE void turn(uint32x4_t *to, uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    const uint32x4_t ab0 = vtrn1q_u32(a, b), ab1 = vtrn2q_u32(a, b), cd0 = vtrn1q_u32(c, d), cd1 = vtrn2q_u32(c, d);
    to[0] = vreinterpretq_u32_u64(vtrn1q_u64(vreinterpretq_u64_u32(ab0), vreinterpretq_u64_u32(cd0)));
    to[1] = vreinterpretq_u32_u64(vtrn1q_u64(vreinterpretq_u64_u32(ab1), vreinterpretq_u64_u32(cd1)));
    to[2] = vreinterpretq_u32_u64(vtrn2q_u64(vreinterpretq_u64_u32(ab0), vreinterpretq_u64_u32(cd0)));
    to[3] = vreinterpretq_u32_u64(vtrn2q_u64(vreinterpretq_u64_u32(ab1), vreinterpretq_u64_u32(cd1)));
}

/* Four columns from `at` on of 4 rows of floats: column c of all rows at to + c * stride. */
INLINE void turn_block(float *to, int64_t stride, const uint8_t *const *rows, int64_t at) {
    uint32x4_t row[4], words[4];
    UNROLL
    for (int i = 0; i < 4; i++) row[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + 4 * at));
    turn(words, row[0], row[1], row[2], row[3]);
    UNROLL
    for (int i = 0; i < 4; i++) vst1q_f32(to + i * stride, vreinterpretq_f32_u32(words[i]));
}

INLINE void turn_rows(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows,
                      int64_t block, int slice, struct kind kind) {
    const int parts = parts_of(kind), columns = slice_columns(kind), slice_bytes = columns * code_width(kind.code) / 8;
    const int64_t at = block * BLOCK_GROUPS, left = w->shape.columns / kind.group_size - at;
    uint8_t copies[4][MAX_BLOCK_BYTES + OVERREAD];
    const uint8_t *row[4], *scales[4], *biases[4];
    float scale[4][BLOCK_GROUPS], bias[4][BLOCK_GROUPS];
    for (int64_t i = 0; i < 4; i++) {
        const int64_t r = first + (i < rows ? i : rows - 1);
        row[i] = block_codes(w, r, block, copies[i], kind) + slice * slice_bytes;
        if (slice == 0) load_groups(w, r, at, left < BLOCK_GROUPS ? left : BLOCK_GROUPS, scale[i], bias[i]);
        scales[i] = (const uint8_t *)scale[i];
        biases[i] = (const uint8_t *)bias[i];
    }
    for (int v = 0; v < columns / parts / 16; v++) {
        uint32x4_t packed[4], words[4];
        UNROLL
        for (int i = 0; i < 4; i++) packed[i] = vreinterpretq_u32_u8(packed_bytes(row[i], v, kind));
        turn(words, packed[0], packed[1], packed[2], packed[3]);
        UNROLL
        for (int i = 0; i < 4; i++) {
            int8x16_t codes[4];
            take_apart(codes, vreinterpretq_u8_u32(words[i]), kind);
            UNROLL
            for (int part = 0; part < parts; part++) {
                uint8_t(*to)[4] = turned->codes[part * columns / parts / 4 + 4 * v + i] + VECTOR_ROWS * vector;
                vst1q_s8((int8_t *)to, codes[part]);
            }
        }
    }
    for (int i = 0; slice == 0 && i < BLOCK_GROUPS; i += 4) {
        turn_block(turned->scale[i] + VECTOR_ROWS * vector, TURNED_ROWS, scales, i);
        turn_block(turned->bias[i] + VECTOR_ROWS * vector, TURNED_ROWS, biases, i);
    }
}

/* As many words of digits as a part of a group has, up to four. */
INLINE int8x16_t some_digits(const int8_t *digits, int words) {
    int32_t one;
    if (words >= 4) return vld1q_s8(digits);
    if (words == 2) return vcombine_s8(vld1_s8(digits), vld1_s8(digits));
    memcpy(&one, digits, sizeof one);
    return vreinterpretq_s8_s32(vdupq_n_s32(one));
}

/* A plane of a group times some operands. lost: what wide codes have lost, of each operand. */
INLINE void add_plane(int32x4_t (*sums)[TURNED_VECTORS], int32x4_t *lost, const uint8_t (*codes)[TURNED_ROWS][4],
                      const int8_t *const *digits, int operands, struct kind kind) {
    const int parts = parts_of(kind), words = kind.group_size / parts / 4;
    const int apart = slice_columns(kind) / parts / 4, plane = BLOCK_GROUPS * kind.group_size;
    UNROLL
    for (int i = 0; i < parts * words; i += words < 4 ? words : 4) {
        const uint8_t(*word)[TURNED_ROWS][4] = codes + i / words * apart + i % words;
        int8x16_t x[TURNED_OPERANDS(kind)], c[TURNED_VECTORS];
        UNROLL
        for (int o = 0; o < operands; o++) {
            x[o] = some_digits(digits[o] + i / words * plane / parts + i % words * 4, words);
            if (is_wide(kind.code)) lost[o] = vdotq_s32(lost[o], vdupq_n_s8(64), x[o]);
        }
#define WORD(lane)                                                                                           \
    if (lane < words) {                                                                                      \
        UNROLL                                                                                               \
        for (int v = 0; v < TURNED_VECTORS; v++) c[v] = vld1q_s8((const int8_t *)word[lane][VECTOR_ROWS * v]); \
        UNROLL                                                                                               \
        for (int o = 0; o < operands; o++) {                                                                 \
            UNROLL                                                                                           \
            for (int v = 0; v < TURNED_VECTORS; v++) sums[o][v] = vdotq_laneq_s32(sums[o][v], c[v], x[o], lane); \
        }                                                                                                    \
        __asm__ volatile("" ::: "memory");                                                                   \
    }
        WORD(0) WORD(1) WORD(2) WORD(3)
#undef WORD
    }
}

INLINE void group_by_many(float (*lanes)[TURNED_ROWS], const struct turned *turned, const struct operand *x, int operands,
                          int64_t block, int at, int local, struct kind kind) {
    const int parts = parts_of(kind), joined = joined_digits(kind.code, kind.planes);
    const int64_t plane = BLOCK_GROUPS * kind.group_size, group = block * BLOCK_GROUPS + at;
    const uint8_t(*codes)[TURNED_ROWS][4] = &turned->codes[local * kind.group_size / parts / 4];
    int32x4_t sums[TURNED_OPERANDS(kind)][TURNED_VECTORS], high[TURNED_OPERANDS(kind)][TURNED_VECTORS];
    const int8_t *digits[TURNED_OPERANDS(kind)];
    UNROLL
    for (int o = 0; o < operands; o++) {
        digits[o] = x[o].digits + block * kind.planes * plane + at * kind.group_size / parts;
    }
    UNROLL
    for (int p = 0; p < kind.planes; p++) {
        int32x4_t lost[TURNED_OPERANDS(kind)];
        UNROLL
        for (int o = 0; o < operands; o++) {
            lost[o] = vdupq_n_s32(0);
            if (p > 0) digits[o] += plane;
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) {
                if (p == joined) high[o][v] = sums[o][v];
                sums[o][v] = p == 0 || p == joined ? vdupq_n_s32(0) : vshlq_n_s32(sums[o][v], 8);
            }
        }
        add_plane(sums, lost, codes, digits, operands, kind);
        if (!is_wide(kind.code)) continue;
        UNROLL
        for (int o = 0; o < operands; o++) {
            const int32x4_t all = vdupq_n_s32(2 * vaddvq_s32(lost[o]));
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) sums[o][v] = vaddq_s32(sums[o][v], all);
        }
    }
    UNROLL
    for (int o = 0; o < operands; o++) {
        const float32x4_t sum = vdupq_n_f32(x[o].sum[group]);
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) {
            float32x4_t value = vcvtq_f32_s32(sums[o][v]);
            if (joined < kind.planes) value = vfmaq_f32(value, vcvtq_f32_s32(high[o][v]), vdupq_n_f32(65536.0f));
            float *lane = lanes[o] + VECTOR_ROWS * v;
            const float32x4_t before = block == 0 ? vdupq_n_f32(0) : vld1q_f32(lane);
            const float32x4_t scale = vmulq_n_f32(vld1q_f32(turned->scale[at] + VECTOR_ROWS * v), x[o].scale[group]);
            const float32x4_t bias = vld1q_f32(turned->bias[at] + VECTOR_ROWS * v);
            vst1q_f32(lane, vfmaq_f32(vfmaq_f32(before, scale, value), bias, sum));
        }
    }
}

#endif
