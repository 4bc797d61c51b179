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

/* Sum of code * digit over one group: codes point at the group's bytes, digits at its place in a plane. */
static int32_t group_dot(int bits, int64_t group_size, const uint8_t *codes, const int8_t *digits) {
    int32_t sum = 0;
    if (bits == 8) {
        for (int64_t i = 0; i < group_size; i++) sum += codes[i] * digits[i];
        return sum;
    }
    const int8_t *odd = digits + BLOCK_GROUPS * group_size / 2;
    for (int64_t i = 0; i < group_size / 2; i++) sum += (codes[i] & 15) * digits[i] + (codes[i] >> 4) * odd[i];
    return sum;
}

static float affine_dot(const struct weights *w, int64_t row, const uint8_t *bytes) {
    const struct shape *shape = &w->shape;
    const struct operand x = operand_at(shape, bytes);
    const int64_t group_size = shape->group_size, plane = BLOCK_GROUPS * group_size;
    const uint8_t *codes = w->weight + row * w->weight_stride;
    float lane[BLOCK_GROUPS] = {0};
    for (int64_t g = 0; g < shape->columns / group_size; g++) {
        const uint8_t *group_codes = codes + g * group_size * shape->bits / 8;
        const int8_t *digits = x.digits + g / BLOCK_GROUPS * shape->planes * plane +
                               g % BLOCK_GROUPS * group_size * shape->bits / 8;
        int32_t d[3] = {0};
        for (int i = 0; i < shape->planes; i++) d[i] = group_dot(shape->bits, group_size, group_codes, digits + i * plane);
        float v = (float)d[0];
        if (shape->planes == 3) {
            v = shape->bits == 4 ? (float)((256 * d[0] + d[1]) * 256 + d[2])
                                 : fmaf(v, 65536.0f, (float)(256 * d[1] + d[2]));
        }
        float *l = &lane[g % BLOCK_GROUPS];
        float scale = dtype_float(w->dtype, w->scales + row * w->scales_stride, g);
        float bias = dtype_float(w->dtype, w->biases + row * w->scales_stride, g);
        *l = fmaf(scale * x.scale[g], v, *l);
        *l = fmaf(bias, x.sum[g], *l);
    }
    return add_lanes(lane);
}

static float plain_dot(const struct weights *w, int64_t row, const uint8_t *operand) {
    const float *x = (const float *)(const void *)operand;
    float lane[PLAIN_LANES] = {0};
    for (int64_t k = 0; k < w->shape.columns; k++) {
        float *l = &lane[k % PLAIN_LANES];
        *l = fmaf(dtype_float(w->dtype, w->weight + row * w->weight_stride, k), x[k], *l);
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

static void affine_tile(const struct tile *tile) {
    any_tile(tile, affine_dot);
}

static void plain_tile(const struct tile *tile) {
    any_tile(tile, plain_dot);
}

#define BY_PRECISION {affine_tile, affine_tile}
#define BY_GROUP_SIZE {BY_PRECISION, BY_PRECISION, BY_PRECISION}

#ifndef TABLE /* kernels_avx2.c compiles these loops once more */
#define TABLE kernels_portable
#define NAME "portable"
#endif

const struct kernels TABLE = {
    .name = NAME,
    .prepare = prepare,
    .affine = {BY_GROUP_SIZE, BY_GROUP_SIZE},
    .plain = {plain_tile, plain_tile, plain_tile},
    .activate = activate,
    .add_scaled = add_scaled,
    .read = read_bytes,
};
