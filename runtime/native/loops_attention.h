/* Softmax attention of a tile of queries over one block of keys. Included by loops_all.h. */
#ifndef SE_LOOPS_ATTENTION_H
#define SE_LOOPS_ATTENTION_H

#include "loops_rows.h"

enum { ROWS = 6 }; /* query rows at a time: as many sums as registers hold beside one set of keys */

#define INLINE static inline __attribute__((always_inline))

/* Scores of `rows` queries with KEY_LANES keys [width, KEY_LANES], to scores[r][0..]. */
INLINE void score_rows(int rows, const float *q, const float *keys, int64_t width, float scale, float *scores) {
    lanes sum[ROWS];
    for (int r = 0; r < rows; r++) sum[r] = lanes_all(0.0f);
    for (int64_t i = 0; i < width; i++) {
        lanes key = lanes_load(keys + KEY_LANES * i);
        for (int r = 0; r < rows; r++) sum[r] = lanes_fma(lanes_all(q[r * width + i]), key, sum[r]);
    }
    for (int r = 0; r < rows; r++) lanes_store(scores + r * BLOCK_KEYS, lanes_multiply(sum[r], lanes_all(scale)));
}

/* mixed[r][0..LANES] += probabilities[r] . values, over `keys` of them in order. */
INLINE void mix_rows(int rows, const float *probabilities, const float *values, int64_t keys, int64_t width,
                     float *mixed) {
    lanes sum[ROWS];
    for (int r = 0; r < rows; r++) sum[r] = lanes_load(mixed + r * width);
    for (int64_t j = 0; j < keys; j++) {
        lanes value = lanes_load(values + j * width);
        for (int r = 0; r < rows; r++) sum[r] = lanes_fma(lanes_all(probabilities[r * BLOCK_KEYS + j]), value, sum[r]);
    }
    for (int r = 0; r < rows; r++) lanes_store(mixed + r * width, sum[r]);
}

static void scores_of(const struct queries *queries, const float *keys, int64_t num_keys, float *scores) {
    const int64_t width = queries->width;
    for (int64_t j = 0; j < num_keys; j += KEY_LANES, keys += KEY_LANES * width) {
        int64_t r = 0;
        for (; r + ROWS <= queries->rows; r += ROWS) {
            score_rows(ROWS, queries->q + r * width, keys, width, queries->scale, scores + r * BLOCK_KEYS + j);
        }
        for (; r + 2 <= queries->rows; r += 2) {
            score_rows(2, queries->q + r * width, keys, width, queries->scale, scores + r * BLOCK_KEYS + j);
        }
        for (; r < queries->rows; r++) {
            score_rows(1, queries->q + r * width, keys, width, queries->scale, scores + r * BLOCK_KEYS + j);
        }
    }
}

static void mix(const struct queries *queries, const float *values, int64_t num_keys, const float *scores,
                float *mixed) {
    const int64_t width = queries->value_width;
    memset(mixed, 0, (size_t)(queries->rows * width) * sizeof *mixed);
    for (int64_t j = 0; j < num_keys; j += KEY_LANES) { /* a few keys at a time, so that they stay in the first cache */
        const int64_t keys = num_keys - j < KEY_LANES ? num_keys - j : KEY_LANES;
        for (int64_t c = 0; c < width; c += LANES) {
            const float *v = values + j * width + c;
            int64_t r = 0;
            for (; r + ROWS <= queries->rows; r += ROWS) {
                mix_rows(ROWS, scores + r * BLOCK_KEYS + j, v, keys, width, mixed + r * width + c);
            }
            for (; r + 2 <= queries->rows; r += 2) {
                mix_rows(2, scores + r * BLOCK_KEYS + j, v, keys, width, mixed + r * width + c);
            }
            for (; r < queries->rows; r++) {
                mix_rows(1, scores + r * BLOCK_KEYS + j, v, keys, width, mixed + r * width + c);
            }
        }
    }
}


/* Leaves out of a row's scores what its token does not see; returns how many are left. */
static int64_t select_scores(const uint8_t *selection, float *scores, int64_t n) {
    int64_t left = 0;
    for (int64_t j = 0; j < n; j++) {
        if (!selection[j]) scores[j] = -INFINITY;
        left += selection[j];
    }
    return left;
}

/* Where values are the first of the keys, which lie side by side: probabilities are turned, so that lanes are queries. */
static void mix_keys(const struct queries *queries, const float *keys, int64_t num_keys, const float *scores,
                     float *mixed) {
    enum { COLUMNS = 4 }; /* at a time */
    for (int64_t r = 0; r < queries->rows; r += LANES) {
        const int64_t rows = queries->rows - r < LANES ? queries->rows - r : LANES;
        float turned[BLOCK_KEYS * LANES], lane[LANES];
        for (int64_t j = 0; j < num_keys; j++) {
            for (int64_t l = 0; l < LANES; l++) turned[j * LANES + l] = l < rows ? scores[(r + l) * BLOCK_KEYS + j] : 0;
        }
        for (int64_t c = 0; c < queries->value_width; c += COLUMNS) {
            lanes sum[COLUMNS];
            for (int u = 0; u < COLUMNS; u++) sum[u] = lanes_all(0.0f);
            for (int64_t j = 0; j < num_keys; j++) {
                const float *key = keys + (j / KEY_LANES * queries->width + c) * KEY_LANES + j % KEY_LANES;
                const lanes p = lanes_load(turned + j * LANES);
                for (int u = 0; u < COLUMNS; u++) sum[u] = lanes_fma(lanes_all(key[u * KEY_LANES]), p, sum[u]);
            }
            for (int u = 0; u < COLUMNS; u++) {
                lanes_store(lane, sum[u]);
                for (int64_t l = 0; l < rows; l++) mixed[(r + l) * queries->value_width + c + u] = lane[l];
            }
        }
    }
}

static void attend(const struct queries *queries, int64_t first_key, const float *keys, const float *values,
                   float *scores, const struct partial *partial) {
    const int64_t advance = queries->together ? 0 : 1; /* from a token to the next */
    const int64_t last = queries->position + (queries->rows - 1) / queries->group * advance;
    const int64_t num_keys = last + 1 - first_key < BLOCK_KEYS ? last + 1 - first_key : BLOCK_KEYS;
    scores_of(queries, keys, num_keys, scores);
    for (int64_t r = 0; r < queries->rows; r++) {
        float *row = scores + r * BLOCK_KEYS;
        const int64_t position = queries->position + r / queries->group * advance;
        int64_t begin = position - queries->window + 1 - first_key, end = position + 1 - first_key;
        begin = begin < 0 ? 0 : begin < num_keys ? begin : num_keys;
        end = end < begin ? begin : end < num_keys ? end : num_keys;
        if (queries->selection != NULL) {
            const uint8_t *selection = queries->selection + r / queries->group * queries->selection_stride;
            if (select_scores(selection + first_key + begin, row + begin, end - begin) == 0) end = begin;
        }
        memset(row, 0, (size_t)begin * sizeof *row);
        memset(row + end, 0, (size_t)(num_keys - end) * sizeof *row);
        partial->largest[r] = largest(row + begin, end - begin);
        partial->sum[r] = 0.0f;
        if (end > begin) partial->sum[r] = exponents(row + begin, partial->largest[r], end - begin);
    }
    if (values == NULL) {
        mix_keys(queries, keys, num_keys, scores, partial->mixed);
    } else {
        mix(queries, values, num_keys, scores, partial->mixed);
    }
}

static void merge(const struct queries *queries, const struct partial *total, const struct partial *partial) {
    const int64_t width = queries->value_width;
    for (int64_t r = 0; r < queries->rows; r++) {
        const float before = total->largest[r], now = partial->largest[r];
        if (partial->sum[r] == 0.0f) continue; /* it saw nothing of this block */
        const float top = before > now ? before : now;
        const float keep = exp_nonpositive(before - top), take = exp_nonpositive(now - top);
        total->largest[r] = top;
        total->sum[r] = total->sum[r] * keep + partial->sum[r] * take;
        float *sum = total->mixed + r * width;
        const float *more = partial->mixed + r * width;
        for (int64_t i = 0; i < width; i++) sum[i] = sum[i] * keep + more[i] * take;
    }
}

#endif
