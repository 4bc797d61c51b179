/* NEON with dot products (FEAT_DotProd), for every aarch64 since about 2018. A block is 16 groups: four vectors of four
 * lanes. Codes are signed bytes for the instruction, so wide codes lose 128 and get it back from the digits' sum.
 *
 * Four products at a time go to each 32-bit lane of a group's vector; pairwise sums of four groups' vectors are one
 * vector, a group per lane. */
#include "plain_neon.h"

/* A block of a row: 16 groups. */
struct block {
    const uint8_t *packed;
    const float *scales;
    const float *biases;
};

/* ---- dots */

/* Four groups, number `quad` of their block, of `rows` rows against planes of digits, each worth 256 times the next. */
INLINE void dot_quad(int32x4_t *sums, const struct block *b, int rows, const int8_t *digits, int planes, int quad,
                     struct kind kind) {
    const int parts = parts_of(kind), plane = BLOCK_GROUPS * kind.group_size;
    const int per_quad = kind.group_size / 4 / parts;       /* vectors of codes */
    const int together = per_quad < 4 ? per_quad : 4;       /* sums; two groups share one where per_quad is 2, all if 1 */
    const int vectors = per_quad / together;                /* of one sum */
    const int8x16_t half = vdupq_n_s8(64);                  /* of what wide codes have lost */
    int32x4_t sum[MAX_STREAMS][4], lost[4];
    UNROLL
    for (int i = 0; i < together; i++) {
        int8x16_t codes[MAX_STREAMS][8][4];
        const int first = per_quad * quad + vectors * i;
        UNROLL
        for (int row = 0; row < rows; row++) {
            sum[row][i] = vdupq_n_s32(0);
            UNROLL
            for (int v = 0; v < vectors; v++) take_apart(codes[row][v], packed_bytes(b[row].packed, first + v, kind), kind);
        }
        lost[i] = vdupq_n_s32(0);
        UNROLL
        for (int p = 0; p < planes; p++) {
            UNROLL
            for (int row = 0; row < rows; row++) {
                if (p > 0) sum[row][i] = vshlq_n_s32(sum[row][i], 8);
            }
            if (p > 0) lost[i] = vshlq_n_s32(lost[i], 8);
            UNROLL
            for (int v = 0; v < vectors * parts; v++) {
                const int8x16_t x = vld1q_s8(digits + p * plane + v % parts * plane / parts + 16 * (first + v / parts));
                if (is_wide(kind.code)) lost[i] = vdotq_s32(lost[i], half, x);
                UNROLL
                for (int row = 0; row < rows; row++) sum[row][i] = vdotq_s32(sum[row][i], codes[row][v / parts][v % parts], x);
            }
        }
        UNROLL
        for (int row = 0; row < rows; row++) {
            if (is_wide(kind.code)) sum[row][i] = vaddq_s32(sum[row][i], vshlq_n_s32(lost[i], 1));
        }
    }
    UNROLL
    for (int row = 0; row < rows; row++) {
        const int32x4_t *s = sum[row];
        sums[row] = together == 1   ? s[0]
                    : together == 2 ? vpaddq_s32(s[0], s[1])
                                    : vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
    }
}

/* lanes[row] += a block of each row times the same block of an operand. */
INLINE void multiply(float32x4_t (*lanes)[QUADS], const struct block *b, int rows, const struct operand *x,
                     int64_t block, struct kind kind) {
    const int plane = BLOCK_GROUPS * kind.group_size;
    const int8_t *digits = x->digits + block * kind.planes * plane;
    const int joined = joined_digits(kind.code, kind.planes);
    for (int q = 0; q < QUADS; q++) {
        const float32x4_t scale = vld1q_f32(x->scale + BLOCK_GROUPS * block + 4 * q);
        const float32x4_t sum = vld1q_f32(x->sum + BLOCK_GROUPS * block + 4 * q);
        int32x4_t high[MAX_STREAMS], low[MAX_STREAMS];
        dot_quad(high, b, rows, digits, joined, q, kind);
        if (joined < kind.planes) dot_quad(low, b, rows, digits + plane, 2, q, kind);
        UNROLL
        for (int row = 0; row < rows; row++) {
            float32x4_t v = vcvtq_f32_s32(high[row]);
            if (joined < kind.planes) v = vfmaq_f32(vcvtq_f32_s32(low[row]), v, vdupq_n_f32(65536.0f));
            float32x4_t *lane = &lanes[row][q];
            *lane = vfmaq_f32(*lane, vmulq_f32(vld1q_f32(b[row].scales + 4 * q), scale), v);
            *lane = vfmaq_f32(*lane, vld1q_f32(b[row].biases + 4 * q), sum);
        }
    }
}

/* One operand: row `row` of each stream from its first byte to its last, which is how DRAM is fastest. */
INLINE void row_by_one(const struct tile *tile, int64_t row, int streams, struct kind kind) {
    const struct shape *shape = &tile->weights[0]->shape;
    const struct operand x = operand_at(shape, tile->operands[0]);
    const int64_t groups = shape->columns / kind.group_size, blocks = shape_blocks(shape);
    const int64_t per_chunk = CHUNK_GROUPS / BLOCK_GROUPS;
    float scales[MAX_STREAMS][CHUNK_GROUPS], biases[MAX_STREAMS][CHUNK_GROUPS];
    uint8_t copy[MAX_STREAMS][MAX_BLOCK_BYTES + OVERREAD];
    float32x4_t lanes[MAX_STREAMS][QUADS];
    for (int s = 0; s < streams; s++) {
        for (int q = 0; q < QUADS; q++) lanes[s][q] = vdupq_n_f32(0);
    }
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t at = block % per_chunk * BLOCK_GROUPS, left = groups - block * BLOCK_GROUPS;
        struct block b[MAX_STREAMS];
        UNROLL
        for (int s = 0; s < streams; s++) {
            const int64_t r = tile->first[s] + row;
            if (at == 0) {
                load_groups(tile->weights[s], r, block * BLOCK_GROUPS, left < CHUNK_GROUPS ? left : CHUNK_GROUPS,
                            scales[s], biases[s]);
            }
            const uint8_t *packed = block_codes(tile->weights[s], r, block, copy[s], kind);
            b[s] = (struct block){packed, scales[s] + at, biases[s] + at};
        }
        multiply(lanes, b, streams, &x, block, kind);
    }
    for (int s = 0; s < streams; s++) tile->y[s][0][tile->first[s] + row] = add_lanes(lanes[s]);
}

INLINE void tile_by_one(const struct tile *tile, struct kind kind) {
    for (int64_t row = 0; row < tile->rows; row++) {
        if (tile->streams == 2) {
            row_by_one(tile, row, 2, kind);
        } else {
            row_by_one(tile, row, 1, kind);
        }
    }
}

/* ---- the table */

#include "table.h"

KERNELS(2, 16) KERNELS(2, 32) KERNELS(2, 64) KERNELS(2, 128)
KERNELS(3, 16) KERNELS(3, 32) KERNELS(3, 64) KERNELS(3, 128)
KERNELS(4, 32) KERNELS(4, 64) KERNELS(4, 128)
KERNELS(5, 32) KERNELS(5, 64) KERNELS(5, 128)
KERNELS(6, 16) KERNELS(6, 32) KERNELS(6, 64) KERNELS(6, 128)
KERNELS(8, 32) KERNELS(8, 64) KERNELS(8, 128)
KERNELS(FP4, 16) KERNELS(FP4, 32)
KERNELS(IQ4, 32) KERNELS(IQ3, 32) KERNELS(IQ2, 16) KERNELS(IQ2, 32) KERNELS(IQ1, 16)

const struct kernels kernels_neon = {
    .name = "neon",
    .prepare = prepare,
    .order = ORDERS_OF(ORDER_PLAIN, ORDER_PLAIN, ORDER_PAIRS),
    .runs = ONE_RUN,
    .coded[CODE_2] = {BY_PRECISION(2, 16), FROM_32(2)},
    .coded[CODE_3] = {BY_PRECISION(3, 16), FROM_32(3)},
    .coded[CODE_4] = {{0}, FROM_32(4)},
    .coded[CODE_5] = {{0}, FROM_32(5)},
    .coded[CODE_6] = {BY_PRECISION(6, 16), FROM_32(6)},
    .coded[CODE_8] = {{0}, FROM_32(8)},
    .coded[CODE_FP4] = {BY_PRECISION(FP4, 16), BY_PRECISION(FP4, 32)},
    .coded[CODE_IQ4] = {{0}, BY_PRECISION(IQ4, 32)},
    .coded[CODE_IQ3] = {{0}, BY_PRECISION(IQ3, 32)},
    .coded[CODE_IQ2] = {BY_PRECISION(IQ2, 16), BY_PRECISION(IQ2, 32)},
    .coded[CODE_IQ1] = {BY_PRECISION(IQ1, 16)},
    .plain = {plain_bf16, plain_f16, plain_f32, plain_fp8},
    .activate = activate,
    .add_scaled = add_scaled,
    .read = read_bytes,
};
