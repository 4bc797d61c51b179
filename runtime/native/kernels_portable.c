/* The plain loops: the definition of the arithmetic that kernels.h describes, for any machine. */
#include "elementwise.h"

static float add_lanes(const float *lane) {
    float q[4];
    for (int i = 0; i < 4; i++) {
        const float *l = lane + 4 * i;
        q[i] = (l[0] + l[2]) + (l[1] + l[3]);
    }
    return (q[0] + q[1]) + (q[2] + q[3]);
}

/* Where the digit of column j of a block stands in its plane. */
static inline int64_t place(const struct shape *shape, int64_t j) {
    const int parts = order_parts(shape->order);
    if (shape->order == ORDER_WIDE) return j / 32 * 32 + j % 2 * 16 + j % 32 / 2;
    return j / parts + j % parts * (BLOCK_GROUPS / parts * shape->group_size);
}

/* D = sum of code * X over one group, or H and L of wide codes, as kernels.h has them. `at`: its place in a block. */
static float group_dot(const struct shape *shape, const uint8_t *codes, const int8_t *block, int64_t at) {
    const int64_t plane = plane_bytes(shape);
    int32_t d[SE_EXACT] = {0}, D = 0;
    for (int64_t i = 0; i < shape->group_size; i++) {
        const int8_t *digits = block + place(shape, at + i);
        for (int p = 0; p < shape->digits; p++) d[p] += codes[i] * digits[p * plane];
    }
    if (is_wide(shape->code) && shape->digits == 3) return fmaf((float)d[0], 65536.0f, (float)(256 * d[1] + d[2]));
    for (int p = 0; p < shape->digits; p++) D = 256 * D + d[p];
    return (float)D;
}

static float coded_dot(const struct weights *w, int64_t row, const uint8_t *bytes) {
    const struct shape *shape = &w->shape;
    const struct operand x = operand_at(shape, bytes);
    const int64_t n = shape->group_size, groups = shape->columns / n;
    float lane[BLOCK_GROUPS] = {0}, scales[CHUNK_GROUPS], biases[CHUNK_GROUPS];
    uint8_t codes[MAX_GROUP];
    for (int64_t g = 0; g < groups; g++) {
        const int64_t chunk = g / CHUNK_GROUPS * CHUNK_GROUPS, left = groups - chunk;
        if (g == chunk) load_groups(w, row, g, left < CHUNK_GROUPS ? left : CHUNK_GROUPS, scales, biases);
        unpack_codes(shape->code, w->weight + row * w->weight_stride, g * n, n, codes);
        const int8_t *block = x.digits + g / BLOCK_GROUPS * num_planes(shape) * plane_bytes(shape);
        const float v = group_dot(shape, codes, block, g % BLOCK_GROUPS * n);
        float *l = &lane[g % BLOCK_GROUPS];
        *l = fmaf(scales[g - chunk] * x.scale[g], v, *l);
        *l = fmaf(biases[g - chunk], x.sum[g], *l);
    }
    return add_lanes(lane);
}

/* A row of values times an operand, as kernels.h has it. */
static float values_dot(const struct weights *w, int64_t row, const uint8_t *operand) {
    const float *x = (const float *)(const void *)operand;
    const uint8_t *values = w->weight + row * w->weight_stride, *scales = w->scales + row * w->scales_stride;
    float lane[PLAIN_LANES] = {0};
    for (int64_t k = 0; k < w->shape.columns; k++) {
        const float v = w->encoding == SE_FP8 ? e4m3_float(values[k]) * dtype_float(w->dtype, scales, k / w->per_scale)
                                              : dtype_float(w->dtype, values, k);
        lane[k % PLAIN_LANES] = fmaf(v, x[k], lane[k % PLAIN_LANES]);
    }
    for (int i = 0; i < PLAIN_LANES / 2; i++) lane[i] += lane[i + PLAIN_LANES / 2];
    return add_lanes(lane);
}

typedef float dot_fn(const struct weights *w, int64_t row, const uint8_t *operand);

static void any_tile(const struct tile *tile, dot_fn *dot) {
    for (int64_t s = 0; s < tile->streams; s++) {
        for (int64_t row = tile->first[s]; row < tile->first[s] + tile->rows; row++) {
            for (int64_t t = 0; t < tile->tokens; t++) {
                tile->y[s][t][row] = dot(tile->weights[s], row, tile->operands[t]);
            }
        }
    }
}

static void coded_tile(const struct tile *tile) {
    any_tile(tile, coded_dot);
}

static void plain_tile(const struct tile *tile) {
    any_tile(tile, values_dot);
}

#define BY_PRECISION {coded_tile, coded_tile, coded_tile}
#define BY_GROUP_SIZE {BY_PRECISION, BY_PRECISION, BY_PRECISION, BY_PRECISION}
#define FOUR_CODES BY_GROUP_SIZE, BY_GROUP_SIZE, BY_GROUP_SIZE, BY_GROUP_SIZE

const struct kernels kernels_portable = {
    .name = "portable",
    .prepare = prepare,
    .order = ORDERS_OF(ORDER_PLAIN, ORDER_PLAIN, ORDER_PAIRS),
    .runs = ONE_RUN,
    .coded = {FOUR_CODES, FOUR_CODES, BY_GROUP_SIZE, BY_GROUP_SIZE, BY_GROUP_SIZE},
    .plain = {plain_tile, plain_tile, plain_tile, plain_tile},
    .activate = activate,
    .add_scaled = add_scaled,
    .read = read_bytes,
};
