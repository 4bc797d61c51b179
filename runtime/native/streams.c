/* Several residual streams, and entries that stand for tokens: what is DeepSeek-V4's own. */
#include "context.h"
#include "scalar.h"

#include <math.h>

enum { COLUMNS = 1024 }; /* of a stream per task */

struct streams_job {
    const float *h, *y, *pre, *post, *comb, *mixes, *scale, *base;
    int64_t streams, columns, blocks, iterations;
    float eps;
    float *out, *pre_out, *post_out, *comb_out;
    struct tasks tasks;
};

/* ---- weights */

/* Divides each column, or each row, of comb [n, n] by its sum + eps. */
static void divide(float *comb, int64_t n, int64_t along, int64_t across, float eps) {
    for (int64_t i = 0; i < n; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < n; j++) sum += comb[i * along + j * across];
        for (int64_t j = 0; j < n; j++) comb[i * along + j * across] /= sum + eps;
    }
}

static void weights_of_token(const struct streams_job *job, int64_t t) {
    const int64_t n = job->streams;
    const float *mixes = job->mixes + t * (2 + n) * n, *base = job->base;
    float *pre = job->pre_out + t * n, *post = job->post_out + t * n, *comb = job->comb_out + t * n * n;
    for (int64_t i = 0; i < n; i++) {
        pre[i] = sigmoid(mixes[i] * job->scale[0] + base[i]) + job->eps;
        post[i] = 2.0f * sigmoid(mixes[n + i] * job->scale[1] + base[n + i]);
    }
    for (int64_t i = 0; i < n; i++) {
        float *row = comb + i * n, largest = -INFINITY, sum = 0.0f;
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = 2 * n + i * n + j;
            row[j] = mixes[at] * job->scale[2] + base[at];
            largest = row[j] > largest ? row[j] : largest;
        }
        for (int64_t j = 0; j < n; j++) sum += row[j] = exp_nonpositive(row[j] - largest);
        for (int64_t j = 0; j < n; j++) row[j] = row[j] / sum + job->eps;
    }
    divide(comb, n, 1, n, job->eps);
    for (int64_t i = 1; i < job->iterations; i++) {
        divide(comb, n, n, 1, job->eps);
        divide(comb, n, 1, n, job->eps);
    }
}

static void weights_of_tokens(void *argument) {
    struct streams_job *job = argument;
    for (int64_t t; take(&job->tasks, &t);) weights_of_token(job, t);
}

int32_t se_stream_weights(se_context *context, const float *mixes, const float *scale, const float *base,
                          int64_t tokens, int64_t streams, int64_t iterations, float eps, float *pre, float *post,
                          float *comb) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (streams < 1 || iterations < 1) return context_leave(context, SE_UNSUPPORTED);
    struct streams_job job = {.mixes = mixes, .scale = scale, .base = base, .streams = streams, .eps = eps};
    job.iterations = iterations;
    job.pre_out = pre;
    job.post_out = post;
    job.comb_out = comb;
    job.tasks = (struct tasks){0, tokens};
    context_run(context, weights_of_tokens, &job, tokens * streams * streams * 8 * iterations);
    return context_leave(context, SE_OK);
}

/* ---- streams to one, and back; a task is some columns of a token */

static void collapse(void *argument) {
    struct streams_job *job = argument;
    const int64_t n = job->streams, columns = job->columns;
    for (int64_t task; take(&job->tasks, &task);) {
        const int64_t t = task / job->blocks, begin = task % job->blocks * COLUMNS;
        const int64_t end = begin + COLUMNS < columns ? begin + COLUMNS : columns;
        const float *h = job->h + t * n * columns, *pre = job->pre + t * n;
        float *y = job->out + t * columns;
        for (int64_t c = begin; c < end; c++) y[c] = h[c] * pre[0];
        for (int64_t i = 1; i < n; i++) {
            for (int64_t c = begin; c < end; c++) y[c] += h[i * columns + c] * pre[i];
        }
    }
}

int32_t se_collapse_streams(se_context *context, const float *h, const float *pre, int64_t tokens, int64_t streams,
                            int64_t columns, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct streams_job job = {.h = h, .pre = pre, .streams = streams, .columns = columns, .out = y};
    job.blocks = (columns + COLUMNS - 1) / COLUMNS;
    job.tasks = (struct tasks){0, tokens * job.blocks};
    context_run(context, collapse, &job, tokens * streams * columns);
    return context_leave(context, SE_OK);
}

static void expand(void *argument) {
    struct streams_job *job = argument;
    const int64_t n = job->streams, columns = job->columns;
    for (int64_t task; take(&job->tasks, &task);) {
        const int64_t t = task / job->blocks, begin = task % job->blocks * COLUMNS;
        const int64_t end = begin + COLUMNS < columns ? begin + COLUMNS : columns;
        const float *h = job->h + t * n * columns, *y = job->y + t * columns;
        for (int64_t j = 0; j < n; j++) {
            const float post = job->post[t * n + j];
            float *next = job->out + (t * n + j) * columns;
            for (int64_t c = begin; c < end; c++) next[c] = post * y[c];
            for (int64_t i = 0; i < n; i++) {
                const float comb = job->comb[(t * n + i) * n + j];
                for (int64_t c = begin; c < end; c++) next[c] += comb * h[i * columns + c];
            }
        }
    }
}

int32_t se_expand_streams(se_context *context, const float *h, const float *y, const float *post, const float *comb,
                          int64_t tokens, int64_t streams, int64_t columns, float *next) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct streams_job job = {.h = h, .y = y, .post = post, .comb = comb, .streams = streams, .columns = columns};
    job.out = next;
    job.blocks = (columns + COLUMNS - 1) / COLUMNS;
    job.tasks = (struct tasks){0, tokens * job.blocks};
    context_run(context, expand, &job, tokens * streams * (streams + 1) * columns);
    return context_leave(context, SE_OK);
}

/* ---- entries */

struct pool_job {
    const float *values, *gates;
    int64_t slots, width;
    float *y;
    struct tasks windows;
};

static void pool_windows(void *argument) {
    struct pool_job *job = argument;
    const int64_t slots = job->slots, width = job->width;
    for (int64_t w; take(&job->windows, &w);) {
        const float *values = job->values + w * slots * width, *gates = job->gates + w * slots * width;
        for (int64_t c = 0; c < width; c++) {
            float largest = -INFINITY, sum = 0.0f, mixed = 0.0f;
            for (int64_t s = 0; s < slots; s++) largest = gates[s * width + c] > largest ? gates[s * width + c] : largest;
            for (int64_t s = 0; s < slots; s++) {
                const float share = exp_nonpositive(gates[s * width + c] - largest);
                sum += share;
                mixed += share * values[s * width + c];
            }
            job->y[w * width + c] = mixed / sum;
        }
    }
}

int32_t se_pool(se_context *context, const float *values, const float *gates, int64_t windows, int64_t slots,
                int64_t width, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct pool_job job = {values, gates, slots, width, y, {0, windows}};
    context_run(context, pool_windows, &job, 16 * windows * slots * width);
    return context_leave(context, SE_OK);
}
