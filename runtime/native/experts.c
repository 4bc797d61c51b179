/* The chosen experts of a step, computed from their records in place.
 *
 * Phases with a barrier between: inputs to operands, gate and up rows and their activation, h to operands, down rows,
 * norms of what came of them, where there are any.
 * Within a phase threads take tasks of rows. Experts with few pairs go together in a batch, so that a decode step walks
 * once through the phases; BATCH_PAIRS bounds the scratch of a batch. Without a gate the up matrix stands for it, too, and
 * its rows are multiplied once. */
#include "context.h"

enum { BATCH_PAIRS = 256 };

struct expert {
    struct product gate, up, down;
    int64_t first; /* its pairs among those of the batch */
    int64_t count;
};

struct job {
    const struct kernels *kernels;
    const struct loops *loops;
    struct pool *pool;
    const se_expert_layout *layout;
    const se_expert_norm *norm; /* or NULL */
    const float *x;       /* [T, D] */
    const float *weights; /* [T * k] */
    int64_t k;

    /* Inputs: each token that a pair names; or each pair, when the routing weight scales the input. */
    int64_t num_inputs;
    int64_t *input_pair; /* [inputs] one of its pairs */
    int64_t *input_of;   /* [T * k] by pair */
    float *scaled;       /* [inputs, D] */
    uint8_t *inputs[2];  /* operands [inputs] for gate and for up, often the same */

    struct expert *experts; /* of the batch */
    int64_t num_experts;
    int64_t num_pairs;
    float *h[2];          /* [pairs, F]: gate, up */
    uint8_t *h_operands;  /* [pairs] */
    const uint8_t **x_at[2], **h_at; /* [pairs] operands */
    float **h_y[2], **y;             /* [pairs] results */
    struct tasks prepare_inputs, gate_up, prepare_h, down, norms;
};

static void prepare_input(const struct job *job, const struct expert *any, int64_t input) {
    const int64_t columns = job->layout->up.columns, pair = job->input_pair[input];
    const float *x = job->x + pair / job->k * columns;
    if (job->layout->activation.scale_input) {
        float *scaled = job->scaled + input * columns;
        for (int64_t i = 0; i < columns; i++) scaled[i] = job->weights[pair] * x[i];
        x = scaled;
    }
    const struct shape *gate = &any->gate.weights.shape, *up = &any->up.weights.shape;
    job->kernels->prepare(gate, x, job->inputs[0] + input * operand_bytes(gate));
    if (job->inputs[1] != job->inputs[0]) job->kernels->prepare(up, x, job->inputs[1] + input * operand_bytes(up));
}

static int64_t chunks(int64_t rows) {
    return (rows + TASK_ROWS - 1) / TASK_ROWS;
}

/* An activation that takes no gate. */
static bool ungated(const se_expert_layout *layout) {
    return layout->activation.kind == SE_RELU2;
}

static void square_positive(float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = up[i] < 0.0f ? 0.0f : up[i];
        up[i] = x * x;
    }
}

/* TASK_ROWS rows of gate and of up, which lie far apart in the record: two streams of one tile, if they share operands and
 * the kind of scales. */
static void gate_up(const struct job *job, int64_t task) {
    const int64_t rows = job->layout->up.rows, per_expert = chunks(rows);
    const struct expert *e = &job->experts[task / per_expert];
    const struct product *products[2] = {&e->gate, &e->up};
    const int64_t begin = task % per_expert * TASK_ROWS, left = rows - begin;
    const bool together = job->inputs[0] == job->inputs[1] && e->gate.weights.encoding == e->up.weights.encoding;
    struct tile tile = {.rows = left < TASK_ROWS ? left : TASK_ROWS, .tokens = e->count};
    for (int s = ungated(job->layout); s < 2; s++) {
        tile.weights[tile.streams] = &products[s]->weights;
        tile.first[tile.streams] = begin;
        tile.y[tile.streams] = job->h_y[s] + e->first;
        tile.operands = job->x_at[s] + e->first;
        tile.streams++;
        if (!together || s == 1) {
            products[s]->tile(&tile);
            tile.streams = 0;
        }
    }
    for (int64_t p = e->first; p < e->first + e->count; p++) {
        if (ungated(job->layout)) {
            add_linear_bias(&e->up, begin, tile.rows, job->h_y[0][p]);
            square_positive(job->h_y[0][p] + begin, tile.rows);
            continue;
        }
        add_linear_bias(&e->gate, begin, tile.rows, job->h_y[0][p]);
        add_linear_bias(&e->up, begin, tile.rows, job->h_y[1][p]);
        job->kernels->activate(&job->layout->activation, job->h_y[0][p] + begin, job->h_y[1][p] + begin, tile.rows);
    }
}

static void down(const struct job *job, int64_t task) {
    const int64_t per_expert = num_halves_tasks(job->layout->down.rows);
    const struct expert *e = &job->experts[task / per_expert];
    multiply_halves(&e->down, task % per_expert, job->h_at + e->first, job->y + e->first, e->count);
}

static void normalise(const struct job *job, int64_t row) {
    job->loops->scaled_norm(job->y[row], job->norm->weight, job->norm->eps, job->layout->down.rows);
}

static void work(void *argument) {
    struct job *job = argument;
    const struct shape *h = &job->experts[0].down.weights.shape;
    int64_t i;
    while (take(&job->prepare_inputs, &i)) prepare_input(job, &job->experts[0], i);
    pool_barrier(job->pool);
    while (take(&job->gate_up, &i)) gate_up(job, i);
    pool_barrier(job->pool);
    while (take(&job->prepare_h, &i)) job->kernels->prepare(h, job->h_y[0][i], job->h_operands + i * operand_bytes(h));
    pool_barrier(job->pool);
    while (take(&job->down, &i)) down(job, i);
    if (job->norm == NULL) return;
    pool_barrier(job->pool);
    while (take(&job->norms, &i)) normalise(job, i);
}

/* The experts of one batch and their pairs, then all phases. */
static void run_batch(struct job *job, const se_expert *experts, float *outputs) {
    const int64_t F = job->layout->up.rows, D = job->layout->down.rows;
    const struct shape *h = &job->experts[0].down.weights.shape;
    int64_t p = 0;
    for (int64_t i = 0; i < job->num_experts; i++) {
        struct expert *e = &job->experts[i];
        e->first = p;
        e->count = experts[i].num_pairs;
        for (int64_t j = 0; j < e->count; j++, p++) {
            const int64_t pair = experts[i].pairs[j], input = job->input_of[pair];
            job->x_at[0][p] = job->inputs[0] + input * operand_bytes(&e->gate.weights.shape);
            job->x_at[1][p] = job->inputs[1] + input * operand_bytes(&e->up.weights.shape);
            job->h_at[p] = job->h_operands + p * operand_bytes(h);
            job->h_y[0][p] = job->h[0] + p * F;
            job->h_y[1][p] = job->h[1] + p * F;
            job->y[p] = outputs + pair * D;
        }
    }
    job->gate_up = (struct tasks){0, job->num_experts * chunks(F)};
    job->prepare_h = (struct tasks){0, p};
    job->down = (struct tasks){0, job->num_experts * num_halves_tasks(D)};
    job->norms = (struct tasks){0, p};
    pool_run(job->pool, work, job);
    job->prepare_inputs.count = 0; /* they serve the next batches too */
}

/* How many of the experts from the first on make a batch, and their pairs. */
static int64_t batch(const se_expert *experts, int64_t num_experts, int64_t *num_pairs) {
    int64_t n = 0;
    for (*num_pairs = 0; n < num_experts; n++) {
        if (n > 0 && *num_pairs + experts[n].num_pairs > BATCH_PAIRS) break;
        *num_pairs += experts[n].num_pairs;
    }
    return n;
}

/* The most experts and pairs of any batch, and all pairs. SE_UNSUPPORTED for a pair outside [0, T * k). */
static int32_t measure(const se_expert *experts, int64_t num_experts, int64_t limit, int64_t *most_experts,
                       int64_t *most_pairs, int64_t *all_pairs) {
    *most_experts = *most_pairs = *all_pairs = 0;
    for (int64_t i = 0; i < num_experts;) {
        int64_t pairs, n = batch(experts + i, num_experts - i, &pairs);
        *most_experts = n > *most_experts ? n : *most_experts;
        *most_pairs = pairs > *most_pairs ? pairs : *most_pairs;
        *all_pairs += pairs;
        i += n;
    }
    for (int64_t i = 0; i < num_experts; i++) {
        for (int64_t j = 0; j < experts[i].num_pairs; j++) {
            if (experts[i].pairs[j] < 0 || experts[i].pairs[j] >= limit) return SE_UNSUPPORTED;
        }
    }
    return SE_OK;
}

/* Which inputs the pairs need; each token once unless every pair scales it. */
static void find_inputs(struct job *job, const se_expert *experts, int64_t num_experts, int64_t *input_of_token) {
    for (int64_t i = 0; i < num_experts; i++) {
        for (int64_t j = 0; j < experts[i].num_pairs; j++) {
            const int64_t pair = experts[i].pairs[j];
            int64_t *known = &input_of_token[pair / job->k];
            if (job->layout->activation.scale_input || *known < 0) {
                *known = job->num_inputs++;
                job->input_pair[*known] = pair;
            }
            job->input_of[pair] = *known;
        }
    }
}

static int32_t products_of(struct expert *e, const struct job *job, int32_t precision, const uint8_t *record) {
    const se_matrix *up = &job->layout->up, *gate = ungated(job->layout) ? up : &job->layout->gate;
    int32_t status = product_of(&e->gate, job->kernels, precision, gate, record);
    if (status == SE_OK) status = product_of(&e->up, job->kernels, precision, up, record);
    if (status == SE_OK) status = product_of(&e->down, job->kernels, precision, &job->layout->down, record);
    return status;
}

static int32_t experts_call(se_context *context, int32_t precision, const se_expert_layout *layout,
                            const se_expert *experts, int64_t num_experts, const float *x, const float *weights,
                            int64_t tokens, int64_t k, const se_expert_norm *norm, float *outputs) {
    struct job job = {.kernels = context->kernels, .loops = context->loops, .pool = context->pool, .layout = layout};
    job.norm = norm;
    job.x = x;
    job.weights = weights;
    job.k = k;
    const int64_t D = layout->up.columns, F = layout->up.rows;
    struct expert any;
    int64_t most_experts, most_pairs, all_pairs;
    if (num_experts < 1) return SE_OK;
    int32_t status = products_of(&any, &job, precision, experts[0].record);
    const int64_t gate_rows = ungated(layout) ? 0 : F, gate_columns = ungated(layout) ? 0 : D;
    if (layout->gate.rows != gate_rows || layout->gate.columns != gate_columns || layout->down.rows != D ||
        layout->down.columns != F || layout->activation.kind < SE_SILU ||
        layout->activation.kind > SE_CLAMPED_SILU || k < 1) {
        return SE_UNSUPPORTED;
    }
    if (status == SE_OK) status = measure(experts, num_experts, tokens * k, &most_experts, &most_pairs, &all_pairs);
    if (status != SE_OK || all_pairs == 0) return status;

    const bool scaled = layout->activation.scale_input != 0, shared = same_shape(&any.gate, &any.up);
    const int64_t most_inputs = scaled || all_pairs < tokens ? all_pairs : tokens, pointer = sizeof(void *);
    int64_t *input_of_token = NULL;
    struct cutter cutter = {0};
    for (int pass = 0; pass < 2; pass++) {
        cutter.used = 0;
        input_of_token = cut(&cutter, 8 * tokens);
        job.input_pair = cut(&cutter, 8 * most_inputs);
        job.input_of = cut(&cutter, 8 * tokens * k);
        job.scaled = cut(&cutter, scaled ? 4 * most_inputs * D : 0);
        job.inputs[0] = cut(&cutter, most_inputs * operand_bytes(&any.gate.weights.shape));
        job.inputs[1] = shared ? job.inputs[0] : cut(&cutter, most_inputs * operand_bytes(&any.up.weights.shape));
        job.experts = cut(&cutter, most_experts * (int64_t)sizeof *job.experts);
        job.h[0] = cut(&cutter, 4 * most_pairs * F);
        job.h[1] = ungated(layout) ? job.h[0] : cut(&cutter, 4 * most_pairs * F);
        job.h_operands = cut(&cutter, most_pairs * operand_bytes(&any.down.weights.shape));
        for (int s = 0; s < 2; s++) {
            job.x_at[s] = cut(&cutter, pointer * most_pairs);
            job.h_y[s] = cut(&cutter, pointer * most_pairs);
        }
        job.h_at = cut(&cutter, pointer * most_pairs);
        job.y = cut(&cutter, pointer * most_pairs);
        if (pass == 0 && !context_reserve(context, cutter.used)) return SE_NO_MEMORY;
        cutter.memory = context->scratch;
    }
    memset(input_of_token, 0xff, (size_t)(8 * tokens)); /* -1 */
    find_inputs(&job, experts, num_experts, input_of_token);
    job.prepare_inputs.count = job.num_inputs;
    for (int64_t i = 0; i < num_experts; i += job.num_experts) {
        job.num_experts = batch(experts + i, num_experts - i, &job.num_pairs);
        for (int64_t j = 0; j < job.num_experts; j++) products_of(&job.experts[j], &job, precision, experts[i + j].record);
        run_batch(&job, experts + i, outputs);
    }
    return SE_OK;
}

int32_t se_experts(se_context *context, int32_t precision, const se_expert_layout *layout, const se_expert *experts,
                   int64_t num_experts, const float *x, const float *weights, int64_t tokens, int64_t k,
                   const se_expert_norm *norm, float *outputs) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    return context_leave(context, experts_call(context, precision, layout, experts, num_experts, x, weights, tokens, k,
                                               norm, outputs));
}

struct sum_job {
    const struct kernels *kernels;
    const float *outputs, *weights;
    int64_t k, columns;
    float *y;
    struct tasks tokens;
};

static void sum_tokens(void *argument) {
    struct sum_job *job = argument;
    for (int64_t t; take(&job->tokens, &t);) {
        float *y = job->y + t * job->columns;
        memset(y, 0, (size_t)job->columns * sizeof *y);
        for (int64_t pair = t * job->k; pair < (t + 1) * job->k; pair++) {
            float weight = job->weights == NULL ? 1.0f : job->weights[pair];
            job->kernels->add_scaled(y, job->outputs + pair * job->columns, weight, job->columns);
        }
    }
}

int32_t se_weighted_sum(se_context *context, const float *outputs, const float *weights, int64_t tokens, int64_t k,
                        int64_t columns, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    struct sum_job job = {context->kernels, outputs, weights, k, columns, y, {0, tokens}};
    if (tokens == 1) {
        sum_tokens(&job);
    } else {
        pool_run(context->pool, sum_tokens, &job);
    }
    return context_leave(context, SE_OK);
}
