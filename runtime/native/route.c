/* The router's choice: scores of all experts, the best of them in order, and what they weigh. */
#include "context.h"

enum { MAX_GROUPS = 256 };

struct route_job {
    const struct loops *loops;
    const se_routing *routing;
    const float *logits, *correction_bias;
    float *scratch; /* [T, 2 * num_experts] */
    int64_t *ids;
    float *weights;
    struct tasks tokens;
};

/* The k largest of x in order: insertion, for k is small; an equal that comes later stays behind. */
static void choose(const float *x, int64_t n, int64_t k, int64_t *ids) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (count == k && !(x[i] > x[ids[k - 1]])) continue;
        int64_t place = count < k ? count++ : k - 1;
        for (; place > 0 && x[i] > x[ids[place - 1]]; place--) ids[place] = ids[place - 1];
        ids[place] = i;
    }
}

/* Leaves only experts of the best groups, by the sum of their two best; of a softmax by the best. */
static void drop_groups(const se_routing *routing, float *compared) {
    const int64_t size = routing->num_experts / routing->n_group;
    float best[MAX_GROUPS] = {0};
    int64_t kept[MAX_GROUPS];
    for (int64_t g = 0; g < routing->n_group; g++) {
        int64_t two[2];
        choose(compared + g * size, size, 2, two);
        best[g] = compared[g * size + two[0]];
        if (routing->scoring != SE_SCORE_SOFTMAX) best[g] += compared[g * size + two[1]];
    }
    choose(best, routing->n_group, routing->topk_group, kept);
    for (int64_t g = 0; g < routing->n_group; g++) {
        bool keep = false;
        for (int64_t i = 0; i < routing->topk_group; i++) keep = keep || kept[i] == g;
        for (int64_t e = g * size; !keep && e < (g + 1) * size; e++) compared[e] = -INFINITY;
    }
}

/* sqrt(log(1 + exp(x))) by the C library's functions. */
static void root_of_softplus(const float *x, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i++) y[i] = sqrtf((x[i] > 0 ? x[i] : 0.0f) + log1pf(expf(-fabsf(x[i]))));
}

static void route_token(const struct route_job *job, int64_t t) {
    const se_routing *routing = job->routing;
    const int64_t E = routing->num_experts, k = routing->top_k;
    float *scores = job->scratch + t * 2 * E, *compared = scores + E, *weights = job->weights + t * k;
    int64_t *ids = job->ids + t * k;
    const float *logits = job->logits + t * E;
    const float *ranked = routing->scoring == SE_SCORE_CHOSEN_SIGMOID ? logits : scores;
    if (routing->scoring == SE_SCORE_SQRT_SOFTPLUS) {
        root_of_softplus(logits, E, scores);
    } else if (routing->scoring != SE_SCORE_SOFTMAX) {
        job->loops->map(SE_MAP_SIGMOID, logits, E, scores);
    } else {
        memcpy(scores, logits, (size_t)E * sizeof *scores);
        const float sum = job->loops->exponents(scores, job->loops->largest(scores, E), E);
        for (int64_t e = 0; e < E; e++) scores[e] /= sum;
    }
    for (int64_t e = 0; !routing->chosen && e < E; e++) {
        compared[e] = job->correction_bias == NULL ? ranked[e] : ranked[e] + job->correction_bias[e];
    }
    if (!routing->chosen && routing->n_group > 1) drop_groups(routing, compared);
    if (!routing->chosen) choose(compared, E, k, ids);
    float sum = 0.0f;
    for (int64_t i = 0; i < k; i++) sum += scores[ids[i]];
    for (int64_t i = 0; i < k; i++) {
        weights[i] = routing->normalize ? scores[ids[i]] / (sum + 1e-20f) : scores[ids[i]];
        weights[i] *= routing->scaling_factor;
    }
}

static void route_tokens(void *argument) {
    struct route_job *job = argument;
    for (int64_t t; take(&job->tokens, &t);) route_token(job, t);
}

int32_t se_route(se_context *context, const se_routing *routing, const float *logits, const float *correction_bias,
                 int64_t tokens, int64_t *ids, float *weights) {
    const se_routing *r = routing;
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (r->top_k < 1 || r->top_k > r->num_experts || r->n_group < 1 || r->n_group > MAX_GROUPS ||
        r->topk_group < 1 || r->topk_group > r->n_group || r->num_experts % r->n_group != 0 ||
        (r->n_group > 1 && r->num_experts / r->n_group < 2)) {
        return context_leave(context, SE_UNSUPPORTED);
    }
    const int64_t scores = tokens * r->num_experts;
    if (!context_reserve(context, 2 * 4 * scores)) return context_leave(context, SE_NO_MEMORY);
    struct route_job job = {context->loops, routing, logits, correction_bias, (float *)(void *)context->scratch, ids,
                            weights, {0, tokens}};
    context_run(context, route_tokens, &job, 16 * scores);
    return context_leave(context, SE_OK);
}
