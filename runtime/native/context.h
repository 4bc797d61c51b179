/* What a call works with: an instruction set, threads, scratch memory; and how work is shared out. */
#ifndef SE_CONTEXT_H
#define SE_CONTEXT_H

#include "kernels.h"
#include "loops.h"
#include "pool.h"

#include <stdatomic.h>
#include <stdbool.h>

struct se_context {
    const struct kernels *kernels;
    const struct loops *loops;
    struct pool *pool;
    uint8_t *scratch;
    int64_t scratch_bytes;
    _Atomic bool busy;
    int64_t entered_ns; /* of the call that is under way */
    int64_t kernel_ns;  /* in all calls so far */
};

/* Takes the context for one call. SE_BUSY when another thread has it; else every return goes through context_leave. */
int32_t context_enter(se_context *context);
int32_t context_leave(se_context *context, int32_t status);

/* Scratch memory of at least that size, on a multiple of ALIGNMENT; what it held is lost. False without memory. */
bool context_reserve(se_context *context, int64_t bytes);

/* Below this many multiplications a second thread costs more than it does. */
enum { FEW_PRODUCTS = 1 << 16 };

/* Runs work(job) on every thread, or on this one alone where there is little to do. */
static inline void context_run(se_context *context, void (*work)(void *), void *job, int64_t products) {
    if (products < FEW_PRODUCTS) {
        work(job);
    } else {
        pool_run(context->pool, work, job);
    }
}

/* Cuts a piece off a scratch: sizes first (memory NULL), then, after context_reserve, pointers. */
struct cutter {
    uint8_t *memory;
    int64_t used;
};

static inline void *cut(struct cutter *cutter, int64_t bytes) {
    void *piece = cutter->memory == NULL ? NULL : cutter->memory + cutter->used;
    cutter->used += round_up(bytes, ALIGNMENT);
    return piece;
}

/* A bench of numbered tasks that threads take one after another, whoever is free. */
struct tasks {
    _Atomic int64_t next;
    int64_t count;
};

static inline bool take(struct tasks *tasks, int64_t *task) {
    *task = atomic_fetch_add_explicit(&tasks->next, 1, memory_order_relaxed);
    return *task < tasks->count;
}

/* A matrix as a kernel wants it, and the kernel. */
struct product {
    struct weights weights;
    tile_fn *tile;
    const uint8_t *linear_bias; /* or NULL */
    int32_t linear_bias_dtype;
};

/* base: first byte of the record or tensor. SE_UNSUPPORTED when the description is none that a kernel implements. */
int32_t product_of(struct product *product, const struct kernels *kernels, int32_t precision, const se_matrix *matrix,
                   const uint8_t *base);

/* Whether one operand serves both. */
bool same_shape(const struct product *a, const struct product *b);

/* y [all rows] += the linear bias, where there is one, in rows first..first + rows. */
void add_linear_bias(const struct product *product, int64_t first, int64_t rows, float *y);

/* Rows of each stream per task: long enough that the hardware's prefetchers are worth starting. */
enum { TASK_ROWS = 64 };

/* All rows as tasks: row i and row i + rows / 2 together, two distant streams, TASK_ROWS of each; an odd last row. */
int64_t num_halves_tasks(int64_t rows);

/* One of those tasks, linear bias included: y[t] is the whole output of a token. */
void multiply_halves(const struct product *product, int64_t task, const uint8_t *const *operands, float *const *y,
                     int64_t tokens);

#endif
