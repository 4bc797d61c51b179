/* From a description of a matrix to a kernel and its arguments. */
#include "context.h"

static bool is_dtype(int32_t dtype) {
    return dtype == SE_BF16 || dtype == SE_F16 || dtype == SE_F32;
}

static int32_t affine_product(struct product *p, const struct kernels *kernels, int32_t precision, const se_matrix *m) {
    const int by_bits = m->bits == 4 ? 0 : m->bits == 8 ? 1 : -1;
    const int by_group = m->group_size == 32 ? 0 : m->group_size == 64 ? 1 : m->group_size == 128 ? 2 : -1;
    if (by_bits < 0 || by_group < 0 || m->dtype == SE_F32 || m->columns % m->group_size != 0) return SE_UNSUPPORTED;
    p->weights.weight_stride = m->columns * m->bits / 8;
    p->weights.scales_stride = m->columns / m->group_size * 2;
    p->weights.shape = (struct shape){m->columns, m->bits, m->group_size, precision == SE_EXACT ? 3 : 1};
    p->tile = kernels->affine[by_bits][by_group][precision];
    return SE_OK;
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
        return affine_product(p, kernels, precision, m);
    }
    if (m->encoding != SE_PLAIN) return SE_UNSUPPORTED;
    p->weights.weight_stride = m->columns * (m->dtype == SE_F32 ? 4 : 2);
    p->weights.shape = (struct shape){.columns = m->columns};
    p->tile = kernels->plain[m->dtype];
    return SE_OK;
}

bool same_shape(const struct product *a, const struct product *b) {
    const struct shape *s = &a->weights.shape, *t = &b->weights.shape;
    return a->tile == b->tile && s->columns == t->columns && s->bits == t->bits && s->group_size == t->group_size &&
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
