/* AVX2 with FMA and F16C. A vector holds 8 lanes, so a block of 16 groups is two halves of 8 groups each.
 *
 * Codes up to 6 bits meet 8-bit digits by maddubs, whose 16-bit sums are exact as long as few enough are added (room),
 * and are widened only when they must be: that instruction runs on one of four ports and is what decode waits for.
 * Wide codes would overflow there, so they meet 16-bit digits by madd (ORDER_WIDE). */
#include "plain_avx2.h"

/* ---- sums of 8 groups at once */

INLINE __m256i add(__m256i a, __m256i b, int narrow) {
    return narrow ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b);
}

/* The sums of a and b over each 64-bit lane, in order a0 b0 a1 b1 of each 128-bit lane. stages: how many additions of
 * two such sums, from this one on, are of 16-bit numbers. */
INLINE __m256i join(__m256i a, __m256i b, int stages) {
    if (stages == 0) a = widen(a), b = widen(b);
    const __m256i sum = add(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b), stages > 0);
    return stages == 1 ? widen(sum) : sum;
}

/* The sums of a, b, c and d over each 128-bit lane, of those of a and b and those of c and d. */
INLINE __m256i join_again(__m256i ab, __m256i cd, int stages) {
    const __m256i sum = add(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd), stages > 1);
    return stages == 2 ? widen(sum) : sum;
}

/* The same in order a0 a1 b0 b1 of each 128-bit lane: nothing is to be joined again. */
INLINE __m256i join_last(__m256i a, __m256i b, int stages) {
    if (stages == 0) a = widen(a), b = widen(b);
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88));
    const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd));
    const __m256i sum = add(even, odd, stages > 0);
    return stages > 0 ? widen(sum) : sum;
}

/* ---- products */

/* One group, or the groups that share a vector, against one plane: 16-bit sums if they fit, else 32-bit ones. */
INLINE __m256i dot_narrow(const __m256i *codes, const int8_t *digits, struct kind kind, int joined) {
    const int parts = parts_of(kind), room = room_of(kind), count = joined * parts;
    __m256i sum = _mm256_setzero_si256(), all = _mm256_setzero_si256();
    UNROLL
    for (int i = 0; i < count; i++) {
        const int8_t *x = digits + i / parts * 32 + i % parts * BLOCK_GROUPS / parts * kind.group_size;
        const __m256i product = _mm256_maddubs_epi16(codes[i], load(x));
        sum = i % room == 0 ? product : _mm256_add_epi16(sum, product);
        if (count > room && (i % room == room - 1 || i == count - 1)) all = _mm256_add_epi32(all, widen(sum));
    }
    return count > room ? all : sum;
}

/* The same for wide codes and 16-bit digits, in 32 bits. The lower plane holds Y + 128 (kernels.h). */
INLINE __m256i dot_wide(const __m256i *codes, const int8_t *digits, int lower, int joined) {
    __m256i sum = _mm256_setzero_si256();
    UNROLL
    for (int i = 0; i < joined; i++) {
        const __m256i even = _mm256_and_si256(codes[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes[i], 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, load(digits + 64 * i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, load(digits + 64 * i + 32)));
        if (!lower) continue;
        const __m256i codes_sum = _mm256_sad_epu8(codes[i], _mm256_setzero_si256());
        sum = _mm256_sub_epi32(sum, _mm256_slli_epi32(codes_sum, 7));
    }
    return sum;
}

/* For each plane the sums of 8 groups, half a block, in their order. */
INLINE void dot_planes(__m256i *sums, const uint8_t *packed, const int8_t *digits, struct kind kind) {
    const int parts = parts_of(kind), wide = is_wide(kind.code);
    const int group_bytes = kind.group_size / parts;                 /* of a group in a vector of codes */
    const int joined = group_bytes > 32 ? group_bytes / 32 : 1;      /* vectors of a group */
    const int vectors = HALF_GROUPS * group_bytes / 32 / joined;     /* 8, 4, 2 or 1 */
    const int most = room_of(kind) / (joined * parts), stages = wide || most < 1 ? -1 : most >= 4 ? 2 : most / 2;
    const int plane = BLOCK_GROUPS * kind.group_size * (wide ? 2 : 1);
    __m256i quad[3][2], first[3];
    if (vectors == 1) { /* a group is a lane already */
        __m256i codes[4];
        unpack(codes, packed, 0, kind);
        UNROLL
        for (int p = 0; p < kind.planes; p++) sums[p] = widen(dot_narrow(codes, digits + p * plane, kind, joined));
        return;
    }
    UNROLL
    for (int i = 0; i < vectors / 2; i++) { /* two groups, or two vectors of groups, at a time */
        __m256i codes[2][8];
        UNROLL
        for (int j = 0; j < 2 * joined; j++) {
            unpack(codes[j / joined] + j % joined * parts, packed, 2 * i * joined + j, kind);
        }
        UNROLL
        for (int p = 0; p < kind.planes; p++) {
            const int bytes = joined * (wide ? 64 : 32);
            const int8_t *x = digits + p * plane + 2 * i * bytes, *y = x + bytes;
            const __m256i a = wide ? dot_wide(codes[0], x, p == 1, joined) : dot_narrow(codes[0], x, kind, joined);
            const __m256i b = wide ? dot_wide(codes[1], y, p == 1, joined) : dot_narrow(codes[1], y, kind, joined);
            if (vectors == 2) {
                quad[p][0] = join_last(a, b, stages);
            } else if (i % 2 == 0) {
                first[p] = join(a, b, stages);
            } else {
                quad[p][i / 2] = join_again(first[p], join(a, b, stages), stages);
            }
        }
        __asm__("" ::: "memory"); /* or a compiler loads all codes at once and has no registers left */
    }
    UNROLL
    for (int p = 0; p < kind.planes; p++) {
        if (vectors == 8) {
            sums[p] = _mm256_add_epi32(_mm256_permute2x128_si256(quad[p][0], quad[p][1], 0x20),
                                       _mm256_permute2x128_si256(quad[p][0], quad[p][1], 0x31));
        } else {
            const __m256i order = vectors == 4 ? _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)
                                               : _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
            sums[p] = _mm256_permutevar8x32_epi32(quad[p][0], order);
        }
    }
}

/* lanes += half a block of a row times the same half of an operand, from group `at` of it on. */
INLINE __m256 multiply(__m256 lanes, const uint8_t *packed, __m256 scale, __m256 bias, const struct operand *x, int64_t at,
                       const int8_t *digits, struct kind kind) {
    __m256i sums[3];
    dot_planes(sums, packed, opaque(digits), kind);
    __m256 v;
    if (is_wide(kind.code) && kind.planes == 2) {
        v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[0]), _mm256_set1_ps(65536.0f), _mm256_cvtepi32_ps(sums[1]));
    } else {
        __m256i D = sums[0];
        UNROLL
        for (int p = 1; p < kind.planes; p++) D = _mm256_add_epi32(_mm256_slli_epi32(D, 8), sums[p]);
        v = _mm256_cvtepi32_ps(D);
    }
    lanes = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_loadu_ps(x->scale + at)), v, lanes);
    return _mm256_fmadd_ps(bias, _mm256_loadu_ps(x->sum + at), lanes);
}

/* ---- tiles */

/* Bytes of half a block, and of its digits in a plane. */
INLINE int half_bytes(struct kind kind) {
    return HALF_GROUPS * kind.group_size * code_width(kind.code) / 8;
}

INLINE int half_digits(struct kind kind) {
    return HALF_GROUPS * kind.group_size * (is_wide(kind.code) ? 2 : 1) / parts_of(kind);
}

/* Asks for what comes behind the codes of a block. */
INLINE void ask_codes(const uint8_t *packed, bool near, struct kind kind) {
    if (near) {
        UNROLL
        for (int i = 0; i < 2 * half_bytes(kind); i += 64) _mm_prefetch(packed + i + NEAR_BYTES, _MM_HINT_T0);
    } else {
        UNROLL
        for (int i = 0; i < 2 * half_bytes(kind); i += 64) _mm_prefetch(packed + i + AHEAD_BYTES, _MM_HINT_NTA);
    }
}

/* Asks the scales and biases of the rows that come next into the second-level cache. */
INLINE void ask_scales(const struct weights *w, int64_t row, int64_t rows) {
    const uint8_t *scales = w->scales + row * w->scales_stride, *biases = w->biases + row * w->biases_stride;
    for (int64_t i = 0; i < rows * w->scales_stride; i += 64) _mm_prefetch(scales + i, _MM_HINT_T1);
    for (int64_t i = 0; i < rows * w->biases_stride; i += 64) _mm_prefetch(biases + i, _MM_HINT_T1);
}

/* One operand, rows of whole halves: each stream from its first byte to its last, which is how DRAM is fastest. Nothing is
 * called, so that sums and addresses stay in registers. */
INLINE void rows_as_stored(const struct tile *tile, int streams, struct kind kind) {
    const struct shape *shape = &tile->weights[0]->shape;
    const struct operand x = operand_at(shape, tile->operands[0]);
    const int64_t groups = shape->columns / kind.group_size, block_digits = kind.planes * plane_bytes(shape);
    const bool near = tile->weights[0]->near;
    for (int64_t row = 0; row < tile->rows; row++) {
        const uint8_t *codes[MAX_STREAMS];
        struct groups from[MAX_STREAMS];
        __m256 lanes[MAX_STREAMS][2];
        UNROLL
        for (int s = 0; s < streams; s++) {
            const struct weights *w = tile->weights[s];
            codes[s] = w->weight + (tile->first[s] + row) * w->weight_stride;
            from[s] = groups_of(w, tile->first[s] + row);
            lanes[s][0] = lanes[s][1] = _mm256_setzero_ps();
            ask_scales(w, tile->first[s] + row + 1, 1);
        }
        const int8_t *digits = x.digits;
        for (int64_t at = 0; at < groups; at += BLOCK_GROUPS) {
            UNROLL
            for (int s = 0; s < streams; s++) {
                const uint8_t *packed = opaque(codes[s]);
                ask_codes(packed, near, kind);
                UNROLL
                for (int h = 0; h < 2; h++) {
                    __m256 scale, bias;
                    if (h > 0 && groups - at == HALF_GROUPS) break;
                    eight_groups(&scale, &bias, &from[s], at + h * HALF_GROUPS, kind);
                    lanes[s][h] = multiply(lanes[s][h], packed + h * half_bytes(kind), scale, bias, &x, at + h * HALF_GROUPS,
                                           digits + h * half_digits(kind), kind);
                }
                codes[s] += 2 * half_bytes(kind);
            }
            digits += block_digits;
        }
        UNROLL
        for (int s = 0; s < streams; s++) tile->y[s][0][tile->first[s] + row] = add_lanes(lanes[s][0], lanes[s][1]);
    }
}

/* The same for any rows, of which several have their scales converted together if their groups are whole blocks and fit one
 * chunk. */
INLINE void rows_by_one(const struct tile *tile, int64_t row, int64_t rows, struct kind kind) {
    const struct shape *shape = &tile->weights[0]->shape;
    const struct operand x = operand_at(shape, tile->operands[0]);
    const int64_t groups = shape->columns / kind.group_size, block_digits = kind.planes * plane_bytes(shape);
    const bool near = tile->weights[0]->near;
    float scales[MAX_STREAMS][CHUNK_GROUPS], biases[MAX_STREAMS][CHUNK_GROUPS];
    uint8_t copy[MAX_BLOCK_BYTES + OVERREAD];
    __m256 lanes[MAX_STREAMS][2] = {0};
    for (int64_t chunk = 0; chunk < rows * groups; chunk += CHUNK_GROUPS) {
        const int64_t n = rows * groups - chunk < CHUNK_GROUPS ? rows * groups - chunk : CHUNK_GROUPS;
        for (int s = 0; s < tile->streams; s++) {
            load_groups(tile->weights[s], tile->first[s] + row, chunk, n, scales[s], biases[s]);
            if (chunk == 0) ask_scales(tile->weights[s], tile->first[s] + row + rows, rows);
        }
        int64_t r = row, block = chunk / BLOCK_GROUPS;
        for (int64_t g = 0; g < n; g += BLOCK_GROUPS) {
            for (int s = 0; s < tile->streams; s++) {
                const uint8_t *packed = block_codes(tile->weights[s], tile->first[s] + r, block, n - g, copy, kind);
                ask_codes(packed, near, kind);
                for (int h = 0; h < 2 && h * HALF_GROUPS < n - g; h++) {
                    const int64_t at = g + h * HALF_GROUPS;
                    lanes[s][h] = multiply(lanes[s][h], packed + h * half_bytes(kind), _mm256_loadu_ps(scales[s] + at),
                                           _mm256_loadu_ps(biases[s] + at), &x, BLOCK_GROUPS * block + h * HALF_GROUPS,
                                           x.digits + block * block_digits + h * half_digits(kind), kind);
                }
            }
            if (++block * BLOCK_GROUPS < groups) continue;
            for (int s = 0; s < tile->streams; s++) {
                tile->y[s][0][tile->first[s] + r] = add_lanes(lanes[s][0], lanes[s][1]);
                lanes[s][0] = lanes[s][1] = _mm256_setzero_ps();
            }
            block = 0;
            r++;
        }
    }
}

INLINE void tile_by_one(const struct tile *tile, struct kind kind) {
    const int64_t groups = tile->weights[0]->shape.columns / kind.group_size;
    if (taken_as_stored(tile, kind)) {
        if (tile->streams == 2) {
            rows_as_stored(tile, 2, kind);
        } else {
            rows_as_stored(tile, 1, kind);
        }
        return;
    }
    const int64_t step = groups % BLOCK_GROUPS == 0 && groups <= CHUNK_GROUPS ? CHUNK_GROUPS / groups : 1;
    for (int64_t row = 0; row < tile->rows; row += step) {
        rows_by_one(tile, row, tile->rows - row < step ? tile->rows - row : step, kind);
    }
}

/* ---- the table */

#include "table.h"

KERNELS(2, 16) KERNELS(2, 32) KERNELS(2, 64) KERNELS(2, 128)
KERNELS(3, 16) KERNELS(3, 32) KERNELS(3, 64) KERNELS(3, 128)
KERNELS(4, 32) KERNELS(4, 64) KERNELS(4, 128)
KERNELS(5, 32) KERNELS(5, 64) KERNELS(5, 128)
KERNELS(6, 16) KERNELS(6, 32) KERNELS(6, 64) KERNELS(6, 128)
#define WIDE_KERNELS(code, group_size) TURN(code, group_size) KERNEL(code, group_size, 1) KERNEL(code, group_size, 2)
WIDE_KERNELS(8, 32) WIDE_KERNELS(8, 64) WIDE_KERNELS(8, 128)
WIDE_KERNELS(IQ4, 32)
KERNELS(FP4, 16) KERNELS(FP4, 32)
KERNELS(IQ3, 32) KERNELS(IQ2, 16) KERNELS(IQ2, 32) KERNELS(IQ1, 16)
#define WIDE_BY_PRECISION(code, group_size) \
    {tile_##code##_##group_size##_1, tile_##code##_##group_size##_1, tile_##code##_##group_size##_2}

#define KERNELS_AVX2(asks_near)                                                                                       \
    {                                                                                                                 \
        .name = "avx2", .near = asks_near,                                                                            \
        .prepare = prepare,                                                                                           \
        .order = ORDERS_OF(ORDER_PAIRS, ORDER_WIDE, ORDER_WIDE),                                                      \
        .runs = ONE_RUN,                                                                                              \
        .coded[CODE_2] = {BY_PRECISION(2, 16), FROM_32(2)},                                                           \
        .coded[CODE_3] = {BY_PRECISION(3, 16), FROM_32(3)},                                                           \
        .coded[CODE_4] = {{0}, FROM_32(4)},                                                                           \
        .coded[CODE_5] = {{0}, FROM_32(5)},                                                                           \
        .coded[CODE_6] = {BY_PRECISION(6, 16), FROM_32(6)},                                                           \
        .coded[CODE_8] = {{0}, WIDE_BY_PRECISION(8, 32), WIDE_BY_PRECISION(8, 64), WIDE_BY_PRECISION(8, 128)},        \
        .coded[CODE_FP4] = {BY_PRECISION(FP4, 16), BY_PRECISION(FP4, 32)},                                            \
        .coded[CODE_IQ4] = {{0}, WIDE_BY_PRECISION(IQ4, 32)},                                                         \
        .coded[CODE_IQ3] = {{0}, BY_PRECISION(IQ3, 32)},                                                              \
        .coded[CODE_IQ2] = {BY_PRECISION(IQ2, 16), BY_PRECISION(IQ2, 32)},                                            \
        .coded[CODE_IQ1] = {BY_PRECISION(IQ1, 16)},                                                                   \
        .plain = {plain_bf16, plain_f16, plain_f32, plain_fp8},                                                       \
        .activate = activate,                                                                                         \
        .add_scaled = add_scaled,                                                                                     \
        .read = read_bytes,                                                                                           \
    }

const struct kernels kernels_avx2 = KERNELS_AVX2(false);
const struct kernels kernels_avx2_near = KERNELS_AVX2(true);
