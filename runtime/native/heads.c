/* A matrix that is cut into heads, each multiplied by an input of its own: what latent attention does with kv_b.
 *
 * A head's rows are decoded some at a time, once for all tokens; each sum has one order, so a token's result does not
 * depend on the others. */
#include "context.h"

enum { DECODED_ROWS = 64 };

struct heads_job {
    const struct loops *loops;
    const struct weights *weights;
    const se_heads *heads;
    bool transposed;
    const float *x;
    int64_t tokens;
    float *y;
    _Atomic int64_t num_threads; /* that have taken their scratch */
    float *decoded;              /* [threads, DECODED_ROWS, columns] */
    struct tasks tasks;          /* heads */
};

static void multiply_head(const struct heads_job *job, int64_t head, float *decoded) {
    const se_heads *heads = job->heads;
    const int64_t columns = job->weights->shape.columns, rows = heads->rows;
    const int64_t in = job->transposed ? rows : columns, out = job->transposed ? columns : rows;
    for (int64_t begin = 0; begin < rows; begin += DECODED_ROWS) {
        const int64_t n = rows - begin < DECODED_ROWS ? rows - begin : DECODED_ROWS;
        job->loops->decode_rows(job->weights, head * heads->stride + heads->first + begin, n, decoded);
        for (int64_t t = 0; t < job->tokens; t++) {
            const float *x = job->x + (t * heads->count + head) * in;
            float *y = job->y + (t * heads->count + head) * out;
            if (!job->transposed) {
                job->loops->dot_rows(decoded, n, columns, x, y + begin);
            } else {
                if (begin == 0) memset(y, 0, (size_t)out * sizeof *y);
                job->loops->add_rows(decoded, n, columns, x + begin, y);
            }
        }
    }
}

static void multiply_heads(void *argument) {
    struct heads_job *job = argument;
    const int64_t self = atomic_fetch_add(&job->num_threads, 1);
    float *decoded = job->decoded + self * DECODED_ROWS * job->weights->shape.columns;
    for (int64_t head; take(&job->tasks, &head);) multiply_head(job, head, decoded);
}

static int32_t heads_product(se_context *context, const se_matrix *matrix, const uint8_t *base, const se_heads *heads,
                             bool transposed, const float *x, int64_t tokens, float *y) {
    struct product product;
    const int32_t status = product_of(&product, context->kernels, SE_EXACT, matrix, base);
    if (status != SE_OK) return status;
    if (heads->count < 1 || heads->first < 0 || heads->rows < 1 || heads->first + heads->rows > heads->stride ||
        heads->stride > matrix->rows / heads->count) {
        return SE_UNSUPPORTED;
    }
    if (!context_reserve(context, pool_threads(context->pool) * DECODED_ROWS * matrix->columns * (int64_t)sizeof *x)) {
        return SE_NO_MEMORY;
    }
    struct heads_job job = {.loops = context->loops, .weights = &product.weights, .heads = heads};
    job.transposed = transposed;
    job.x = x;
    job.tokens = tokens;
    job.y = y;
    job.decoded = (float *)(void *)context->scratch;
    job.tasks.count = heads->count;
    context_run(context, multiply_heads, &job, heads->count * heads->rows * matrix->columns * tokens);
    return SE_OK;
}

int32_t se_heads_product(se_context *context, const se_matrix *matrix, const uint8_t *base, const se_heads *heads,
                         int32_t transposed, const float *x, int64_t tokens, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    return context_leave(context, heads_product(context, matrix, base, heads, transposed != 0, x, tokens, y));
}
