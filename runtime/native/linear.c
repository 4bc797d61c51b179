/* A resident matrix times the tokens of a step. */
#include "context.h"

struct linear_job {
    const struct kernels *kernels;
    struct pool *pool;
    struct product product;
    const float *x;
    int64_t tokens;
    uint8_t *operands;
    const uint8_t **operand; /* [tokens] */
    float **y;               /* [tokens] */
    struct tasks prepare;    /* one per token */
    struct tasks multiply;
};

static void prepare_tokens(struct linear_job *job) {
    const struct shape *shape = &job->product.weights.shape;
    for (int64_t t; take(&job->prepare, &t);) {
        job->kernels->prepare(shape, job->x + t * shape->columns, job->operands + t * operand_bytes(shape));
    }
}

static void work(void *argument) {
    struct linear_job *job = argument;
    if (job->tokens > 1) {
        prepare_tokens(job);
        pool_barrier(job->pool);
    }
    for (int64_t task; take(&job->multiply, &task);) {
        multiply_halves(&job->product, task, job->operand, job->y, job->tokens);
    }
}

static int32_t linear(se_context *context, int32_t precision, const se_matrix *matrix, const uint8_t *base,
                      const float *x, int64_t tokens, float *y) {
    struct linear_job job = {.kernels = context->kernels, .pool = context->pool, .x = x, .tokens = tokens};
    int32_t status = product_of(&job.product, context->kernels, precision, matrix, base);
    if (status != SE_OK || tokens < 1) return status;
    struct cutter cutter = {0};
    for (int pass = 0; pass < 2; pass++) {
        cutter.used = 0;
        job.operands = cut(&cutter, tokens * operand_bytes(&job.product.weights.shape));
        job.operand = cut(&cutter, tokens * (int64_t)sizeof *job.operand);
        job.y = cut(&cutter, tokens * (int64_t)sizeof *job.y);
        if (pass == 0 && !context_reserve(context, cutter.used)) return SE_NO_MEMORY;
        cutter.memory = context->scratch;
    }
    for (int64_t t = 0; t < tokens; t++) {
        job.operand[t] = job.operands + t * operand_bytes(&job.product.weights.shape);
        job.y[t] = y + t * matrix->rows;
    }
    job.prepare.count = tokens;
    job.multiply.count = num_halves_tasks(matrix->rows);
    if (tokens == 1) prepare_tokens(&job); /* sooner done than said to another thread */
    if (tokens == 1 && matrix->rows * matrix->columns < FEW_PRODUCTS) {
        work(&job);
    } else {
        pool_run(context->pool, work, &job);
    }
    return SE_OK;
}

int32_t se_linear(se_context *context, int32_t precision, const se_matrix *matrix, const uint8_t *base, const float *x,
                  int64_t tokens, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    return context_leave(context, linear(context, precision, matrix, base, x, tokens, y));
}
