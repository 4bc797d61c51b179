/* Tiles of many operands for AVX-512 (tiles.h). */
#ifndef SE_TILES_AVX512_H
#define SE_TILES_AVX512_H

#include "codes_avx512.h"

#include <stdbool.h>

enum {
    VECTOR_ROWS = 16,
    TURNED_VECTORS = 4,
    TURNED_TOKENS = 64,
    SLICE_COLUMNS = 512, /* 32 KiB of codes */
    TURNED_SUMS = 24,    /* registers for the products of some operands at a time */
    LEAST_TURNED = 8,    /* fewer tokens do not make up for the turning */
};
#define TURNED_OPERANDS(kind) (TURNED_SUMS / TURNED_VECTORS / (kind).planes)

#include "tiles.h"

/* With one plane of digits, it takes twice as many to make up for codes that lie across bytes (LEARNED 91). */
INLINE bool is_turned(int64_t tokens, struct kind kind) {
    return tokens >= (kind.planes == 1 && 8 % code_width(kind.code) != 0 ? 2 * LEAST_TURNED : LEAST_TURNED);
}

/* Sixteen rows of 16 words become columns: word w of all rows at to[w]. */
INLINE void turn(__m512i *to, const uint8_t *const *rows, int64_t at) {
    __m512i quads[16];
    UNROLL
    for (int i = 0; i < 4; i++) { /* in each 128-bit lane j word 4 * j + n of four rows at quads[4 * n + i] */
        const uint8_t *const *row = rows + 4 * i;
        const __m512i a = _mm512_loadu_si512(row[0] + at), b = _mm512_loadu_si512(row[1] + at);
        const __m512i c = _mm512_loadu_si512(row[2] + at), d = _mm512_loadu_si512(row[3] + at);
        const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
        quads[i] = _mm512_unpacklo_epi64(ab0, cd0);
        quads[4 + i] = _mm512_unpackhi_epi64(ab0, cd0);
        quads[8 + i] = _mm512_unpacklo_epi64(ab1, cd1);
        quads[12 + i] = _mm512_unpackhi_epi64(ab1, cd1);
    }
    UNROLL
    for (int n = 0; n < 4; n++) {
        const __m512i *q = quads + 4 * n;
        const __m512i even0 = _mm512_shuffle_i32x4(q[0], q[1], 0x88), even1 = _mm512_shuffle_i32x4(q[2], q[3], 0x88);
        const __m512i odd0 = _mm512_shuffle_i32x4(q[0], q[1], 0xdd), odd1 = _mm512_shuffle_i32x4(q[2], q[3], 0xdd);
        to[n] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        to[4 + n] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        to[8 + n] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        to[12 + n] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}

/* The same of as many vectors as each row has: word w of all rows at to[w]. */
APART void turn_vectors(uint8_t (*to)[TURNED_ROWS][4], const uint8_t *const *rows, int vectors) {
    for (int v = 0; v < vectors; v++) {
        __m512i words[16];
        turn(words, rows, 64 * v);
        UNROLL
        for (int i = 0; i < 16; i++) _mm512_store_si512(to[16 * v + i], words[i]);
    }
}

INLINE void turn_rows(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows,
                      int64_t block, int slice, struct kind kind) {
    const int parts = parts_of(kind), columns = slice_columns(kind), vectors = columns / parts / 64;
    const int slice_bytes = columns * code_width(kind.code) / 8;
    const int64_t at = block * BLOCK_GROUPS, left = w->shape.columns / kind.group_size - at;
    _Alignas(64) uint8_t bytes[16][SLICE_COLUMNS];
    uint8_t copies[16][MAX_BLOCK_BYTES + OVERREAD];
    const uint8_t *row[16];
    for (int64_t i = 0; i < 16; i++) {
        row[i] = block_codes(w, first + (i < rows ? i : rows - 1), block, copies[i], kind) + slice * slice_bytes;
        for (int j = slice_bytes; j < 2 * slice_bytes; j += 64) _mm_prefetch(row[i] + j, _MM_HINT_T1);
        if (in_order(kind)) continue;
        UNROLL
        for (int v = 0; v < vectors; v++) _mm512_store_si512(bytes[i] + 64 * v, packed_bytes(row[i], v, kind));
        row[i] = bytes[i];
    }
    if (parts == 1) turn_vectors((void *)turned->codes[0][VECTOR_ROWS * vector], row, vectors);
    for (int v = 0; v < vectors && parts > 1; v++) {
        __m512i words[16];
        turn(words, row, 64 * v);
        UNROLL
        for (int i = 0; i < 16; i++) {
            __m512i codes[4];
            take_apart(codes, words[i], kind);
            UNROLL
            for (int part = 0; part < parts; part++) {
                _mm512_store_si512(turned->codes[part * columns / parts / 4 + 16 * v + i][VECTOR_ROWS * vector], codes[part]);
            }
        }
    }
    if (slice != 0) return;
    _Alignas(64) float scale[16][BLOCK_GROUPS], bias[16][BLOCK_GROUPS];
    const uint8_t *scales[16], *biases[16];
    for (int64_t i = 0; i < 16; i++) {
        struct groups from = groups_of(w, first + (i < rows ? i : rows - 1));
        __m512 s, b;
        begin_span(&from, at, kind);
        sixteen_groups(&s, &b, &from, 0, at, left, 0, kind);
        _mm512_store_ps(scale[i], s);
        _mm512_store_ps(bias[i], b);
        scales[i] = (const uint8_t *)scale[i];
        biases[i] = (const uint8_t *)bias[i];
    }
    turn_vectors((void *)&turned->scale[0][VECTOR_ROWS * vector], scales, 1);
    turn_vectors((void *)&turned->bias[0][VECTOR_ROWS * vector], biases, 1);
}

INLINE void group_by_many(float (*lanes)[TURNED_ROWS], const struct turned *turned, const struct operand *x, int operands,
                          int64_t block, int at, int local, struct kind kind) {
    const int parts = parts_of(kind), joined = joined_digits(kind.code, kind.planes);
    const int runs = runs_of(kind), words = kind.group_size / parts / 4, run = words / runs;
    const int before = local * words / (16 * runs) * 16 * runs; /* words of the groups whose vectors lie before this one's */
    const int first = before + (local * words - before) / runs;
    const int64_t plane = BLOCK_GROUPS * kind.group_size, group = block * BLOCK_GROUPS + at;
    __m512i d[TURNED_SUMS / TURNED_VECTORS][TURNED_VECTORS]; /* [operands * planes] */
    UNROLL
    for (int n = 0; n < operands * kind.planes; n++) {
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) d[n][v] = _mm512_setzero_si512();
    }
    const int8_t *digits[TURNED_SUMS / TURNED_VECTORS];
    UNROLL
    for (int n = 0; n < operands; n++) {
        digits[n] = opaque(x[n].digits + block * kind.planes * plane + 4 * ((at - local) * words + first));
    }
    UNROLL
    for (int m = 0; m < parts * runs; m++) {
        const int part = m % parts, r = m / parts; /* of the runs */
        const uint8_t(*codes)[TURNED_ROWS][4] = &turned->codes[part * slice_columns(kind) / parts / 4 + first + 16 * r];
        UNROLL /* a loop of eight such steps takes half as long again (docs/LEARNED.md 91) */
        for (int i = 0; i < run; i++, codes++) {
            __m512i c[TURNED_VECTORS];
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) c[v] = in_register(_mm512_load_si512(codes[0][VECTOR_ROWS * v]));
            UNROLL
            for (int n = 0; n < operands * kind.planes; n++) {
                int32_t four;
                memcpy(&four, digits[n / kind.planes] + n % kind.planes * plane + part * plane / parts + 64 * r + 4 * i, sizeof four);
                const __m512i all = in_register(_mm512_set1_epi32(four));
                UNROLL
                for (int v = 0; v < TURNED_VECTORS; v++) d[n][v] = dot4(d[n][v], c[v], all, kind.code);
            }
            __asm__ volatile("" ::: "memory"); /* or a compiler loads the codes of all words at once and spills the sums */
        }
    }
    const __mmask16 begun = block == 0 ? 0 : 0xffff;
    UNROLL
    for (int o = 0; o < operands; o++) {
        const __m512 scale = _mm512_set1_ps(x[o].scale[group]), sum = _mm512_set1_ps(x[o].sum[group]);
        UNROLL
        for (int v = 0; v < TURNED_VECTORS; v++) {
            __m512i high = d[o * kind.planes][v], low = d[o * kind.planes + joined % kind.planes][v];
            UNROLL
            for (int p = 1; p < joined; p++) high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), d[o * kind.planes + p][v]);
            UNROLL
            for (int p = joined + 1; p < kind.planes; p++) low = _mm512_add_epi32(_mm512_slli_epi32(low, 8), d[o * kind.planes + p][v]);
            __m512 value = _mm512_cvtepi32_ps(high);
            if (joined < kind.planes) value = _mm512_fmadd_ps(value, _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low));
            float *lane = lanes[o] + VECTOR_ROWS * v;
            const __m512 before = _mm512_maskz_load_ps(begun, lane);
            const __m512 scales = _mm512_mul_ps(_mm512_load_ps(turned->scale[at] + VECTOR_ROWS * v), scale);
            const __m512 biases = _mm512_load_ps(turned->bias[at] + VECTOR_ROWS * v);
            _mm512_store_ps(lane, _mm512_fmadd_ps(biases, sum, _mm512_fmadd_ps(scales, value, before)));
        }
    }
}

/* Asks for what is turned first: rows lie further apart than the processor looks by itself. */
APART void ask_for_rows(const struct tile *tile, struct kind kind) {
    const int slice_bytes = slice_columns(kind) * code_width(kind.code) / 8;
    for (int s = 0; s < tile->streams; s++) {
        const struct weights *w = tile->weights[s];
        for (int64_t row = tile->first[s]; row < tile->first[s] + tile->rows; row++) {
            const struct groups from = groups_of(w, row);
            for (int j = 0; j < slice_bytes; j += 64) _mm_prefetch(w->weight + row * w->weight_stride + j, _MM_HINT_T1);
            _mm_prefetch(from.scales, _MM_HINT_T1);
            _mm_prefetch(from.biases, _MM_HINT_T1);
        }
    }
}

#endif
