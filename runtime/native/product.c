/* From a description of a matrix to a kernel and its arguments. */
#include "context.h"

static bool is_dtype(int32_t dtype) {
    return dtype == SE_BF16 || dtype == SE_F16 || dtype == SE_F32;
}

/* The code that carries so many bits, or -1. */
static int code_of(int32_t bits) {
    return bits == 8 ? CODE_8 : bits >= 2 && bits <= 6 ? bits - 2 : -1;
}

static int32_t coded_product(struct product *p, const struct kernels *kernels, int32_t precision, const se_matrix *m) {
    const int code = code_of(m->bits), index = group_index(m->group_size);
    if (code < 0 || index < 0 || m->columns % m->group_size != 0) return SE_UNSUPPORTED;
    p->weights.weight_stride = m->columns * m->bits / 8;
    p->weights.scales_stride = m->columns / m->group_size * (m->dtype == SE_F32 ? 4 : 2);
    const int32_t order = code == CODE_8 ? kernels->order_8 : code_width(code) == 4 ? ORDER_PAIRS : ORDER_PLAIN;
    const int32_t planes = precision == SE_FAST ? 1 : order == ORDER_WIDE ? 2 : 3;
    p->weights.shape = (struct shape){m->columns, code, m->group_size, order, planes};
    p->tile = kernels->coded[code][index][precision];
    return p->tile == NULL ? SE_UNSUPPORTED : SE_OK;
}

int32_t product_of(struct product *p, const struct kernels *kernels, int32_t precision, const se_matrix *m,
                   const uint8_t *base) {
    const int64_t bound = (int64_t)1 << 31;
    if (m->rows < 1 || m->rows > bound || m->columns < 1 || m->columns > bound || !is_dtype(m->dtype) ||
        (m->linear_bias_offset >= 0 && !is_dtype(m->linear_bias_dtype)) ||
        (precision != SE_EXACT && precision != SE_FAST)) {
        return SE_UNSUPPORTED;
    }
    *p = (struct product){
        .weights = {.weight = base + m->weight_offset, .rows = m->rows, .dtype = m->dtype},
        .linear_bias = m->linear_bias_offset < 0 ? NULL : base + m->linear_bias_offset,
        .linear_bias_dtype = m->linear_bias_dtype,
    };
    if (m->encoding == SE_AFFINE) {
        p->weights.scales = base + m->scales_offset;
        p->weights.biases = base + m->biases_offset;
        return coded_product(p, kernels, precision, m);
    }
    if (m->encoding != SE_PLAIN) return SE_UNSUPPORTED;
    p->weights.weight_stride = m->columns * (m->dtype == SE_F32 ? 4 : 2);
    p->weights.shape = (struct shape){.columns = m->columns};
    p->tile = kernels->plain[m->dtype];
    return SE_OK;
}

bool same_shape(const struct product *a, const struct product *b) {
    const struct shape *s = &a->weights.shape, *t = &b->weights.shape;
    return a->tile == b->tile && s->columns == t->columns && s->code == t->code && s->group_size == t->group_size &&
           s->planes == t->planes;
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
