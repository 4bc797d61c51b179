/* Causal convolution and the gated delta rule: channels and heads shared among threads, tokens in order. */
#include "context.h"

enum {
    MAX_KERNEL = 16,
    PANEL_TASK = 4, /* panels per task: long enough to be worth taking */
};

struct conv_job {
    const struct loops *loops;
    const float *x, *taps, *state;
    int64_t channels, kernel;
    float *y;
    struct tasks tokens;
};

/* Input number i of a sequence that begins kernel - 1 before x. */
static const float *conv_input(const struct conv_job *job, int64_t i) {
    const int64_t before = job->kernel - 1;
    return i < before ? job->state + i * job->channels : job->x + (i - before) * job->channels;
}

static void convolve_tokens(void *argument) {
    struct conv_job *job = argument;
    const float *inputs[MAX_KERNEL];
    for (int64_t t; take(&job->tokens, &t);) {
        for (int64_t j = 0; j < job->kernel; j++) inputs[j] = conv_input(job, t + j);
        job->loops->convolve(inputs, job->taps, job->kernel, job->channels, job->y + t * job->channels);
    }
}

int32_t se_causal_conv1d(se_context *context, const float *x, const float *taps, const float *state, int64_t tokens,
                         int64_t channels, int64_t kernel, float *y, float *new_state) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (kernel < 1 || kernel > MAX_KERNEL) return context_leave(context, SE_UNSUPPORTED);
    struct conv_job job = {context->loops, x, taps, state, channels, kernel, y, {0, tokens}};
    context_run(context, convolve_tokens, &job, tokens * channels);
    for (int64_t i = 0; i < kernel - 1; i++) {
        memcpy(new_state + i * channels, conv_input(&job, tokens + i), (size_t)channels * sizeof *new_state);
    }
    return context_leave(context, SE_OK);
}

struct delta_job {
    const struct loops *loops;
    const se_delta_shape *shape;
    const float *q, *k, *v, *decay, *beta, *state;
    int64_t tokens, panels; /* per head */
    float *new_state, *y;
    struct tasks tasks;
};

static void run_panel(const struct delta_job *job, int64_t number) {
    const se_delta_shape *s = job->shape;
    const int64_t head = number / job->panels, column = number % job->panels * LANES;
    const int64_t left = s->value_width - column, state = number * s->key_width * LANES;
    const int64_t key = head / (s->heads / s->key_heads) * s->key_width, value = head * s->value_width + column;
    const int64_t decay_width = s->decay_by_channel ? s->key_width : 1;
    const struct delta_panel panel = {
        .q = job->q + key,
        .k = job->k + key,
        .v = job->v + value,
        .decay = job->decay + head * decay_width,
        .decay_by_channel = s->decay_by_channel != 0,
        .decay_stride = s->heads * decay_width,
        .beta = job->beta == NULL ? NULL : job->beta + head,
        .key_stride = s->key_heads * s->key_width,
        .value_stride = s->heads * s->value_width,
        .head_stride = s->heads,
        .tokens = job->tokens,
        .key_width = s->key_width,
        .columns = left < LANES ? left : LANES,
        .state = job->state + state,
        .new_state = job->new_state + state,
        .y = job->y + value,
    };
    job->loops->delta(&panel);
}

static void run_panels(void *argument) {
    struct delta_job *job = argument;
    const int64_t all = job->shape->heads * job->panels;
    for (int64_t task; take(&job->tasks, &task);) {
        for (int64_t i = task * PANEL_TASK; i < (task + 1) * PANEL_TASK && i < all; i++) run_panel(job, i);
    }
}

int32_t se_delta_rule(se_context *context, const se_delta_shape *shape, const float *q, const float *k, const float *v,
                      const float *log_decay, const float *beta, int64_t tokens, const float *state, float *new_state,
                      float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (shape->key_heads < 1 || shape->heads % shape->key_heads != 0 || shape->key_width % 2 != 0 || tokens < 1 ||
        (beta == NULL && shape->decay_by_channel)) {
        return context_leave(context, SE_UNSUPPORTED);
    }
    const int64_t decays = tokens * shape->heads * (shape->decay_by_channel ? shape->key_width : 1);
    if (!context_reserve(context, 4 * decays)) return context_leave(context, SE_NO_MEMORY);
    float *decay = (float *)(void *)context->scratch;
    memcpy(decay, log_decay, (size_t)decays * sizeof *decay);
    context->loops->exponents(decay, 0.0f, decays);
    struct delta_job job = {
        .loops = context->loops, .shape = shape, .q = q, .k = k, .v = v, .decay = decay, .beta = beta, .state = state};
    job.tokens = tokens;
    job.panels = (shape->value_width + LANES - 1) / LANES;
    job.new_state = new_state;
    job.y = y;
    job.tasks.count = (shape->heads * job.panels + PANEL_TASK - 1) / PANEL_TASK;
    context_run(context, run_panels, &job, tokens * shape->heads * shape->key_width * shape->value_width);
    return context_leave(context, SE_OK);
}
