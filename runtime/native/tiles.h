/* Tiles of many operands: rows stand in lanes. What their loops have in common; an instruction set has defined before it
 *
 *     VECTOR_ROWS, TURNED_VECTORS      32-bit lanes of a vector, and vectors of rows
 *     TURNED_TOKENS, SLICE_COLUMNS     whose sums are kept, and that are turned at a time
 *     TURNED_OPERANDS(kind)            that share each load of codes
 *
 * and says in turn_rows how codes are turned and in group_by_many how they meet digits. A vector holds four columns of
 * VECTOR_ROWS rows and meets four digits of one operand in all lanes: a group's sums need no adding across lanes, and
 * neither do the 16 lanes of kernels.h. Codes are unpacked and turned once for all operands (docs/LEARNED.md 68, 98). */
#ifndef SE_TILES_H
#define SE_TILES_H

#include "straight.h"

enum { TURNED_ROWS = VECTOR_ROWS * TURNED_VECTORS };

/* Some groups of a block of rows; scales and biases are those of the whole block. */
struct turned {
    _Alignas(64) uint8_t codes[SLICE_COLUMNS / 4][TURNED_ROWS][4]; /* in the order of digits, four columns a word */
    float scale[BLOCK_GROUPS][TURNED_ROWS];
    float bias[BLOCK_GROUPS][TURNED_ROWS];
};

INLINE int slice_columns(struct kind kind) {
    const int block = BLOCK_GROUPS * kind.group_size;
    return block < SLICE_COLUMNS ? block : SLICE_COLUMNS;
}

/* Slice `slice` of a block of VECTOR_ROWS rows from `first` on, of which the last may stand for those that do not exist. */
INLINE void turn_rows(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows,
                      int64_t block, int slice, struct kind kind);

/* turn_rows of one kind. */
typedef void turn_fn(struct turned *turned, int vector, const struct weights *w, int64_t first, int64_t rows, int64_t block,
                     int slice);

/* A group, `at` within its block and `local` within its slice, of all rows times some operands. lanes: those of this
 * group, by operand */
INLINE void group_by_many(float (*lanes)[TURNED_ROWS], const struct turned *turned, const struct operand *x, int operands,
                          int64_t block, int at, int local, struct kind kind);

/* Lanes of some rows, by token, to the tree of kernels.h. */
APART void add_turned(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens,
                      const float (*lanes)[TURNED_TOKENS][TURNED_ROWS]) {
    for (int64_t t = 0; t < tokens; t++) {
        float y[TURNED_ROWS];
        for (int r = 0; r < TURNED_ROWS; r++) {
            float q[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                const float(*l)[TURNED_TOKENS][TURNED_ROWS] = lanes + 4 * i;
                q[i] = (l[0][t][r] + l[2][t][r]) + (l[1][t][r] + l[3][t][r]);
            }
            y[r] = (q[0] + q[1]) + (q[2] + q[3]);
        }
        memcpy(tile->y[s][token + t] + tile->first[s] + first, y, (size_t)rows * sizeof *y);
    }
}

/* Rows first..first + rows, TURNED_ROWS at most, times up to TURNED_TOKENS operands. */
INLINE void turned_by_many(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens,
                           struct kind kind, turn_fn *turn_some) {
    const struct weights *w = tile->weights[s];
    const int slices = BLOCK_GROUPS * kind.group_size / slice_columns(kind), in_slice = BLOCK_GROUPS / slices;
    const int64_t groups = w->shape.columns / kind.group_size;
    struct turned turned;
    _Alignas(64) float lanes[BLOCK_GROUPS][TURNED_TOKENS][TURNED_ROWS]; /* tokens side by side: 4 KiB apart they evict each other */
    struct operand x[TURNED_TOKENS];
    for (int64_t t = 0; t < tokens; t++) x[t] = operand_at(&w->shape, tile->operands[token + t]);
    for (int64_t i = groups; i < BLOCK_GROUPS; i++) memset(lanes[i], 0, (size_t)tokens * sizeof lanes[i][0]);
    for (int64_t block = 0; block * BLOCK_GROUPS < groups; block++) {
        const int64_t left = groups - block * BLOCK_GROUPS;
        for (int slice = 0; slice < slices && slice * in_slice < left; slice++) {
            for (int v = 0; v < TURNED_VECTORS; v++) {
                const int64_t skip = VECTOR_ROWS * v < rows ? VECTOR_ROWS * v : rows - 1; /* else the last row once more */
                const int64_t some = rows - skip < VECTOR_ROWS ? rows - skip : VECTOR_ROWS;
                turn_some(&turned, v, w, tile->first[s] + first + skip, some, block, slice);
            }
            for (int i = 0; i < in_slice && slice * in_slice + i < left; i++) {
                const int at = slice * in_slice + i;
                int64_t t = 0;
                for (; t + TURNED_OPERANDS(kind) <= tokens; t += TURNED_OPERANDS(kind)) {
                    group_by_many(lanes[at] + t, &turned, x + t, TURNED_OPERANDS(kind), block, at, i, kind);
                }
                for (; t < tokens; t++) group_by_many(lanes[at] + t, &turned, x + t, 1, block, at, i, kind);
            }
        }
    }
    add_turned(tile, s, first, rows, token, tokens, (const float(*)[TURNED_TOKENS][TURNED_ROWS])lanes);
}

/* turned_by_many of one kind. */
typedef void turned_fn(const struct tile *tile, int s, int64_t first, int64_t rows, int64_t token, int64_t tokens);

/* All rows of all streams times all tokens. */
APART void turned_tile(const struct tile *tile, turned_fn *by_many) {
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
