/* Packed codes of a row as vectors of bytes, for AVX2. */
#ifndef SE_CODES_AVX2_H
#define SE_CODES_AVX2_H

#include "groups_avx2.h"

/* Vectors of codes that lie over one another in the packed bytes: the columns of ORDER_PAIRS, or of ORDER_FOURS. Two codes
 * of 3 bits are unpacked as one of 6. */
INLINE int parts_of(struct kind kind) {
    return is_wide(kind.code) ? 1 : code_width(kind.code) == 3 ? 2 : codes_of_byte(kind.code);
}

INLINE __m256i load(const void *bytes) {
    return _mm256_loadu_si256(bytes);
}

/* 32 codes of 5 or 6 bits in order. Two go to each 16-bit lane, and a product shifts them to its top. */
INLINE __m256i unpack_stream(const uint8_t *packed, int width) {
    const int one = (1 << width) - 1;
#define BYTE(j) 2 * width * (j) / 8
#define LANE(j) BYTE(j), BYTE(j) + 1
#define FACTOR(j) (int16_t)(1 << (16 - 2 * width - 2 * width * (j) % 8))
    const __m128i bytes = _mm_setr_epi8(LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7));
    const __m256i factors = _mm256_broadcastsi128_si256(_mm_setr_epi16(
        FACTOR(0), FACTOR(1), FACTOR(2), FACTOR(3), FACTOR(4), FACTOR(5), FACTOR(6), FACTOR(7)));
#undef FACTOR
#undef LANE
#undef BYTE
    const __m128i low = _mm_loadu_si128((const void *)packed), high = _mm_loadu_si128((const void *)(packed + 2 * width));
    __m256i x = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), _mm256_broadcastsi128_si256(bytes));
    x = _mm256_mullo_epi16(x, factors);
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x, 16 - 2 * width), _mm256_set1_epi16((int16_t)one)),
                           _mm256_and_si256(_mm256_srli_epi16(x, 8 - width), _mm256_set1_epi16((int16_t)(one << 8))));
}

/* What codes stand for. */
INLINE __m256i integers(__m256i codes, int code) {
    if (code < CODE_FP4) return codes;
    const __m128i table = _mm_loadu_si128((const void *)CODE_INTEGERS[code - CODE_FP4]);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

/* The codes that lie over one another in packed bytes, codes [parts]; of what has a byte each, that. */
INLINE void take_apart(__m256i *codes, __m256i packed, struct kind kind) {
    const int width = code_width(kind.code), parts = parts_of(kind);
    UNROLL
    for (int part = 0; part < parts; part++) {
        const __m256i low = part == 0 ? packed : _mm256_srli_epi16(packed, width * part);
        codes[part] = parts == 1 ? packed : integers(_mm256_and_si256(low, _mm256_set1_epi8((1 << width) - 1)), kind.code);
    }
}

/* Vector v of packed codes with each part in bytes. */
INLINE __m256i packed_bytes(const uint8_t *packed, int v, struct kind kind) {
    const int width = code_width(kind.code) * parts_of(kind);
    return width == 8 ? load(packed + 32 * v) : unpack_stream(packed + 4 * width * v, width);
}

/* Vector v of packed codes as bytes: codes [parts]. */
INLINE void unpack(__m256i *codes, const uint8_t *packed, int v, struct kind kind) {
    if (kind.code == CODE_IQ4) {
        const __m256i p = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(packed + 16 * v)));
        codes[0] = integers(_mm256_and_si256(_mm256_or_si256(p, _mm256_slli_epi16(p, 4)), _mm256_set1_epi8(15)), kind.code);
    } else {
        take_apart(codes, packed_bytes(packed, v, kind), kind);
    }
}

/* How many products of a code and an 8-bit digit, added in pairs by maddubs, fit 16 bits. */
INLINE int room_of(struct kind kind) {
    return 32767 / (2 * 128 * largest_code(kind.code));
}

INLINE __m256i widen(__m256i sums) {
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

enum { MAX_BLOCK_BYTES = BLOCK_GROUPS * MAX_GROUP, OVERREAD = 16 };

/* The packed codes of a block: where they are if it is one or two whole halves, else a copy with zeros behind. */
INLINE const uint8_t *block_codes(const struct weights *w, int64_t row, int64_t block, int64_t groups, uint8_t *copy,
                                  struct kind kind) {
    const int64_t group_bytes = kind.group_size * code_width(kind.code) / 8;
    const uint8_t *packed = w->weight + row * w->weight_stride + block * BLOCK_GROUPS * group_bytes;
    if (groups >= BLOCK_GROUPS || groups == HALF_GROUPS) return opaque(packed);
    memset(copy, 0, (size_t)(BLOCK_GROUPS * group_bytes + OVERREAD));
    memcpy(copy, packed, (size_t)(groups * group_bytes));
    return opaque(copy);
}

#endif
