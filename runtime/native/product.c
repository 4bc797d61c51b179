/* From a description of a matrix to a kernel and its arguments. */
#include "context.h"

static bool is_dtype(int32_t dtype) {
    return dtype == SE_BF16 || dtype == SE_F16 || dtype == SE_F32;
}

/* Encodings stored as Q6_K is: scale * code + bias with scale = d * unit * stored and bias = -middle * scale. */
static const struct levels {
    int32_t encoding, code, group_size;
    float unit, middle;
} LEVELS[] = {
    {SE_Q3_K, CODE_3, 16, 1.0f, 4.0f},          {SE_Q6_K, CODE_6, 16, 1.0f, 32.0f},
    {SE_IQ4_XS, CODE_IQ4, 32, 1.0f, 128.0f},    {SE_IQ3_S, CODE_4, 32, 2.0f, 7.5f},
    {SE_IQ3_XXS, CODE_IQ3, 32, 0.5f, 31.0f},    {SE_IQ2_XXS, CODE_IQ2, 32, 0.125f, 43.0f},
    {SE_IQ2_XS, CODE_IQ2, 16, 0.125f, 43.0f},   {SE_IQ1_S, CODE_2, 32, 1.0f, 0.875f},
    {SE_IQ1_M, CODE_IQ1, 16, 0.125f, 9.0f},
};

static const struct levels *levels_of(int32_t encoding) {
    for (size_t i = 0; i < sizeof LEVELS / sizeof *LEVELS; i++) {
        if (LEVELS[i].encoding == encoding) return &LEVELS[i];
    }
    return NULL;
}

/* What the encodings have in common: codes of one kind, in groups of a size that a kernel knows. */
static bool code_of(const se_matrix *m, int32_t *code, int32_t *group_size) {
    const struct levels *levels = levels_of(m->encoding);
    if (levels != NULL) return *code = levels->code, *group_size = levels->group_size, m->columns % 256 == 0;
    switch (m->encoding) {
    case SE_MXFP4: return *code = CODE_FP4, *group_size = 32, true;
    case SE_NVFP4_MULTIPLY:
    case SE_NVFP4_DIVIDE: return *code = CODE_FP4, *group_size = 16, true;
    case SE_Q4_K: return *code = m->bits == 5 ? CODE_5 : CODE_4, *group_size = 32, m->columns % 256 == 0;
    case SE_Q2_K: return *code = CODE_2, *group_size = 16, m->columns % 256 == 0;
    case SE_IQ4_NL: return *code = CODE_IQ4, *group_size = 32, true;
    case SE_AFFINE:
    case SE_SYMMETRIC:
    case SE_ZERO_POINT: break;
    default: return false;
    }
    if (m->bits != 8 && (m->bits < 2 || m->bits > 6)) return false;
    if (m->group_size < 32 || m->columns % m->group_size != 0) return false;
    *code = m->bits == 8 ? CODE_8 : m->bits - 2;
    for (*group_size = 128; m->group_size % *group_size != 0; *group_size /= 2) {
        if (*group_size == 32) return false;
    }
    return m->encoding != SE_AFFINE || *group_size == m->group_size;
}

/* Bytes of a row of each array beside the codes. */
static void set_strides(struct weights *w, const se_matrix *m, int64_t groups) {
    const int64_t stored = groups / w->per_scale, size = m->dtype == SE_F32 ? 4 : 2;
    switch (m->encoding) {
    case SE_AFFINE: w->biases_stride = w->scales_stride = stored * size; break;
    case SE_IQ4_NL:
    case SE_SYMMETRIC: w->scales_stride = stored * size; break;
    case SE_ZERO_POINT: w->scales_stride = stored * size, w->biases_stride = stored; break;
    case SE_Q4_K: w->scales_stride = m->columns / 256 * 12, w->biases_stride = m->columns / 256 * 2; break;
    case SE_MXFP4:
    case SE_NVFP4_MULTIPLY:
    case SE_NVFP4_DIVIDE: w->scales_stride = groups, w->biases_stride = 4; break;
    default: w->scales_stride = groups, w->biases_stride = m->columns / 256 * 2; /* Q2_K, Q6_K and what is stored as it is */
    }
}

static int32_t coded_product(struct product *p, const struct kernels *kernels, int32_t precision, const se_matrix *m) {
    int32_t code, group_size;
    if (!code_of(m, &code, &group_size) || m->columns % group_size != 0) return SE_UNSUPPORTED;
    struct weights *w = &p->weights;
    w->weight_stride = m->columns * code_width(code) / 8;
    w->per_scale = m->encoding == SE_SYMMETRIC || m->encoding == SE_ZERO_POINT ? m->group_size / group_size : 1;
    set_strides(w, m, m->columns / group_size);
    const struct levels *levels = levels_of(m->encoding);
    if (levels != NULL) w->encoding = SE_Q6_K, w->unit = levels->unit, w->middle = levels->middle;
    if (m->encoding == SE_IQ4_NL) w->encoding = SE_SYMMETRIC; /* about 128, the middle of wide codes */
    const int32_t order = kernels->order[code], most = most_runs(group_size, order_parts(order));
    const int32_t wanted = kernels->runs[code][precision - 1], runs = wanted < most ? wanted : most;
    w->shape = (struct shape){m->columns, code, group_size, order, runs, precision};
    p->tile = kernels->coded[code][group_index(group_size)][precision - 1];
    return p->tile == NULL ? SE_UNSUPPORTED : SE_OK;
}

static int32_t plain_product(struct product *p, const struct kernels *kernels, const se_matrix *m) {
    const int64_t size = m->dtype == SE_F32 ? 4 : 2;
    struct weights *w = &p->weights;
    w->shape = (struct shape){.columns = m->columns};
    if (m->encoding == SE_PLAIN) {
        w->weight_stride = m->columns * size;
        p->tile = kernels->plain[m->dtype];
        return SE_OK;
    }
    if (m->group_size % PLAIN_LANES != 0 && m->group_size != m->columns) return SE_UNSUPPORTED;
    if (m->group_size < 1) return SE_UNSUPPORTED;
    w->per_scale = m->group_size;
    w->weight_stride = m->columns;
    w->scales_stride = (m->columns + m->group_size - 1) / m->group_size * size;
    p->tile = kernels->plain[VALUE_FP8];
    return SE_OK;
}

int32_t product_of(struct product *p, const struct kernels *kernels, int32_t precision, const se_matrix *m,
                   const uint8_t *base) {
    const int64_t bound = (int64_t)1 << 31;
    if (m->rows < 1 || m->rows > bound || m->columns < 1 || m->columns > bound || !is_dtype(m->dtype) ||
        (m->linear_bias_offset >= 0 && !is_dtype(m->linear_bias_dtype)) ||
        precision < SE_FAST || precision > SE_EXACT) {
        return SE_UNSUPPORTED;
    }
    *p = (struct product){
        .weights = {.weight = base + m->weight_offset, .scales = base + m->scales_offset,
                    .biases = base + m->biases_offset, .rows = m->rows, .encoding = m->encoding, .dtype = m->dtype,
                    .near = kernels->near},
        .linear_bias = m->linear_bias_offset < 0 ? NULL : base + m->linear_bias_offset,
        .linear_bias_dtype = m->linear_bias_dtype,
    };
    if (m->encoding == SE_PLAIN || m->encoding == SE_FP8) return plain_product(p, kernels, m);
    return coded_product(p, kernels, precision, m);
}

bool same_shape(const struct product *a, const struct product *b) {
    const struct shape *s = &a->weights.shape, *t = &b->weights.shape;
    return a->tile == b->tile && s->columns == t->columns && s->code == t->code && s->group_size == t->group_size &&
           s->digits == t->digits;
}

void add_linear_bias(const struct product *p, int64_t first, int64_t rows, float *y) {
    if (p->linear_bias == NULL) return;
    for (int64_t i = first; i < first + rows; i++) y[i] += dtype_float(p->linear_bias_dtype, p->linear_bias, i);
}

int64_t num_halves_tasks(int64_t rows) {
    return (rows / 2 + TASK_ROWS - 1) / TASK_ROWS + rows % 2;
}

void multiply_halves(const struct product *product, int64_t task, const uint8_t *const *operands, float *const *y,
                     int64_t tokens) {
    const struct weights *w = &product->weights;
    const int64_t half = w->rows / 2, begin = task * TASK_ROWS;
    struct tile tile = {.weights = {w, w}, .y = {y, y}, .operands = operands, .tokens = tokens};
    if (begin < half) {
        tile.streams = 2;
        tile.rows = begin + TASK_ROWS < half ? TASK_ROWS : half - begin;
        tile.first[0] = begin;
        tile.first[1] = half + begin;
    } else {
        tile.streams = 1;
        tile.rows = 1;
        tile.first[0] = w->rows - 1;
    }
    product->tile(&tile);
    for (int64_t s = 0; s < tile.streams; s++) {
        for (int64_t t = 0; t < tokens; t++) add_linear_bias(product, tile.first[s], tile.rows, y[t]);
    }
}
