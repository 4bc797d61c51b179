/* Calls that were written down beforehand. */
#include "context.h"
#include "reader.h"

static void *pointer(int64_t argument) {
    return (void *)(intptr_t)argument;
}

static float number(int64_t argument) {
    return bits_float((uint32_t)argument);
}

static void copy(const float *x, int64_t rows, int64_t columns, int64_t stride, float *y) {
    for (int64_t r = 0; r < rows; r++) memcpy(y + r * columns, x + r * stride, (size_t)columns * sizeof *y);
}

/* Where experts of one token lie, each chosen once. */
static int32_t find(const int64_t *slots, int64_t num_experts, const int64_t *ids, int64_t k, se_arriving *arriving) {
    for (int64_t i = 0; i < k; i++) {
        if (ids[i] < 0 || ids[i] >= num_experts) return SE_UNSUPPORTED;
        if (slots[ids[i]] < 0) return SE_MISSED;
        arriving[i] = (se_arriving){slots[ids[i]], i, 1};
    }
    return SE_OK;
}

static int32_t call(se_context *context, const se_call *call) {
    const int64_t *a = call->arguments;
#define P(i) pointer(a[i])
#define F(i) number(a[i])
#define I(i) (int32_t)a[i]
    switch (call->function) {
    case SE_RUN_LINEAR: return se_linear(context, I(0), P(1), a[2], P(3), P(4), a[5], P(6));
    case SE_RUN_EXPERTS: return se_experts(context, I(0), P(1), P(2), a[3], P(4), P(5), a[6], a[7], P(8), P(9));
    case SE_RUN_RMS_NORM: return se_rms_norm(context, P(0), a[1], a[2], P(3), F(4), P(5));
    case SE_RUN_ADD_NORM: return se_add_norm(context, P(0), P(1), F(2), a[3], a[4], P(5), F(6), P(7), P(8));
    case SE_RUN_L2_NORM: return se_l2_norm(context, P(0), a[1], a[2], F(3), F(4), P(5));
    case SE_RUN_MAP: return se_map(context, I(0), P(1), a[2], P(3));
    case SE_RUN_GATE: return se_gate(context, I(0), P(1), P(2), a[3], P(4));
    case SE_RUN_DECAY: return se_decay(context, P(0), P(1), P(2), a[3], a[4], P(5));
    case SE_RUN_ROUTE: return se_route(context, P(0), P(1), P(2), a[3], P(4), P(5));
    case SE_RUN_ATTENTION:
        return se_attention(context, P(0), a[1], P(2), P(3), P(4), a[5], a[6], F(7), a[8], P(9), P(10), P(11), P(12),
                            P(13));
    case SE_RUN_CAUSAL_CONV1D: return se_causal_conv1d(context, P(0), P(1), P(2), a[3], a[4], a[5], P(6), P(7));
    case SE_RUN_DELTA_RULE:
        return se_delta_rule(context, P(0), P(1), P(2), P(3), P(4), P(5), a[6], P(7), P(8), P(9));
    case SE_RUN_EXPERTS_STREAMED:
        return se_experts_streamed(context, P(0), I(1), P(2), P(3), P(4), a[5], P(6), P(7), a[8], a[9], P(10), P(11),
                                   P(12));
    case SE_RUN_COPY: return copy(P(0), a[1], a[2], a[3], P(4)), SE_OK;
    case SE_RUN_ADD_SCALED: return context->kernels->add_scaled(P(3), P(0), *(const float *)P(1), a[2]), SE_OK;
    case SE_RUN_FIND: return find(P(0), a[1], P(2), a[3], P(4));
    default: return SE_UNSUPPORTED;
    }
#undef P
#undef F
#undef I
}

int32_t se_run(se_context *context, const se_call *calls, int64_t count, int64_t *done) {
    for (*done = 0; *done < count; ++*done) {
        const int32_t status = call(context, &calls[*done]);
        if (status != SE_OK) return status;
    }
    return SE_OK;
}
