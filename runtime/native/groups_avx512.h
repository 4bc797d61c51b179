/* What encodings store for the scales and biases of a block of 16 groups, as vectors: the floats of groups.h, by the same
 * operations, without a way through memory. */
#ifndef SE_GROUPS_AVX512_H
#define SE_GROUPS_AVX512_H

#include "elementwise.h"
#include "straight.h"

#include <immintrin.h>
#include <stdbool.h>

/* How far ahead weights are asked for: into the second-level cache, as the first is the operand's, or, where that is
 * faster (struct kernels), into the first. */
enum { AHEAD_BYTES = 4096, NEAR_BYTES = 1024 };

enum { SPAN = 16 }; /* superblocks whose d are made floats at once */

/* What stands for the scales of groups of 32 and more: floats; or whole numbers, which a superblock has its d for, and Q4_K
 * and Q5_K mins besides. */
enum scales { SCALES_ANY, SCALES_FLOATS, SCALES_LEVELS, SCALES_MINS };

/* What the compiler must know of an encoding and a precision to make straight code. */
struct kind {
    int code;
    int group_size;
    int planes;         /* of digits */
    enum scales scales; /* SCALES_ANY: as the weights say */
};

INLINE enum scales scales_of(int32_t encoding) {
    return encoding == SE_Q6_K ? SCALES_LEVELS : encoding == SE_Q4_K ? SCALES_MINS : SCALES_FLOATS;
}

/* Whether codes that have floats elsewhere come with these, too. */
INLINE bool may_have(enum scales scales, struct kind kind) {
    if (kind.group_size != 32) return false;
    if (scales == SCALES_MINS) return kind.code == CODE_4 || kind.code == CODE_5;
    return kind.code == CODE_2 || kind.code == CODE_4 || kind.code == CODE_IQ4;
}

/* A bit for each of the next 16 values that exist. */
INLINE __mmask16 present(int64_t left) {
    return (__mmask16)(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}

/* Sixteen bytes of FP8, a 256th of each, as f16, whose subnormals cost nothing. All ones is no number. */
INLINE __m256i fp8_halves(__m128i bytes) {
    const __m128i none = _mm_cmpeq_epi8(_mm_or_si128(bytes, _mm_set1_epi8(INT8_MIN)), _mm_set1_epi8(-1));
    const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7); /* the sign twice */
    return _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi16((int16_t)0xbf80)), _mm256_cvtepi8_epi16(none));
}

/* Sixteen values of 16 or 32 bits, 0 where the mask has none. Masks take a port of the two that products need, and a
 * branch that is always the same takes none. */
INLINE __m512 load_values(const uint8_t *values, __mmask16 mask, int value) {
    if (value == SE_F32) return _mm512_maskz_loadu_ps(mask, values);
    __m256i halves;
    if (mask == 0xffff) {
        halves = _mm256_loadu_si256((const void *)values);
    } else {
        halves = _mm256_maskz_loadu_epi16(mask, values);
    }
    if (value == SE_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Sixteen bytes, 0 where the mask has none. */
INLINE __m128i load_bytes(const uint8_t *bytes, __mmask16 mask) {
    return mask == 0xffff ? _mm_loadu_si128((const void *)bytes) : _mm_maskz_loadu_epi8(mask, bytes);
}

/* 2 ** (exponent - 128), as e8m0_halves has it: first as if all were normal floats. */
INLINE __m512 e8m0_vector(__m128i bytes) {
    const __m512i e = _mm512_cvtepu8_epi32(bytes), one = _mm512_set1_epi32(1);
    __m512i bits = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
    const __m128i from_two = _mm_sub_epi8(bytes, _mm_set1_epi8(2)); /* 0, 1 and 255, which are not, become 253 and more */
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(from_two, _mm_set1_epi8((char)253)), from_two)) != 0) {
        const __mmask16 small = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(2), e);
        const __mmask16 none = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255));
        bits = _mm512_mask_mov_epi32(bits, small, _mm512_sllv_epi32(_mm512_set1_epi32(0x200000), e));
        bits = _mm512_mask_mov_epi32(bits, none, _mm512_set1_epi32(0x7fc00000));
    }
    return _mm512_castsi512_ps(bits);
}

/* The bias of symmetric codes: minus their middle times the scale. */
INLINE __m512 times_middle(__m512 scale, struct kind kind) {
    return _mm512_mul_ps(scale, _mm512_set1_ps(-(float)((largest_code(kind.code) + 1) / 2)));
}

/* The bias of zero points: minus each of them times its scale. */
INLINE __m512 times_minus(__m512 scale, __m512i zeros) {
    return _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_set1_ps(-0.0f), _mm512_cvtepi32_ps(zeros)));
}

/* What a row stores for its groups; those of the rows behind it follow at once. */
struct groups {
    const struct weights *w;
    const uint8_t *scales, *biases;
    const uint8_t *mins; /* of Q2_K, Q4_K and Q5_K, their dmin */
    int64_t superblocks; /* from this row on */
    float d[SPAN], minus_dmin[SPAN]; /* of so many of them; d times the unit */
};

INLINE enum scales known_scales(const struct weights *w, struct kind kind) {
    return kind.scales == SCALES_ANY ? scales_of(w->encoding) : kind.scales;
}

/* Superblocks of a block: none where scales are floats. */
INLINE int superblocks_of(enum scales scales, struct kind kind) {
    const bool levels = kind.group_size == 16 ? kind.code != CODE_FP4 : kind.code > CODE_IQ4;
    return levels || (scales != SCALES_FLOATS && may_have(scales, kind)) ? BLOCK_GROUPS * kind.group_size / 256 : 0;
}

INLINE struct groups groups_of(const struct weights *w, int64_t row) {
    struct groups from;
    from.w = w;
    from.scales = w->scales + row * w->scales_stride;
    from.biases = w->biases + row * w->biases_stride;
    from.mins = from.biases + round_up(w->rows * w->biases_stride, ALIGNMENT);
    from.superblocks = (w->rows - row) * (w->shape.columns / 256);
    return from;
}

/* d and minus_dmin of the superblocks of groups from `at` on, those of the next rows among them: what a product takes from
 * memory is in all lanes for nothing. Nothing where there are none. */
INLINE void begin_span(struct groups *from, int64_t at, struct kind kind) {
    const enum scales scales = known_scales(from->w, kind);
    if (superblocks_of(scales, kind) == 0) return;
    const bool has_mins = scales == SCALES_MINS || (kind.group_size == 16 && kind.code == CODE_2);
    const int64_t first = at * kind.group_size / 256;
    const __mmask16 mask = present(from->superblocks - first);
    const __m512 d = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from->biases + 2 * first));
    _mm512_storeu_ps(from->d, has_mins ? d : _mm512_mul_ps(d, _mm512_set1_ps(from->w->unit)));
    if (has_mins) {
        const __m512 dmin = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from->mins + 2 * first));
        _mm512_storeu_ps(from->minus_dmin, _mm512_xor_ps(dmin, _mm512_set1_ps(-0.0f)));
    }
}

/* One float in the lower half of lanes; in the upper half the next one, or of the last superblock of a row the same. */
INLINE __m512 two_floats(const float *floats, bool last) {
    const __m512 first = _mm512_set1_ps(floats[0]);
    return last ? first : _mm512_mask_broadcastss_ps(first, 0xff00, _mm_load_ss(floats + 1));
}

/* Two superblocks of Q4_K or Q5_K, or the last one: of each three words, which are 8 scales of 6 bits, then 8 mins. A lane
 * takes the two bytes that hold its scale and the two that hold its min. */
INLINE void q4_k_vectors(__m512 *scale, __m512 *bias, const struct groups *from, int64_t at, int64_t place, bool last) {
#define LANE(i) 6 * (i) / 8, 6 * (i) / 8 + 1, 6 + 6 * (i) / 8, (7 + 6 * (i) / 8) % 12
    const __m128i low = _mm_setr_epi8(LANE(0), LANE(1), LANE(2), LANE(3));
    const __m128i high = _mm_setr_epi8(LANE(4), LANE(5), LANE(6), LANE(7));
#undef LANE
    const __m512i bytes = _mm512_inserti32x4(_mm512_inserti32x4(_mm512_broadcast_i32x4(low), high, 1), high, 3);
    const __m512i words = _mm512_setr_epi32(0, 1, 2, 2, 0, 1, 2, 2, 3, 4, 5, 5, 3, 4, 5, 5);
    const __m512i shifts = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 6, 4, 2)), six = _mm512_set1_epi32(63);
    const __m256i packed = _mm256_maskz_loadu_epi8(last ? 0xfff : 0xffffff, from->scales + (uint64_t)at / 8 * 12);
    __m512i x = _mm512_permutexvar_epi32(words, _mm512_castsi256_si512(packed));
    x = _mm512_srlv_epi32(_mm512_shuffle_epi8(x, bytes), shifts);
    const __m512i mins = _mm512_and_si512(_mm512_srli_epi32(x, 16), six);
    *scale = _mm512_mul_ps(two_floats(from->d + place, last), _mm512_cvtepi32_ps(_mm512_and_si512(x, six)));
    *bias = _mm512_mul_ps(two_floats(from->minus_dmin + place, last), _mm512_cvtepi32_ps(mins));
}

/* A superblock of Q2_K: a byte for each group, its scale below its min. */
INLINE void q2_k_vectors(__m512 *scale, __m512 *bias, const struct groups *from, int64_t at, int64_t place) {
    const __m512i both = _mm512_cvtepu8_epi32(load_bytes(from->scales + at, 0xffff));
    const __m512 lows = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 scales = _mm512_permutexvar_ps(both, lows); /* by the low four bits of each */
    const __m512 mins = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
    *scale = _mm512_mul_ps(_mm512_set1_ps(from->d[place]), scales);
    *bias = _mm512_mul_ps(_mm512_set1_ps(from->minus_dmin[place]), mins);
}

/* Q6_K and what is stored as it is: one d for 16 groups of 16, or for 8 groups of 32. */
INLINE void levels_vectors(__m512 *scale, __m512 *bias, const struct groups *from, int64_t at, int64_t place,
                           __mmask16 mask, struct kind kind) {
    const __m512 d = kind.group_size == 16 ? _mm512_set1_ps(from->d[place]) : two_floats(from->d + place, mask >> 8 == 0);
    *scale = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(from->scales + at, mask))));
    *bias = _mm512_mul_ps(*scale, _mm512_set1_ps(-from->w->middle));
}

/* Of each of 16 groups from `at` on which stored scale it takes, counted from the first one's. */
INLINE __m512i shared_places(int64_t at, int64_t per_scale) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i places = _mm512_setzero_si512();
    for (int64_t i = per_scale - at % per_scale; i < BLOCK_GROUPS; i += per_scale) {
        const __mmask16 behind = _mm512_cmpgt_epi32_mask(lanes, _mm512_set1_epi32((int)i - 1));
        places = _mm512_mask_add_epi32(places, behind, places, _mm512_set1_epi32(1));
    }
    return places;
}

/* Sixteen groups from `at` on, of which their row, `row` behind that of groups_of, has `left`: the floats of load_groups
 * (groups.h), by the same operations. Of groups that it does not have, finite ones: their digits are zeros. Their first
 * superblock, if they have any, is at `place` of the span. */
INLINE void sixteen_groups(__m512 *scale, __m512 *bias, const struct groups *from, int64_t row, int64_t at, int64_t left,
                           int64_t place, struct kind kind) {
    const struct weights *w = from->w;
    const enum scales scales = known_scales(w, kind);
    const bool whole = kind.group_size == 16 && kind.code != CODE_FP4; /* superblocks are */
    const __mmask16 mask = whole ? 0xffff : present(left);
    const int64_t byte = (w->dtype == SE_F32 ? 4 : 2) * at;
    if (kind.code == CODE_FP4) {
        const __m128i bytes = load_bytes(from->scales + at, mask);
        if (kind.group_size == 32) {
            *scale = e8m0_vector(bytes);
        } else {
            const __m512 by = _mm512_set1_ps(nvfp4_global(w->encoding, from->biases + row * sizeof(float)));
            *scale = _mm512_cvtph_ps(fp8_halves(bytes));
            *scale = w->encoding == SE_NVFP4_DIVIDE ? _mm512_maskz_div_ps(mask, *scale, by)
                                                    : _mm512_maskz_mul_ps(mask, *scale, by);
        }
        *bias = _mm512_mul_ps(*scale, _mm512_set1_ps(-12.0f));
    } else if (kind.group_size == 16 && kind.code == CODE_2) {
        q2_k_vectors(scale, bias, from, at, place);
    } else if (kind.group_size == 16 || kind.code > CODE_IQ4 ||
               (may_have(SCALES_LEVELS, kind) && scales == SCALES_LEVELS)) {
        levels_vectors(scale, bias, from, at, place, mask, kind);
    } else if (may_have(SCALES_MINS, kind) && scales == SCALES_MINS) {
        q4_k_vectors(scale, bias, from, at, place, left < BLOCK_GROUPS);
    } else if (w->per_scale == 1) {
        *scale = load_values(from->scales + byte, mask, w->dtype);
        if (w->encoding == SE_AFFINE) {
            *bias = load_values(from->biases + byte, mask, w->dtype);
        } else if (w->encoding == SE_ZERO_POINT) {
            *bias = times_minus(*scale, _mm512_cvtepu8_epi32(load_bytes(from->biases + at, mask)));
        } else {
            *bias = times_middle(*scale, kind);
        }
    } else {
        const int64_t first = at / w->per_scale, end = (at + (left < BLOCK_GROUPS ? left : BLOCK_GROUPS) - 1) / w->per_scale;
        const __mmask16 stored = present(end + 1 - first);
        const __m512i places = shared_places(at, w->per_scale);
        *scale = load_values(from->scales + (w->dtype == SE_F32 ? 4 : 2) * first, stored, w->dtype);
        *scale = _mm512_maskz_permutexvar_ps(mask, places, *scale);
        if (w->encoding == SE_ZERO_POINT) {
            const __m512i zeros = _mm512_cvtepu8_epi32(load_bytes(from->biases + first, stored));
            *bias = times_minus(*scale, _mm512_permutexvar_epi32(places, zeros));
        } else {
            *bias = times_middle(*scale, kind);
        }
    }
}

#endif
