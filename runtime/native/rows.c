/* Norms, element by element, rotation: rows shared among threads. */
#include "context.h"

enum {
    MAP_VALUES = 4096,  /* values per task of a map */
    DECAY_VALUES = 512, /* of decays, which take longer */
};

struct rows_job {
    const struct loops *loops;
    const float *x, *weight;
    float eps, scale;
    int64_t columns, total;
    int32_t map;
    const float *cosine, *sine;
    int64_t heads, half;
    int32_t interleaved;
    float *y;
    struct tasks rows;
};

static void rms_norms(void *argument) {
    struct rows_job *job = argument;
    for (int64_t r; take(&job->rows, &r);) {
        const int64_t at = r * job->columns;
        job->loops->rms_norm(job->x + at, job->weight, job->eps, job->columns, job->y + at);
    }
}

int32_t se_rms_norm(se_context *context, const float *x, int64_t rows, int64_t columns, const float *weight, float eps,
                    float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct rows_job job = {
        .loops = context->loops, .x = x, .weight = weight, .eps = eps, .columns = columns, .y = y, .rows = {0, rows}};
    context_run(context, rms_norms, &job, rows * columns);
    return context_leave(context, SE_OK);
}

struct add_norm_job {
    const se_context *context;
    const float *h, *y, *weight;
    float multiplier, eps;
    int64_t columns;
    float *sum, *x;
    struct tasks rows;
};

static void add_norms(void *argument) {
    struct add_norm_job *job = argument;
    for (int64_t r; take(&job->rows, &r);) {
        const int64_t at = r * job->columns;
        float *sum = job->sum + at;
        memcpy(sum, job->h + at, (size_t)job->columns * sizeof *sum);
        job->context->kernels->add_scaled(sum, job->y + at, job->multiplier, job->columns);
        job->context->loops->rms_norm(sum, job->weight, job->eps, job->columns, job->x + at);
    }
}

int32_t se_add_norm(se_context *context, const float *h, const float *y, float multiplier, int64_t rows,
                    int64_t columns, const float *weight, float eps, float *sum, float *x) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct add_norm_job job = {context, h, y, weight, multiplier, eps, columns, sum, x, {0, rows}};
    context_run(context, add_norms, &job, rows * columns);
    return context_leave(context, SE_OK);
}

static void l2_norms(void *argument) {
    struct rows_job *job = argument;
    for (int64_t r; take(&job->rows, &r);) {
        const int64_t at = r * job->columns;
        job->loops->l2_norm(job->x + at, job->eps, job->scale, job->columns, job->y + at);
    }
}

int32_t se_l2_norm(se_context *context, const float *x, int64_t rows, int64_t columns, float eps, float scale,
                   float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct rows_job job = {
        .loops = context->loops, .x = x, .eps = eps, .scale = scale, .columns = columns, .y = y, .rows = {0, rows}};
    context_run(context, l2_norms, &job, rows * columns);
    return context_leave(context, SE_OK);
}

static void maps(void *argument) {
    struct rows_job *job = argument;
    for (int64_t task; take(&job->rows, &task);) {
        const int64_t at = task * MAP_VALUES, left = job->total - at;
        job->loops->map(job->map, job->x + at, left < MAP_VALUES ? left : MAP_VALUES, job->y + at);
    }
}

int32_t se_map(se_context *context, int32_t map, const float *x, int64_t n, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct rows_job job = {.loops = context->loops, .x = x, .map = map, .total = n, .y = y};
    job.rows.count = (n + MAP_VALUES - 1) / MAP_VALUES;
    context_run(context, maps, &job, 16 * n);
    return context_leave(context, SE_OK);
}

static void gates(void *argument) {
    struct rows_job *job = argument;
    for (int64_t task; take(&job->rows, &task);) {
        const int64_t at = task * MAP_VALUES, left = job->total - at, n = left < MAP_VALUES ? left : MAP_VALUES;
        float gate[MAP_VALUES];
        job->loops->map(job->map, job->weight + at, n, gate);
        for (int64_t i = 0; i < n; i++) job->y[at + i] = job->x[at + i] * gate[i];
    }
}

int32_t se_gate(se_context *context, int32_t map, const float *x, const float *gate, int64_t n, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct rows_job job = {.loops = context->loops, .x = x, .weight = gate, .map = map, .total = n, .y = y};
    job.rows.count = (n + MAP_VALUES - 1) / MAP_VALUES;
    context_run(context, gates, &job, 16 * n);
    return context_leave(context, SE_OK);
}

struct decay_job {
    const float *a, *dt_bias, *a_log;
    int64_t channels, total;
    float *y;
    struct tasks blocks; /* of DECAY_VALUES */
};

/* By the C library's functions, which are not vectors. */
static void decays(void *argument) {
    struct decay_job *job = argument;
    for (int64_t block; take(&job->blocks, &block);) {
        for (int64_t i = block * DECAY_VALUES; i < (block + 1) * DECAY_VALUES && i < job->total; i++) {
            const float x = job->a[i] + job->dt_bias[i % job->channels];
            const float softplus = (x > 0 ? x : 0.0f) + log1pf(expf(-fabsf(x)));
            job->y[i] = -expf(job->a_log[i % job->channels]) * (x == x ? softplus : x);
        }
    }
}

int32_t se_decay(se_context *context, const float *a, const float *dt_bias, const float *a_log, int64_t tokens,
                 int64_t channels, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    const int64_t total = tokens * channels;
    struct decay_job job = {a, dt_bias, a_log, channels, total, y, {0, (total + DECAY_VALUES - 1) / DECAY_VALUES}};
    context_run(context, decays, &job, 64 * total);
    return context_leave(context, SE_OK);
}

static void rotations(void *argument) {
    struct rows_job *job = argument;
    for (int64_t r; take(&job->rows, &r);) {
        const int64_t at = r * job->columns, angle = r / job->heads * job->half;
        job->loops->rotate(job->x + at, job->cosine + angle, job->sine + angle, job->half, job->columns, job->interleaved,
                           job->y + at);
    }
}

int32_t se_rope(se_context *context, const float *x, int64_t tokens, int64_t heads, int64_t d, int64_t half,
                int32_t interleaved, const float *cosine, const float *sine, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (heads < 1 || half < 0 || 2 * half > d) return context_leave(context, SE_UNSUPPORTED);
    struct rows_job job = {.loops = context->loops, .x = x, .columns = d, .cosine = cosine, .sine = sine};
    job.heads = heads;
    job.half = half;
    job.interleaved = interleaved;
    job.y = y;
    job.rows.count = tokens * heads;
    context_run(context, rotations, &job, tokens * heads * d);
    return context_leave(context, SE_OK);
}
