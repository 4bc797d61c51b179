/* What encodings store for the scales and biases of 8 groups, as vectors: the floats of groups.h, by the same operations,
 * without a way through memory. */
#ifndef SE_GROUPS_AVX2_H
#define SE_GROUPS_AVX2_H

#include "elementwise.h"
#include "straight.h"

#include <immintrin.h>

enum {
    HALF_GROUPS = 8,
    AHEAD_BYTES = 4096, /* how far ahead codes are asked for: past the caches, which others need (docs/LEARNED.md 38) */
    NEAR_BYTES = 1024,  /* or into the first-level cache (98) */
};

/* What the compiler must know of an encoding and a precision to make straight code. */
struct kind {
    int code;
    int group_size;
    int planes;
};

/* A 256th of values of FP8, which are the upper bytes, as f16, whose subnormals cost nothing. All ones is no number. */
INLINE __m256i fp8_halves(__m256i bytes) {
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(bytes, 1), _mm256_set1_epi16((int16_t)0xbf80));
    const __m256i rest = _mm256_add_epi16(bytes, bytes); /* without the sign */
    return _mm256_or_si256(half, _mm256_cmpeq_epi16(rest, _mm256_set1_epi16((int16_t)0xfe00)));
}

/* Eight values; of FP8 a 256th of them. */
INLINE __m256 load_values(const uint8_t *values, int value) {
    if (value == SE_F32) return _mm256_loadu_ps((const float *)(const void *)values);
    if (value == VALUE_FP8) {
        const __m128i bytes = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64((const void *)values));
        return _mm256_cvtph_ps(_mm256_castsi256_si128(fp8_halves(_mm256_castsi128_si256(bytes))));
    }
    const __m128i halves = _mm_loadu_si128((const void *)values);
    if (value == SE_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* 2 ** (exponent - 128), as e8m0_halves has it. */
INLINE __m256 e8m0_vector(const uint8_t *exponents) {
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)exponents));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    const __m256i none = _mm256_and_si256(_mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x7fc00000));
    const __m256i bits = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, none));
}

/* What a row stores for its groups. */
struct groups {
    const struct weights *w;
    const uint8_t *scales, *biases;
    const uint8_t *mins; /* of Q2_K, Q4_K and Q5_K, their dmin */
};

INLINE struct groups groups_of(const struct weights *w, int64_t row) {
    const uint8_t *biases = w->biases + row * w->biases_stride;
    return (struct groups){w, w->scales + row * w->scales_stride, biases,
                           biases + round_up(w->rows * w->biases_stride, ALIGNMENT)};
}

/* Whether every half of every row can be taken as it is stored. */
INLINE bool taken_as_stored(const struct tile *tile, struct kind kind) {
    bool stored = tile->weights[0]->shape.columns / kind.group_size % HALF_GROUPS == 0;
    for (int64_t s = 0; s < tile->streams; s++) stored &= tile->weights[s]->per_scale == 1;
    return stored;
}

/* One f16 in every lane. */
INLINE __m256 f16_vector(const uint8_t *half) {
    int16_t bits;
    memcpy(&bits, half, sizeof bits);
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
}

/* The first eight bytes, without a sign, as floats. */
INLINE __m256 byte_floats(__m128i bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

/* Eight numbers of 6 bits, packed from byte `first` of the words on, as floats. */
INLINE __m256 six_bits(__m128i words, int first) {
#define LANE(j) first + j * 6 / 8, first + (j * 6 + 5) / 8, -1, -1
    const __m128i low = _mm_setr_epi8(LANE(0), LANE(1), LANE(2), LANE(3));
    const __m128i high = _mm_setr_epi8(LANE(4), LANE(5), LANE(6), LANE(7));
#undef LANE
    const __m256i bits = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(words), _mm256_set_m128i(high, low));
    const __m256i numbers = _mm256_srlv_epi32(bits, _mm256_setr_epi32(0, 6, 4, 2, 0, 6, 4, 2));
    return _mm256_cvtepi32_ps(_mm256_and_si256(numbers, _mm256_set1_epi32(63)));
}

/* Whether groups lie in superblocks of ggml's. Only groups of 32 may do either: a compiler leaves out the rest. */
INLINE int in_superblocks(const struct weights *w, struct kind kind) {
    if (kind.code >= CODE_IQ3) return 1;
    if (kind.group_size == 16) return kind.code != CODE_FP4;
    return kind.group_size == 32 && (w->encoding == SE_Q4_K || w->encoding == SE_Q6_K);
}

/* Eight groups of ggml's superblocks, of 256 columns each, which have numbers in f16 that scales and biases are
 * multiples of. */
INLINE void superblock_groups(__m256 *scale, __m256 *bias, const struct groups *from, int64_t at, struct kind kind) {
    const struct weights *w = from->w;
    const uint64_t superblock = (uint64_t)at * (uint64_t)kind.group_size / 256;
    const uint8_t *d = from->biases + 2 * superblock, *dmin = from->mins + 2 * superblock;
    const __m256 minus = _mm256_set1_ps(-0.0f);
    if (kind.group_size == 32 && (kind.code == CODE_4 || kind.code == CODE_5) && w->encoding == SE_Q4_K) {
        const uint8_t *words = from->scales + 12 * (at / 8);
        int32_t last;
        memcpy(&last, words + 8, sizeof last);
        const __m128i numbers = _mm_insert_epi32(_mm_loadl_epi64((const void *)words), last, 2);
        *scale = _mm256_mul_ps(f16_vector(d), six_bits(numbers, 0));
        *bias = _mm256_xor_ps(minus, _mm256_mul_ps(f16_vector(dmin), six_bits(numbers, 6)));
        return;
    }
    const __m128i bytes = _mm_loadl_epi64((const void *)(from->scales + at));
    if (kind.group_size == 16 && kind.code == CODE_2) { /* Q2_K */
        const __m128i nibble = _mm_set1_epi8(15);
        *scale = _mm256_mul_ps(f16_vector(d), byte_floats(_mm_and_si128(bytes, nibble)));
        const __m128i mins = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        *bias = _mm256_xor_ps(minus, _mm256_mul_ps(f16_vector(dmin), byte_floats(mins)));
    } else {
        const __m256 unit = _mm256_mul_ps(f16_vector(d), _mm256_set1_ps(w->unit));
        *scale = _mm256_mul_ps(unit, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
        *bias = _mm256_mul_ps(_mm256_set1_ps(-w->middle), *scale);
    }
}

/* Eight groups from `at` on: the floats of load_groups (groups.h), by the same operations. */
INLINE void eight_groups(__m256 *scale, __m256 *bias, const struct groups *from, int64_t at, struct kind kind) {
    const struct weights *w = from->w;
    if (in_superblocks(w, kind)) {
        superblock_groups(scale, bias, from, at, kind);
    } else if (kind.code == CODE_FP4) {
        if (kind.group_size == 32) {
            *scale = e8m0_vector(from->scales + at);
        } else {
            const __m256 by = _mm256_set1_ps(nvfp4_global(w->encoding, from->biases));
            *scale = load_values(from->scales + at, VALUE_FP8);
            *scale = w->encoding == SE_NVFP4_DIVIDE ? _mm256_div_ps(*scale, by) : _mm256_mul_ps(*scale, by);
        }
        *bias = _mm256_mul_ps(*scale, _mm256_set1_ps(-12.0f));
    } else {
        const int64_t byte = (w->dtype == SE_F32 ? 4 : 2) * at;
        *scale = load_values(from->scales + byte, w->dtype);
        if (w->encoding == SE_AFFINE) {
            *bias = load_values(from->biases + byte, w->dtype);
        } else if (w->encoding == SE_SYMMETRIC) {
            *bias = _mm256_mul_ps(*scale, _mm256_set1_ps(-(float)((largest_code(kind.code) + 1) / 2)));
        } else {
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(from->biases + at)));
            *bias = _mm256_mul_ps(*scale, _mm256_sub_ps(_mm256_set1_ps(-0.0f), _mm256_cvtepi32_ps(zeros)));
        }
    }
}

#endif
