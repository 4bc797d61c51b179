/* Tiles of many operands for AVX-512: rows stand in lanes.
 *
 * A vector holds four columns of 16 rows, a 32-bit lane for each row, and meets four digits of one operand in all lanes:
 * a group's sums need no adding across lanes, and neither do the 16 lanes of kernels.h, which are vectors of 16 rows
 * here. Codes are unpacked and turned once for all operands (docs/LEARNED.md 68). */
#ifndef SE_TILES_AVX512_H
#define SE_TILES_AVX512_H

#include "codes_avx512.h"

#include <stdbool.h>

enum {
    TURNED_VECTORS = 4, /* of rows */
    TURNED_ROWS = 16 * TURNED_VECTORS,
    TURNED_TOKENS = 64,  /* whose sums are kept at a time */
    SLICE_COLUMNS = 512, /* the most that are turned at a time: 32 KiB of codes */
    SLICE_WORDS = SLICE_COLUMNS / 4,
    TURNED_SUMS = 24,    /* registers for the products of some operands at a time */
    LEAST_TURNED = 8,    /* fewer tokens do not make up for the turning */
};

/* Some groups of a block of 64 rows; scales and biases are those of the whole block. */
struct turned {
    _Alignas(64) __m512i codes[SLICE_WORDS][TURNED_VECTORS]; /* in the order of digits, four columns a word */
    __m512 scale[BLOCK_GROUPS][TURNED_VECTORS];
    __m512 bias[BLOCK_GROUPS][TURNED_VECTORS];
};

/* With one plane of digits, it takes twice as many to make up for codes that lie across bytes (LEARNED 91). */
INLINE bool is_turned(int64_t tokens, struct kind kind) {
    return tokens >= (kind.planes == 1 && 8 % code_width(kind.code) != 0 ? 2 * LEAST_TURNED : LEAST_TURNED);
}

INLINE int slice_columns(struct kind kind) {
    const int block = BLOCK_GROUPS * kind.group_size;
    return block < SLICE_COLUMNS ? block : SLICE_COLUMNS;
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

/* The same of as many vectors as each row has: word w of all rows at to[w][0]. */
APART void turn_vectors(__m512i (*to)[TURNED_VECTORS], const uint8_t *const *rows, int vectors) {
    for (int v = 0; v < vectors; v++) {
        __m512i words[16];
        turn(words, rows, 64 * v);
        UNROLL
        for (int i = 0; i < 16; i++) _mm512_store_si512(to[16 * v + i], words[i]);
    }
}

/* Slice `slice` of a block of 16 rows from `first` on, of which the last may stand for those that do not exist. */
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
        if (8 % code_width(kind.code) == 0) continue;
        UNROLL
        for (int v = 0; v < vectors; v++) _mm512_store_si512(bytes[i] + 64 * v, packed_bytes(row[i], v, kind));
        row[i] = bytes[i];
    }
    if (parts == 1) turn_vectors((void *)&turned->codes[0][vector], row, vectors);
    for (int v = 0; v < vectors && parts > 1; v++) {
        __m512i words[16];
        turn(words, row, 64 * v);
        UNROLL
        for (int i = 0; i < 16; i++) {
            __m512i(*to)[TURNED_VECTORS] = &turned->codes[16 * v + i], codes[4];
            take_apart(codes, words[i], kind);
            UNROLL
            for (int part = 0; part < parts; part++) _mm512_store_si512(&to[part * columns / parts / 4][vector], codes[part]);
        }
    }
    if (slice != 0) return;
    _Alignas(64) float scale[16][BLOCK_GROUPS], bias[16][BLOCK_GROUPS];
    const uint8_t *scales[16], *biases[16];
    for (int64_t i = 0; i < 16; i++) {
        struct groups from = groups_of(w, first + (i < rows ? i : rows - 1));
        __m512 s, b;
        sixteen_groups(&s, &b, &from, 0, at, left, kind);
        _mm512_store_ps(scale[i], s);
        _mm512_store_ps(bias[i], b);
        scales[i] = (const uint8_t *)scale[i];
        biases[i] = (const uint8_t *)bias[i];
    }
    turn_vectors((void *)&turned->scale[0][vector], scales, 1);
    turn_vectors((void *)&turned->bias[0][vector], biases, 1);
}

/* turn_rows of one kind. */
typedef void turn_fn(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows, int64_t block,
                     int slice);

/* A group, `at` within its block and `local` within its slice, of 64 rows times some operands. lanes: those of this
 * group, by operand */
INLINE void group_by_many(__m512 (*lanes)[TURNED_VECTORS], const struct turned *turned, const struct operand *x,
                          int operands, int64_t block, int at, int local, struct kind kind) {
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
        const __m512i *codes = turned->codes[part * slice_columns(kind) / parts / 4 + first + 16 * r];
        UNROLL /* a loop of eight such steps takes half as long again (docs/LEARNED.md 91) */
        for (int i = 0; i < run; i++, codes += TURNED_VECTORS) {
            __m512i c[TURNED_VECTORS];
            UNROLL
            for (int v = 0; v < TURNED_VECTORS; v++) c[v] = in_register(_mm512_load_si512(codes + v));
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
            __m512 lane = _mm512_maskz_load_ps(begun, lanes[o] + v);
            lane = _mm512_fmadd_ps(_mm512_mul_ps(turned->scale[at][v], scale), value, lane);
            lanes[o][v] = _mm512_fmadd_ps(turned->bias[at][v], sum, lane);
        }
    }
}

/* Lanes of 64 rows at most, by token, to the tree of kernels.h. */
APART void add_turned(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens,
                      const __m512 (*lanes)[TURNED_TOKENS][TURNED_VECTORS]) {
    for (int64_t t = 0; t < tokens; t++) {
        float *y = tile->y[s][token + t] + tile->first[s] + first;
        for (int v = 0; 16 * v < rows; v++) {
            __m512 q[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                const __m512(*l)[TURNED_TOKENS][TURNED_VECTORS] = lanes + 4 * i;
                q[i] = _mm512_add_ps(_mm512_add_ps(l[0][t][v], l[2][t][v]), _mm512_add_ps(l[1][t][v], l[3][t][v]));
            }
            const __m512 sum = _mm512_add_ps(_mm512_add_ps(q[0], q[1]), _mm512_add_ps(q[2], q[3]));
            _mm512_mask_storeu_ps(y + 16 * v, present(rows - 16 * v), sum);
        }
    }
}

/* Rows first..first + rows, 64 at most, times up to TURNED_TOKENS operands. */
INLINE void turned_by_many(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens,
                           struct kind kind, turn_fn *turn_some) {
    const struct weights *w = tile->weights[s];
    const int slices = BLOCK_GROUPS * kind.group_size / slice_columns(kind), in_slice = BLOCK_GROUPS / slices;
    const int64_t groups = w->shape.columns / kind.group_size;
    struct turned turned;
    __m512 lanes[BLOCK_GROUPS][TURNED_TOKENS][TURNED_VECTORS]; /* tokens side by side: 4 KiB apart they evict each other */
    struct operand x[TURNED_TOKENS];
    for (int64_t t = 0; t < tokens; t++) x[t] = operand_at(&w->shape, tile->operands[token + t]);
    for (int64_t i = groups; i < BLOCK_GROUPS; i++) memset(lanes[i], 0, (size_t)tokens * sizeof lanes[i][0]);
    for (int64_t block = 0; block * BLOCK_GROUPS < groups; block++) {
        const int64_t left = groups - block * BLOCK_GROUPS;
        for (int slice = 0; slice < slices && slice * in_slice < left; slice++) {
            for (int v = 0; v < TURNED_VECTORS; v++) {
                const int64_t skip = 16 * v < rows ? 16 * v : rows - 1; /* vectors of no rows repeat the last one */
                turn_some(&turned, v, w, tile->first[s] + first + skip, rows - skip < 16 ? rows - skip : 16, block, slice);
            }
            for (int i = 0; i < in_slice && slice * in_slice + i < left; i++) {
                const int at = slice * in_slice + i;
                const int together = TURNED_SUMS / TURNED_VECTORS / kind.planes;
                int64_t t = 0;
                for (; t + together <= tokens; t += together) {
                    group_by_many(lanes[at] + t, &turned, x + t, together, block, at, i, kind);
                }
                for (; t < tokens; t++) group_by_many(lanes[at] + t, &turned, x + t, 1, block, at, i, kind);
            }
        }
    }
    add_turned(tile, s, first, rows, token, tokens, lanes);
}

/* Asks for what is turned first: rows lie further apart than the processor looks by itself. */
static void ask_for_rows(const struct weights *w, int64_t first, int64_t rows, struct kind kind) {
    const int slice_bytes = slice_columns(kind) * code_width(kind.code) / 8;
    for (int64_t row = first; row < first + rows; row++) {
        const struct groups from = groups_of(w, row);
        for (int j = 0; j < slice_bytes; j += 64) _mm_prefetch(w->weight + row * w->weight_stride + j, _MM_HINT_T1);
        _mm_prefetch(from.scales, _MM_HINT_T1);
        _mm_prefetch(from.biases, _MM_HINT_T1);
    }
}

/* turned_by_many of one kind. */
typedef void turned_fn(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens);

/* All rows of all streams times all tokens. */
APART void turned_tile(const struct tile *tile, struct kind kind, turned_fn *by_many) {
    for (int s = 0; s < tile->streams; s++) ask_for_rows(tile->weights[s], tile->first[s], tile->rows, kind);
    for (int s = 0; s < tile->streams; s++) {
        for (int64_t first = 0; first < tile->rows; first += TURNED_ROWS) {
            const int64_t rows = tile->rows - first < TURNED_ROWS ? tile->rows - first : TURNED_ROWS;
            for (int64_t token = 0; token < tile->tokens; token += TURNED_TOKENS) {
                const int64_t left = tile->tokens - token;
                by_many(tile, s, first, rows, token, left < TURNED_TOKENS ? left : TURNED_TOKENS);
            }
        }
    }
}

#endif
