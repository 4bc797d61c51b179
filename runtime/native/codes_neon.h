/* Packed codes of a row as vectors of bytes, for NEON. */
#ifndef SE_CODES_NEON_H
#define SE_CODES_NEON_H

#include "elementwise.h"
#include "straight.h"

#include <arm_neon.h>

enum {
    AHEAD_BYTES = 1024,
    OVERREAD = 16, /* a stream of narrow codes is read 16 bytes at a time */
};

/* What the compiler must know of an encoding and a precision to make straight code. */
struct kind {
    int code;
    int group_size;
    int planes; /* of digits */
};

/* Vectors of codes that lie over one another in the packed bytes: the columns of ORDER_PAIRS, or of ORDER_FOURS. */
INLINE int parts_of(struct kind kind) {
    return codes_of_byte(kind.code);
}

/* 16 codes of 3, 5 or 6 bits in order. Four codes, which begin at a multiple of 4 bits, go to each 32-bit lane. */
INLINE uint8x16_t unpack_stream(const uint8_t *packed, int width) {
#define LANE(j) j * width / 2, j * width / 2 + 1, j * width / 2 + 2, j * width / 2 + 3
    const uint8_t places[16] = {LANE(0), LANE(1), LANE(2), LANE(3)};
#undef LANE
    const int32_t shifts[4] = {0, -4, 0, -4};
    const uint32_t two = (1u << 2 * width) - 1, one = (1u << width) - 1;
    uint32x4_t x = vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(packed), vld1q_u8(places)));
    if (width % 2 == 1) x = vshlq_u32(x, vld1q_s32(shifts));
    x = vorrq_u32(vandq_u32(x, vdupq_n_u32(two)),
                  vandq_u32(vshlq_u32(x, vdupq_n_s32(16 - 2 * width)), vdupq_n_u32(two << 16)));
    x = vorrq_u32(vandq_u32(x, vdupq_n_u32(one | one << 16)),
                  vandq_u32(vshlq_u32(x, vdupq_n_s32(8 - width)), vdupq_n_u32(one << 8 | one << 24)));
    return vreinterpretq_u8_u32(x);
}

/* Vector i of a block's codes, those that share a byte still together. */
INLINE uint8x16_t packed_bytes(const uint8_t *packed, int i, struct kind kind) {
    const int width = code_width(kind.code);
    return width == 8 || parts_of(kind) > 1 ? vld1q_u8(packed + 16 * i) : unpack_stream(packed + 2 * width * i, width);
}

/* What they stand for as signed bytes, in the order of the shape: codes [parts]. */
INLINE void take_apart(int8x16_t *codes, uint8x16_t packed, struct kind kind) {
    const int width = code_width(kind.code), parts = parts_of(kind), table = kind.code - CODE_FP4;
    const uint8x16_t top = vdupq_n_u8(is_wide(kind.code) ? 0x80 : 0);
    UNROLL
    for (int part = 0; part < parts; part++) {
        uint8x16_t found = packed;
        if (parts > 1) found = vandq_u8(vshlq_u8(packed, vdupq_n_s8((int8_t)(-width * part))), vdupq_n_u8((uint8_t)((1 << width) - 1)));
        if (table >= 0) found = vqtbl1q_u8(vld1q_u8(CODE_INTEGERS[table]), found);
        codes[part] = vreinterpretq_s8_u8(veorq_u8(found, top));
    }
}

enum { MAX_BLOCK_BYTES = BLOCK_GROUPS * MAX_GROUP };

/* `copy` takes the codes of a block that is not whole, zeros behind them. */
INLINE const uint8_t *block_codes(const struct weights *w, int64_t row, int64_t block, uint8_t *copy, struct kind kind) {
    const int64_t group_bytes = kind.group_size * code_width(kind.code) / 8, first = block * BLOCK_GROUPS;
    const int64_t left = w->shape.columns / kind.group_size - first;
    const uint8_t *packed = w->weight + row * w->weight_stride + first * group_bytes;
    if (left >= BLOCK_GROUPS) {
        __builtin_prefetch(packed + AHEAD_BYTES, 0, 0);
        return packed;
    }
    memset(copy, 0, MAX_BLOCK_BYTES + OVERREAD);
    return memcpy(copy, packed, (size_t)(left * group_bytes));
}

#endif
