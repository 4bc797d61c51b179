/* Tiles of many operands for AVX2 (tiles.h). Sums of 16 bits are widened as seldom as their room allows. */
#ifndef SE_TILES_AVX2_H
#define SE_TILES_AVX2_H

#include "codes_avx2.h"

enum {
    VECTOR_ROWS = 8,
    TURNED_VECTORS = 2,
    TURNED_TOKENS = 32,
    SLICE_COLUMNS = 512, /* 8 KiB of codes */
};
#define TURNED_OPERANDS(kind) 4

#include "tiles.h"

/* Eight rows of 8 words become columns: word w of all rows at to[w]. */
INLINE void turn(__m256i *to, const uint8_t *const *rows, int64_t at) {
    __m256i quads[8];
    UNROLL
    for (int i = 0; i < 2; i++) { /* in each 128-bit lane j word 4 * j + n of four rows at quads[2 * n + i] */
        const uint8_t *const *row = rows + 4 * i;
        const __m256i a = load(row[0] + at), b = load(row[1] + at), c = load(row[2] + at), d = load(row[3] + at);
        const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
        const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
        quads[i] = _mm256_unpacklo_epi64(ab0, cd0);
        quads[2 + i] = _mm256_unpackhi_epi64(ab0, cd0);
        quads[4 + i] = _mm256_unpacklo_epi64(ab1, cd1);
        quads[6 + i] = _mm256_unpackhi_epi64(ab1, cd1);
    }
    UNROLL
    for (int n = 0; n < 4; n++) {
        to[n] = _mm256_permute2x128_si256(quads[2 * n], quads[2 * n + 1], 0x20);
        to[4 + n] = _mm256_permute2x128_si256(quads[2 * n], quads[2 * n + 1], 0x31);
    }
}

/* Eight columns from `at` on of 8 rows of floats: column c of all rows at to + c * stride. */
INLINE void turn_block(float *to, int64_t stride, const uint8_t *const *rows, int64_t at) {
    __m256i words[8];
    turn(words, rows, 4 * at);
    UNROLL
    for (int i = 0; i < 8; i++) _mm256_store_ps(to + i * stride, _mm256_castsi256_ps(words[i]));
}

INLINE void turn_rows(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows,
                      int64_t block, int slice, struct kind kind) {
    const int parts = parts_of(kind), columns = slice_columns(kind), slice_bytes = columns * code_width(kind.code) / 8;
    const int64_t at = block * BLOCK_GROUPS, left = w->shape.columns / kind.group_size - at;
    const int64_t present = left == HALF_GROUPS ? left * kind.group_size - slice * columns : columns; /* block_codes */
    const int64_t vectors = (present < columns ? present : columns) / parts / 32;
    uint8_t bytes[8][SLICE_COLUMNS], copies[8][MAX_BLOCK_BYTES + OVERREAD];
    const uint8_t *row[8];
    for (int64_t i = 0; i < 8; i++) {
        const int64_t r = first + (i < rows ? i : rows - 1);
        row[i] = block_codes(w, r, block, left, copies[i], kind) + slice * slice_bytes;
        for (int j = slice_bytes; j < 2 * slice_bytes; j += 64) _mm_prefetch(row[i] + j, _MM_HINT_T1);
        if (parts * code_width(kind.code) == 8) continue;
        for (int v = 0; v < vectors; v++) {
            __m256i codes;
            if (parts > 1) {
                codes = packed_bytes(row[i], v, kind);
            } else {
                unpack(&codes, row[i], v, kind);
            }
            _mm256_storeu_si256((void *)(bytes[i] + 32 * v), codes);
        }
        row[i] = bytes[i];
    }
    for (int v = 0; v < vectors; v++) {
        __m256i words[8];
        turn(words, row, 32 * v);
        UNROLL
        for (int i = 0; i < 8; i++) {
            __m256i codes[4];
            take_apart(codes, words[i], kind);
            UNROLL
            for (int part = 0; part < parts; part++) {
                uint8_t(*to)[4] = turned->codes[part * columns / parts / 4 + 8 * v + i] + VECTOR_ROWS * vector;
                _mm256_store_si256((void *)to, codes[part]);
            }
        }
    }
    if (slice != 0) return;
    float scale[8][BLOCK_GROUPS], bias[8][BLOCK_GROUPS];
    const uint8_t *scales[8], *biases[8];
    for (int64_t i = 0; i < 8; i++) {
        load_groups(w, first + (i < rows ? i : rows - 1), at, left < BLOCK_GROUPS ? left : BLOCK_GROUPS, scale[i], bias[i]);
        scales[i] = (const uint8_t *)scale[i];
        biases[i] = (const uint8_t *)bias[i];
    }
    for (int i = 0; i < BLOCK_GROUPS; i += 8) {
        turn_block(turned->scale[i] + VECTOR_ROWS * vector, TURNED_ROWS, scales, i);
        turn_block(turned->bias[i] + VECTOR_ROWS * vector, TURNED_ROWS, biases, i);
    }
}

/* The same vector, of whose making the compiler no longer knows: else it adds up products in another order, all at once,
 * and has no registers left. */
INLINE __m256i in_register(__m256i v) {
    __asm__("" : "+x"(v));
    return v;
}

INLINE __m256i four_digits(const int8_t *digits) {
    int32_t four;
    memcpy(&four, digits, sizeof four);
    return _mm256_set1_epi32(four);
}

/* Word `word` of vector `vector` of the rows. */
INLINE __m256i word_of(const uint8_t (*codes)[TURNED_ROWS][4], int word, int vector) {
    return _mm256_load_si256((const void *)codes[word][VECTOR_ROWS * vector]);
}

/* A plane of a group times some operands, in 32 bits. */
INLINE void add_narrow(__m256i (*sums)[TURNED_VECTORS], const uint8_t (*codes)[TURNED_ROWS][4], const int8_t *const *digits,
                       int operands, struct kind kind) {
    const int parts = parts_of(kind), words = kind.group_size / parts / 4, room = room_of(kind);
    const int apart = slice_columns(kind) / parts / 4, plane = BLOCK_GROUPS * kind.group_size;
    __m256i sum[TURNED_OPERANDS(kind)][TURNED_VECTORS];
    UNROLL
    for (int i = 0; i < parts * words; i++) {
        UNROLL
        for (int o = 0; o < operands; o++) {
            const __m256i x = four_digits(digits[o] + i / words * plane / parts + i % words * 4);
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) {
                const __m256i product = _mm256_maddubs_epi16(word_of(codes, i / words * apart + i % words, v), x);
                sum[o][v] = in_register(i % room == 0 ? product : _mm256_add_epi16(sum[o][v], product));
            }
        }
        __asm__ volatile("" ::: "memory"); /* or a compiler loads the codes of all words at once and spills the sums */
        if (i % room != room - 1 && i != parts * words - 1) continue;
        UNROLL
        for (int o = 0; o < operands; o++) {
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) sums[o][v] = _mm256_add_epi32(sums[o][v], widen(sum[o][v]));
        }
    }
}

/* The same for wide codes and 16-bit digits. */
INLINE void add_wide(__m256i (*sums)[TURNED_VECTORS], const uint8_t (*codes)[TURNED_ROWS][4], const int8_t *const *digits,
                     int operands, struct kind kind) {
    UNROLL
    for (int i = 0; i < kind.group_size / 4; i++) {
        __m256i even[TURNED_VECTORS], odd[TURNED_VECTORS];
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) {
            even[v] = _mm256_and_si256(word_of(codes, i, v), _mm256_set1_epi16(255));
            odd[v] = _mm256_srli_epi16(word_of(codes, i, v), 8);
        }
        UNROLL
        for (int o = 0; o < operands; o++) {
            const int8_t *x = digits[o] + 64 * (i / 8) + 4 * (i % 8);
            const __m256i x_even = four_digits(x), x_odd = four_digits(x + 32);
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) {
                sums[o][v] = in_register(_mm256_add_epi32(sums[o][v], _mm256_madd_epi16(even[v], x_even)));
                sums[o][v] = in_register(_mm256_add_epi32(sums[o][v], _mm256_madd_epi16(odd[v], x_odd)));
            }
        }
        __asm__ volatile("" ::: "memory");
    }
}

/* 128 times the sum of a group's wide codes, by row: what the lower plane, of Y + 128, adds. */
INLINE void offsets_of(__m256i *offsets, const uint8_t (*codes)[TURNED_ROWS][4], struct kind kind) {
    const __m256i one = _mm256_set1_epi8(1);
    UNROLL
    for (int v = 0; v < TURNED_VECTORS; v++) {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < kind.group_size / 4; i++) {
            sum = _mm256_add_epi32(sum, widen(_mm256_maddubs_epi16(word_of(codes, i, v), one)));
        }
        offsets[v] = _mm256_slli_epi32(sum, 7);
    }
}

INLINE void group_by_many(float (*lanes)[TURNED_ROWS], const struct turned *turned, const struct operand *x, int operands,
                          int64_t block, int at, int local, struct kind kind) {
    const int parts = parts_of(kind), wide = is_wide(kind.code);
    const int64_t plane = BLOCK_GROUPS * kind.group_size * (wide ? 2 : 1), group = block * BLOCK_GROUPS + at;
    const uint8_t(*codes)[TURNED_ROWS][4] = &turned->codes[local * kind.group_size / parts / 4];
    __m256i sums[TURNED_OPERANDS(kind)][TURNED_VECTORS], high[TURNED_OPERANDS(kind)][TURNED_VECTORS];
    const int8_t *digits[TURNED_OPERANDS(kind)];
    UNROLL
    for (int o = 0; o < operands; o++) {
        digits[o] = opaque(x[o].digits + block * kind.planes * plane + at * (wide ? 2 : 1) * kind.group_size / parts);
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) sums[o][v] = _mm256_setzero_si256();
    }
    if (wide) {
        add_wide(sums, codes, digits, operands, kind);
        if (kind.planes == 2) {
            __m256i offsets[TURNED_VECTORS];
            offsets_of(offsets, codes, kind);
            UNROLL
            for (int o = 0; o < operands; o++) {
                digits[o] += plane;
                UNROLL
                for (int v = 0; v < TURNED_VECTORS; v++) {
                    high[o][v] = sums[o][v];
                    sums[o][v] = _mm256_sub_epi32(_mm256_setzero_si256(), offsets[v]);
                }
            }
            add_wide(sums, codes, digits, operands, kind);
        }
    } else {
        for (int p = 0; p < kind.planes; p++) {
            if (p > 0) {
                UNROLL
                for (int o = 0; o < operands; o++) {
                    digits[o] += plane;
                    UNROLL
                    for (int v = 0; v < TURNED_VECTORS; v++) sums[o][v] = _mm256_slli_epi32(sums[o][v], 8);
                }
            }
            add_narrow(sums, codes, digits, operands, kind);
        }
    }
    UNROLL
    for (int o = 0; o < operands; o++) {
        const __m256 scale = _mm256_set1_ps(x[o].scale[group]), sum = _mm256_set1_ps(x[o].sum[group]);
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) {
            __m256 value = _mm256_cvtepi32_ps(sums[o][v]);
            if (wide && kind.planes == 2) {
                value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high[o][v]), _mm256_set1_ps(65536.0f), value);
            }
            float *lane = lanes[o] + VECTOR_ROWS * v;
            const __m256 before = block == 0 ? _mm256_setzero_ps() : _mm256_load_ps(lane);
            const __m256 scales = _mm256_mul_ps(_mm256_load_ps(turned->scale[at] + VECTOR_ROWS * v), scale);
            const __m256 biases = _mm256_load_ps(turned->bias[at] + VECTOR_ROWS * v);
            _mm256_store_ps(lane, _mm256_fmadd_ps(biases, sum, _mm256_fmadd_ps(scales, value, before)));
        }
    }
}

#endif
