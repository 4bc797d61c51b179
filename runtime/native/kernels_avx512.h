/* AVX-512 (F, BW, VL, DQ), compiled three times: kernels_avx512vnni.c has an instruction for dot4 (SE_VNNI), which
 * kernels_avx512.c builds from two, and kernels_avx512vbmi.c also shuffles of whole vectors (SE_VBMI). A vector holds 16 lanes; a block is 16 groups, so its scales are one vector.
 *
 * Decoded codes and digits are bytes in the same order; dot4 adds four products into each 32-bit lane. What is left per
 * group is a few lanes of one vector, and add_lanes of 16 groups at once makes them one vector, a group per lane. */
#include "codes_avx512.h"
#include "plain_avx512.h"
#include "sums_avx512.h"
#include "tiles_avx512.h"

#include <stdbool.h>

/* A block of a row: its codes, packed or as vectors of bytes, and its scales. */
struct block {
    const uint8_t *packed;
    const __m512i *decoded; /* or NULL */
    __m512 scale;
    __m512 bias;
};

/* Vector v of a block's codes: codes [parts]. */
INLINE void codes_of(__m512i *codes, const struct block *b, int v, struct kind kind) {
    if (b->decoded == NULL) {
        unpack(codes, b->packed, v, kind);
    } else {
        UNROLL
        for (int part = 0; part < parts_of(kind); part++) codes[part] = b->decoded[parts_of(kind) * v + part];
    }
}

/* Where the products of a block go: each row has `lanes` 32-bit lanes of a sum for every group. */
struct split {
    int parts, joined, vectors; /* of codes: parts of a byte, vectors of each part that make a sum, and both together */
    int lanes;                  /* of a group in a sum, and so many sums has the block */
    int plane;                  /* bytes of digits */
};

INLINE struct split split_of(struct kind kind) {
    const int parts = parts_of(kind), joined = runs_of(kind), vectors = parts * joined;
    return (struct split){parts, joined, vectors, kind.group_size / vectors / 4, BLOCK_GROUPS * kind.group_size};
}

/* Digits of plane p for the codes of `part` in vector v, which all rows share. */
INLINE __m512i digits_of(const int8_t *digits, int p, int part, int v, int rows, struct split split) {
    __m512i x = _mm512_loadu_si512(digits + p * split.plane + part * split.plane / split.parts + 64 * v);
    return rows > 1 ? in_register(x) : x;
}

/* sum[row][i] and, of two `beside` each other, the next one: plane after plane, so that a shift for each is all that
 * brings them together. */
INLINE void sums_by_plane(__m512i (*sum)[4], int i, int beside, int first, const struct block *b, int rows,
                          const int8_t *digits, int planes, struct kind kind, struct split split) {
    __m512i codes[MAX_STREAMS][2 * 4]; /* [row][sum][joined][part] */
    UNROLL
    for (int j = 0; j < beside * split.joined; j++) {
        UNROLL
        for (int row = 0; row < rows; row++) codes_of(codes[row] + split.parts * j, &b[row], first + j, kind);
    }
    UNROLL
    for (int row = 0; row < rows; row++) sum[row][i] = sum[row][i + beside - 1] = _mm512_setzero_si512();
    UNROLL
    for (int j = 0; j < beside * planes * split.vectors; j++) {
        const int n = j % beside, k = j / beside % split.vectors, p = j / beside / split.vectors;
        const int v = first + split.joined * n + k / split.parts;
        const __m512i x = digits_of(digits, p, k % split.parts, v, rows, split);
        UNROLL
        for (int row = 0; row < rows; row++) {
            __m512i *to = &sum[row][i + n];
            if (p > 0 && k == 0) *to = _mm512_slli_epi32(*to, 8);
            *to = dot4(*to, codes[row][split.vectors * n + k], x, kind.code);
        }
    }
}

/* The same part after part, where a group has more than two vectors: a chain of all their products would be waited for, and
 * all parts at once would not find registers. Planes have a sum each (docs/LEARNED.md 111, 121). */
INLINE void sums_by_part(__m512i (*sum)[4], int i, int beside, int first, const struct block *b, int rows,
                         const int8_t *digits, int planes, struct kind kind, struct split split) {
    __m512i packed[MAX_STREAMS][4], apart[MAX_STREAMS][2][3] = {0}; /* [row][sum * joined], [row][sum][plane] */
    UNROLL
    for (int j = 0; j < beside * split.joined; j++) {
        UNROLL
        for (int row = 0; row < rows; row++) {
            if (b->decoded == NULL) packed[row][j] = in_register(packed_bytes(b[row].packed, first + j, kind));
        }
    }
    UNROLL
    for (int k = 0; k < split.vectors; k++) {
        const int part = k % split.parts;
        __m512i codes[MAX_STREAMS][2];
        UNROLL
        for (int n = 0; n < beside; n++) {
            const int j = split.joined * n + k / split.parts;
            UNROLL
            for (int row = 0; row < rows; row++) {
                codes[row][n] = b->decoded == NULL ? part_of(packed[row][j], part, kind)
                                                   : b[row].decoded[split.parts * (first + j) + part];
            }
        }
        UNROLL
        for (int p = 0; p < planes; p++) {
            UNROLL
            for (int n = 0; n < beside; n++) {
                const __m512i x = digits_of(digits, p, part, first + split.joined * n + k / split.parts, rows, split);
                UNROLL
                for (int row = 0; row < rows; row++) apart[row][n][p] = dot4(apart[row][n][p], codes[row][n], x, kind.code);
            }
        }
    }
    UNROLL
    for (int j = 0; j < rows * beside; j++) {
        __m512i *to = &sum[j % rows][i + j / rows], *of = apart[j % rows][j / rows];
        *to = of[0];
        UNROLL
        for (int p = 1; p < planes; p++) *to = _mm512_add_epi32(_mm512_slli_epi32(*to, 8), of[p]);
    }
}

/* Blocks of `rows` rows against planes of digits, each worth 256 times the next: the sum of every group, of which only
 * the first `groups` need to be right. Rows share each load of digits, which else would be the limit, and two sums of a
 * row go side by side, for each waits for its last addition, unless their codes would not find registers. */
INLINE void dot_planes(__m512i *sums, const struct block *b, int rows, int64_t groups, const int8_t *digits, int planes,
                       struct kind kind) {
    const struct split split = split_of(kind);
    const int lanes = split.lanes, together = lanes < 4 ? lanes : 4; /* sums that are added up together */
    const bool by_part = split.parts > 1 && split.vectors > 2;
    const int beside = lanes == 1 || (split.parts < 4 && split.vectors > 2 && planes > 1) ? 1 : 2;
    __m512i quads[MAX_STREAMS][4] = {0};
    UNROLL
    for (int q = 0; q < lanes / together; q++) {
        if (q > 0 && groups <= q * together * BLOCK_GROUPS / lanes) break;
        __m512i sum[MAX_STREAMS][4];
        UNROLL
        for (int i = 0; i < together; i += beside) {
            const int first = split.joined * (together * q + i);
            if (by_part) {
                sums_by_part(sum, i, beside, first, b, rows, digits, planes, kind, split);
            } else {
                sums_by_plane(sum, i, beside, first, b, rows, digits, planes, kind, split);
            }
        }
        UNROLL
        for (int row = 0; row < rows; row++) {
            __m512i *v = sum[row];
            quads[row][q] = together == 4 ? quads_i(v[0], v[1], v[2], v[3]) : together == 2 ? halves_i(v[0], v[1]) : v[0];
        }
    }
    UNROLL
    for (int row = 0; row < rows; row++) sums[row] = order_groups(quads[row], lanes);
}

/* What follows `blocks` blocks later. */
INLINE struct operand later(struct operand x, int64_t blocks, struct kind kind) {
    const int64_t groups = BLOCK_GROUPS * blocks;
    return (struct operand){x.scale + groups, x.sum + groups, x.digits + groups * kind.planes * kind.group_size};
}

/* lanes[row] += a block of each row, of which `groups` exist, times the next block of an operand. */
INLINE void multiply(__m512 *lanes, const struct block *b, int rows, int64_t groups, const struct operand *x,
                     struct kind kind) {
    const int plane = BLOCK_GROUPS * kind.group_size;
    const int8_t *digits = opaque(x->digits);
    const int joined = joined_digits(kind.code, kind.planes);
    const __m512 scale = _mm512_loadu_ps(x->scale), sum = _mm512_loadu_ps(x->sum);
    __m512i high[MAX_STREAMS], low[MAX_STREAMS];
    dot_planes(high, b, rows, groups, digits, joined, kind);
    if (joined < kind.planes) dot_planes(low, b, rows, groups, digits + plane, 2, kind);
    UNROLL
    for (int row = 0; row < rows; row++) {
        __m512 v = _mm512_cvtepi32_ps(high[row]);
        if (joined < kind.planes) v = _mm512_fmadd_ps(v, _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low[row]));
        lanes[row] = _mm512_fmadd_ps(_mm512_mul_ps(b[row].scale, scale), v, lanes[row]);
        lanes[row] = _mm512_fmadd_ps(b[row].bias, sum, lanes[row]);
    }
}

/* ---- tiles */

/* Whether codes are asked for far ahead. The processor's own prefetchers bring more than may be asked for (34 against
 * 24 GB/s), but only to loops that come back soon: not with three planes, nor with the scales of Q4_K (docs/LEARNED.md 50). */
INLINE bool asks_ahead(struct kind kind) {
    return kind.planes > 1 || kind.group_size == 16 || kind.code == CODE_2 || (kind.group_size == 32 && kind.code == CODE_4);
}

/* One operand: each stream from its first byte to its last, which is how DRAM is fastest. All rows are in place, so no
 * loop over blocks calls anything, or constants would lose their registers. */
INLINE void rows_by_one(const struct tile *tile, int64_t first, int64_t rows, struct kind kind) {
    _Alignas(64) float lanes[MAX_STREAMS * TILE_ROWS * 16];
    const int streams = 2, last = (int)tile->streams - 1; /* one stream alone is rare: it is computed twice */
    const struct shape *shape = &tile->weights[0]->shape;
    const struct operand first_block = operand_at(shape, tile->operands[0]);
    const int64_t groups = shape->columns / kind.group_size;
    struct groups from[MAX_STREAMS];
    const uint8_t *codes[MAX_STREAMS];
    UNROLL
    for (int s = 0; s < streams; s++) {
        const struct weights *w = tile->weights[s < last ? s : last];
        const int64_t r = tile->first[s < last ? s : last] + first;
        from[s] = groups_of(w, r);
        codes[s] = w->weight + r * w->weight_stride;
    }
    const int64_t stride = tile->weights[0]->weight_stride;
    const bool near = tile->weights[0]->near;
    const int superblocks = superblocks_of(known_scales(tile->weights[0], kind), kind);
    for (int64_t row = 0, at = 0, place = SPAN; row < rows; row++) {
        __m512 sum[MAX_STREAMS] = {0};
        struct operand x = first_block;
        struct block b[MAX_STREAMS];
        UNROLL
        for (int s = 0; s < streams; s++) b[s].packed = codes[s] + row * stride, b[s].decoded = NULL;
        int64_t left = groups;
        for (; left > 0; left -= BLOCK_GROUPS, at += BLOCK_GROUPS, place += superblocks) {
            if (superblocks > 0 && place > SPAN - superblocks) {
                for (int s = 0; s < streams; s++) begin_span(&from[s], at, kind);
                place = 0;
            }
            UNROLL
            for (int s = 0; s < streams; s++) {
                b[s].packed = opaque(b[s].packed);
                sixteen_groups(&b[s].scale, &b[s].bias, &from[s], row, at, left, place, kind);
                if (__builtin_expect(near, true)) {
                    UNROLL
                    for (int j = 0; j < block_bytes(kind); j += 64) _mm_prefetch(b[s].packed + j + NEAR_BYTES, _MM_HINT_T0);
                } else if (asks_ahead(kind)) {
                    UNROLL
                    for (int j = 0; j < block_bytes(kind); j += 64) _mm_prefetch(b[s].packed + j + AHEAD_BYTES, _MM_HINT_T1);
                }
            }
            multiply(sum, b, streams, left, &x, kind);
            x = later(x, 1, kind);
            UNROLL
            for (int s = 0; s < streams; s++) b[s].packed += block_bytes(kind);
        }
        at += left; /* what the last block of a row has too few of: groups, and superblocks */
        place += left * superblocks / BLOCK_GROUPS;
        for (int s = 0; s <= last; s++) _mm512_store_ps(lanes + 16 * (TILE_ROWS * s + row), sum[s]);
    }
    for (int s = 0; s <= last; s++) {
        float *y = tile->y[s][0] + tile->first[s] + first;
        _mm512_mask_storeu_ps(y, present(rows), add_rows(lanes + 16 * TILE_ROWS * s));
    }
}

/* Rows first..end of all streams times one operand. */
INLINE void streams_by_one(const struct tile *tile, int64_t first, int64_t end, struct kind kind) {
    for (; first < end; first += TILE_ROWS) {
        rows_by_one(tile, first, end - first < TILE_ROWS ? end - first : TILE_ROWS, kind);
    }
}

enum { TILE_TOKENS = 8 }; /* their digits of one block stay in the first-level cache while the rows pass by */

/* A few operands, or codes that are not turned: each block of a row is unpacked once for all of them. lanes [TILE_TOKENS][TILE_ROWS][16] */
INLINE void rows_by_many(const struct tile *tile, int stream, int64_t first, int64_t rows, int64_t token,
                         int64_t tokens, float *lanes, struct kind kind) {
    const struct weights *w = tile->weights[stream];
    const int parts = parts_of(kind), vectors = BLOCK_GROUPS * kind.group_size / parts / 64;
    const int64_t groups = w->shape.columns / kind.group_size;
    uint8_t copy[MAX_BLOCK_BYTES + OVERREAD];
    struct operand x[TILE_TOKENS];
    for (int64_t t = 0; t < tokens; t++) x[t] = operand_at(&w->shape, tile->operands[token + t]);
    for (int64_t at = 0, block = 0; at < groups; at += BLOCK_GROUPS, block++) {
        const int64_t left = groups - at < BLOCK_GROUPS ? groups - at : BLOCK_GROUPS;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t r = tile->first[stream] + first + row;
            __m512i codes[32];
            struct groups from = groups_of(w, r);
            struct block b = {.decoded = codes};
            begin_span(&from, at, kind);
            sixteen_groups(&b.scale, &b.bias, &from, 0, at, left, 0, kind);
            const uint8_t *packed = block_codes(w, r, block, copy, kind);
            UNROLL
            for (int v = 0; v < vectors; v++) unpack(codes + parts * v, packed, v, kind);
            for (int64_t t = 0; t < tokens; t++) {
                float *l = lanes + 16 * (TILE_ROWS * t + row);
                __m512 sum = _mm512_load_ps(l);
                const struct operand here = later(x[t], block, kind);
                multiply(&sum, &b, 1, left, &here, kind);
                _mm512_store_ps(l, sum);
            }
        }
    }
}

/* Rows first..first + rows of one stream times all tokens. */
INLINE void stream_by_many(const struct tile *tile, int s, int64_t first, int64_t rows, struct kind kind) {
    _Alignas(64) float lanes[TILE_TOKENS * TILE_ROWS * 16];
    for (int64_t token = 0; token < tile->tokens; token += TILE_TOKENS) {
        const int64_t left = tile->tokens - token, tokens = left < TILE_TOKENS ? left : TILE_TOKENS;
        memset(lanes, 0, (size_t)tokens * TILE_ROWS * 16 * sizeof *lanes);
        rows_by_many(tile, s, first, rows, token, tokens, lanes, kind);
        for (int64_t t = 0; t < tokens; t++) {
            float *y = tile->y[s][token + t] + tile->first[s] + first;
            _mm512_mask_storeu_ps(y, present(rows), add_rows(lanes + 16 * TILE_ROWS * t));
        }
    }
}

/* Rows first..end of all streams times all tokens. */
INLINE void streams_by_many(const struct tile *tile, int64_t first, int64_t end, struct kind kind) {
    for (; first < end; first += TILE_ROWS) {
        const int64_t rows = end - first < TILE_ROWS ? end - first : TILE_ROWS;
        for (int s = 0; s < tile->streams; s++) stream_by_many(tile, s, first, rows, kind);
    }
}

/* streams_by_one and streams_by_many of one kind. Their lanes are their own: what a pointer may lead to is loaded again. */
typedef void rows_fn(const struct tile *tile, int64_t first, int64_t end);

APART void coded_tile(const struct tile *tile, struct kind kind, rows_fn *by_one, rows_fn *by_many) {
    int64_t in_place = tile->tokens == 1 ? tile->rows : 0;
    for (int s = 0; s < tile->streams; s++) {
        const int64_t rows = rows_in_place(tile->weights[s], kind) - tile->first[s];
        in_place = rows < in_place ? rows : in_place;
    }
    in_place = in_place < 0 ? 0 : in_place;
    by_one(tile, 0, in_place);
    by_many(tile, in_place, tile->rows);
}

/* ---- the table */

#define KIND(code, group_size, planes, scales) ((struct kind){CODE_##code, group_size, planes, scales})
#define KERNEL(linkage, code, group_size, planes)                                                                     \
    static void one_##code##_##group_size##_##planes(const struct tile *tile, int64_t first, int64_t end) {           \
        const struct kind floats = KIND(code, group_size, planes, SCALES_FLOATS);                                     \
        const enum scales scales = scales_of(tile->weights[0]->encoding);                                             \
        if (scales == SCALES_LEVELS && may_have(SCALES_LEVELS, floats)) {                                             \
            streams_by_one(tile, first, end, KIND(code, group_size, planes, SCALES_LEVELS));                          \
        } else if (scales == SCALES_MINS && may_have(SCALES_MINS, floats)) {                                          \
            streams_by_one(tile, first, end, KIND(code, group_size, planes, SCALES_MINS));                            \
        } else {                                                                                                      \
            streams_by_one(tile, first, end, floats);                                                                 \
        }                                                                                                             \
    }                                                                                                                 \
    static void many_##code##_##group_size##_##planes(const struct tile *tile, int64_t first, int64_t end) {          \
        streams_by_many(tile, first, end, KIND(code, group_size, planes, SCALES_ANY));                                \
    }                                                                                                                 \
    static void turned_##code##_##group_size##_##planes(const struct tile *tile, int s, int64_t first, int64_t rows,  \
                                                        int64_t token, int64_t tokens) {                              \
        const struct kind kind = KIND(code, group_size, planes, SCALES_ANY);                                          \
        const int alike = runs_of(kind) == runs_of(KIND(code, group_size, SE_CLOSE, SCALES_ANY));                     \
        turned_by_many(tile, s, first, rows, token, tokens, kind,                                                     \
                       alike ? turn_##code##_##group_size : turn_exact_##code##_##group_size);                        \
    }                                                                                                                 \
    linkage void tile_##code##_##group_size##_##planes(const struct tile *tile) {                                     \
        const struct kind kind = KIND(code, group_size, planes, SCALES_ANY);                                          \
        if (is_turned(tile->tokens, kind)) {                                                                          \
            ask_for_rows(tile, kind);                                                                                 \
            turned_tile(tile, turned_##code##_##group_size##_##planes);                                               \
        } else {                                                                                                      \
            coded_tile(tile, kind, one_##code##_##group_size##_##planes, many_##code##_##group_size##_##planes);      \
        }                                                                                                             \
    }

/* Codes are turned alike for every precision, but for other runs in exact. */
#define TURN(name, code, group_size, planes)                                                                          \
    APART void name##_##code##_##group_size(struct turned *turned, int vector, const struct weights *w, int64_t first,\
                                            int64_t rows, int64_t block, int slice) {                                 \
        turn_rows(turned, vector, w, first, rows, block, slice, KIND(code, group_size, planes, SCALES_ANY));          \
    }
#define KERNELS_OF(linkage, code, group_size)                                           \
    TURN(turn, code, group_size, SE_CLOSE) TURN(turn_exact, code, group_size, SE_EXACT) \
    KERNEL(linkage, code, group_size, 1) KERNEL(linkage, code, group_size, 2) KERNEL(linkage, code, group_size, 3)
#define KERNELS(code, group_size) KERNELS_OF(static, code, group_size)
/* Nothing of VBMI is in these: kernels_avx512vbmi.c takes those of kernels_avx512vnni.c. */
#if defined(SE_VBMI)
#define VNNI_KERNELS(code, group_size) \
    tile_fn tile_##code##_##group_size##_1, tile_##code##_##group_size##_2, tile_##code##_##group_size##_3;
#elif defined(SE_VNNI)
#define VNNI_KERNELS(code, group_size) KERNELS_OF(extern, code, group_size)
#else
#define VNNI_KERNELS(code, group_size) KERNELS(code, group_size)
#endif
VNNI_KERNELS(2, 16) VNNI_KERNELS(2, 32) VNNI_KERNELS(2, 64) VNNI_KERNELS(2, 128)
KERNELS(3, 16) KERNELS(3, 32) KERNELS(3, 64) KERNELS(3, 128)
VNNI_KERNELS(4, 32) VNNI_KERNELS(4, 64) VNNI_KERNELS(4, 128)
KERNELS(5, 32) KERNELS(5, 64) KERNELS(5, 128)
KERNELS(6, 16) KERNELS(6, 32) KERNELS(6, 64) KERNELS(6, 128)
VNNI_KERNELS(8, 32) VNNI_KERNELS(8, 64) VNNI_KERNELS(8, 128)
KERNELS(FP4, 16) KERNELS(FP4, 32)
KERNELS(IQ4, 32) KERNELS(IQ3, 32) KERNELS(IQ2, 16) KERNELS(IQ2, 32) KERNELS(IQ1, 16)
#define BY_PRECISION(code, group_size) \
    {tile_##code##_##group_size##_1, tile_##code##_##group_size##_2, tile_##code##_##group_size##_3}
#define FROM_32(code) BY_PRECISION(code, 32), BY_PRECISION(code, 64), BY_PRECISION(code, 128)

#define KERNELS_AVX512(level, asks_near)                                                                           \
    {                                                                                                            \
        .name = level, .prepare = prepare, .activate = activate, .add_scaled = add_scaled, .read = read_bytes,   \
        .order = ORDERS, .runs = RUNS, .near = asks_near,                                                        \
        .coded[CODE_2] = {BY_PRECISION(2, 16), FROM_32(2)}, .coded[CODE_3] = {BY_PRECISION(3, 16), FROM_32(3)},  \
        .coded[CODE_4] = {{0}, FROM_32(4)}, .coded[CODE_5] = {{0}, FROM_32(5)},                                  \
        .coded[CODE_6] = {BY_PRECISION(6, 16), FROM_32(6)}, .coded[CODE_8] = {{0}, FROM_32(8)},                  \
        .coded[CODE_FP4] = {BY_PRECISION(FP4, 16), BY_PRECISION(FP4, 32)},                                       \
        .coded[CODE_IQ4] = {{0}, BY_PRECISION(IQ4, 32)}, .coded[CODE_IQ3] = {{0}, BY_PRECISION(IQ3, 32)},        \
        .coded[CODE_IQ2] = {BY_PRECISION(IQ2, 16), BY_PRECISION(IQ2, 32)},                                       \
        .coded[CODE_IQ1] = {BY_PRECISION(IQ1, 16)},                                                              \
        .plain = {plain_bf16, plain_f16, plain_f32, plain_fp8},                                                  \
    }
