/* Resident matrices times the tokens of a step: several that share their input are one call, and one operand. */
#include "context.h"

enum { MAX_MATRICES = 8 };

struct factor {
    struct product product;
    const uint8_t **operand; /* [tokens] */
    float **y;               /* [tokens] */
    int64_t first_task;
};

struct linear_job {
    const struct kernels *kernels;
    struct pool *pool;
    struct factor factors[MAX_MATRICES];
    int64_t num_factors;
    const float *x;
    int64_t tokens;
    uint8_t *operands[MAX_MATRICES]; /* [tokens]; NULL where an earlier matrix has the same */
    struct tasks prepare;            /* one per token */
    struct tasks multiply;
};

static void prepare_tokens(struct linear_job *job) {
    for (int64_t t; take(&job->prepare, &t);) {
        for (int64_t i = 0; i < job->num_factors; i++) {
            const struct shape *shape = &job->factors[i].product.weights.shape;
            if (job->operands[i] == NULL) continue;
            job->kernels->prepare(shape, job->x + t * shape->columns, job->operands[i] + t * operand_bytes(shape));
        }
    }
}

static void work(void *argument) {
    struct linear_job *job = argument;
    if (job->tokens > 1) {
        prepare_tokens(job);
        pool_barrier(job->pool);
    }
    int64_t i = 0;
    for (int64_t task; take(&job->multiply, &task);) { /* tasks come in order */
        while (i + 1 < job->num_factors && task >= job->factors[i + 1].first_task) i++;
        const struct factor *factor = &job->factors[i];
        multiply_halves(&factor->product, task - factor->first_task, factor->operand, factor->y, job->tokens);
    }
}

/* The first matrix that takes the same operand as matrix i. */
static int64_t operand_owner(const struct linear_job *job, int64_t i) {
    int64_t owner = 0;
    while (owner < i && !same_shape(&job->factors[owner].product, &job->factors[i].product)) owner++;
    return owner;
}

static int32_t linear(se_context *context, int32_t precision, const se_matrix *matrices, int64_t count,
                      const uint8_t *base, const float *x, int64_t tokens, float *y) {
    struct linear_job job = {.kernels = context->kernels, .pool = context->pool, .x = x, .tokens = tokens};
    if (count < 1 || count > MAX_MATRICES) return SE_UNSUPPORTED;
    job.num_factors = count;
    int64_t products = 0;
    for (int64_t i = 0; i < count; i++) {
        struct factor *factor = &job.factors[i];
        const int32_t status = product_of(&factor->product, context->kernels, precision, &matrices[i], base);
        if (status != SE_OK) return status;
        if (matrices[i].columns != matrices[0].columns) return SE_UNSUPPORTED;
        factor->first_task = job.multiply.count;
        job.multiply.count += num_halves_tasks(matrices[i].rows);
        products += matrices[i].rows * matrices[i].columns;
    }
    if (tokens < 1) return SE_OK;
    struct cutter cutter = {0};
    for (int pass = 0; pass < 2; pass++) {
        cutter.used = 0;
        for (int64_t i = 0; i < count; i++) {
            const int64_t bytes = tokens * operand_bytes(&job.factors[i].product.weights.shape);
            job.operands[i] = operand_owner(&job, i) == i ? cut(&cutter, bytes) : NULL;
            job.factors[i].operand = cut(&cutter, tokens * (int64_t)sizeof *job.factors[i].operand);
            job.factors[i].y = cut(&cutter, tokens * (int64_t)sizeof *job.factors[i].y);
        }
        if (pass == 0 && !context_reserve(context, cutter.used)) return SE_NO_MEMORY;
        cutter.memory = context->scratch;
    }
    for (int64_t i = 0; i < count; i++) {
        struct factor *factor = &job.factors[i];
        const uint8_t *operands = job.operands[operand_owner(&job, i)];
        for (int64_t t = 0; t < tokens; t++, y += matrices[i].rows) {
            factor->operand[t] = operands + t * operand_bytes(&factor->product.weights.shape);
            factor->y[t] = y;
        }
    }
    job.prepare.count = tokens;
    if (tokens == 1) prepare_tokens(&job); /* sooner done than said to another thread */
    if (tokens == 1 && products < FEW_PRODUCTS) {
        work(&job);
    } else {
        pool_run(context->pool, work, &job);
    }
    return SE_OK;
}

int32_t se_linear(se_context *context, int32_t precision, const se_matrix *matrices, int64_t count, const uint8_t *base,
                  const float *x, int64_t tokens, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    return context_leave(context, linear(context, precision, matrices, count, base, x, tokens, y));
}
