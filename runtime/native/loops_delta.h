/* The gated delta rule of one panel, token by token. Included by loops_all.h.
 *
 * Columns of a state never meet, so a panel of LANES columns stays in the first cache for all tokens of the call. Per
 * token, with rows i of the panel S: S[i] *= decay, or decay[i]; known = sum k[i] S[i]; u = (v - known) beta;
 * S[i] += k[i] u; y = sum q[i] S[i]. The sums run over even and odd rows, two chains, so that they do not wait for each other.
 * Without beta nothing is known, u = v, and one pass does.
 */
#ifndef SE_LOOPS_DELTA_H
#define SE_LOOPS_DELTA_H

#include "loops_rows.h"

static inline lanes load_some(const float *x, int64_t n) {
    float lane[LANES] = {0};
    memcpy(lane, x, (size_t)n * sizeof *x);
    return lanes_load(lane);
}

static inline void store_some(float *y, lanes x, int64_t n) {
    float lane[LANES];
    lanes_store(lane, x);
    memcpy(y, lane, (size_t)n * sizeof *y);
}

/* Decayed rows of the state, and what they hold for the key k; step is 1 where each row has its own decay, else 0. */
static inline __attribute__((always_inline)) lanes recall(const float *k, const float *decay, int64_t step,
                                                          int64_t rows, const float *state, float *new_state) {
    lanes known[2] = {lanes_all(0.0f), lanes_all(0.0f)};
    for (int64_t i = 0; i < rows; i += 2) {
        for (int j = 0; j < 2; j++) {
            lanes s = lanes_multiply(lanes_load(state + LANES * (i + j)), lanes_all(decay[(i + j) * step]));
            known[j] = lanes_fma(lanes_all(k[i + j]), s, known[j]);
            lanes_store(new_state + LANES * (i + j), s);
        }
    }
    return lanes_add(known[0], known[1]);
}

/* Writes the update under the key k, and reads under the query q. */
static inline lanes write_and_read(const float *k, const float *q, lanes update, int64_t rows, float *state) {
    lanes y[2] = {lanes_all(0.0f), lanes_all(0.0f)};
    for (int64_t i = 0; i < rows; i += 2) {
        for (int j = 0; j < 2; j++) {
            lanes s = lanes_fma(lanes_all(k[i + j]), update, lanes_load(state + LANES * (i + j)));
            y[j] = lanes_fma(lanes_all(q[i + j]), s, y[j]);
            lanes_store(state + LANES * (i + j), s);
        }
    }
    return lanes_add(y[0], y[1]);
}

/* Decays the state, writes the update under the key k, and reads under the query q. */
static inline lanes decay_write_and_read(const float *k, const float *q, float decay, lanes update, int64_t rows,
                                         const float *state, float *new_state) {
    lanes y[2] = {lanes_all(0.0f), lanes_all(0.0f)};
    for (int64_t i = 0; i < rows; i += 2) {
        for (int j = 0; j < 2; j++) {
            lanes s = lanes_multiply(lanes_load(state + LANES * (i + j)), lanes_all(decay));
            s = lanes_fma(lanes_all(k[i + j]), update, s);
            y[j] = lanes_fma(lanes_all(q[i + j]), s, y[j]);
            lanes_store(new_state + LANES * (i + j), s);
        }
    }
    return lanes_add(y[0], y[1]);
}

static void delta(const struct delta_panel *panel) {
    const float *state = panel->state;
    for (int64_t t = 0; t < panel->tokens; t++) {
        const float *k = panel->k + t * panel->key_stride, *q = panel->q + t * panel->key_stride;
        const float *decay = panel->decay + t * panel->decay_stride;
        lanes v = load_some(panel->v + t * panel->value_stride, panel->columns), y;
        if (panel->beta == NULL) {
            y = decay_write_and_read(k, q, *decay, v, panel->key_width, state, panel->new_state);
        } else {
            lanes known = panel->decay_by_channel ? recall(k, decay, 1, panel->key_width, state, panel->new_state)
                                                  : recall(k, decay, 0, panel->key_width, state, panel->new_state);
            lanes beta = lanes_all(panel->beta[t * panel->head_stride]);
            lanes update = lanes_multiply(lanes_fma(known, lanes_all(-1.0f), v), beta);
            y = write_and_read(k, q, update, panel->key_width, panel->new_state);
        }
        store_some(panel->y + t * panel->value_stride, y, panel->columns);
        state = panel->new_state;
    }
}

#endif
