/* AVX-512 (F, BW, VL, DQ), compiled twice: kernels_avx512vnni.c has an instruction for dot4 (SE_VNNI), kernels_avx512.c
 * builds it from two. A vector holds 16 lanes; a block is 16 groups, so its scales are one vector.
 *
 * Decoded codes and digits are bytes in the same order; dot4 adds four products into each 32-bit lane. What is left per
 * group is a few lanes of one vector, and add_lanes of 16 groups at once makes them one vector, a group per lane. */
#include "groups_avx512.h"

/* ---- sixteen sums at once. Each step adds halves of two vectors: 16 vectors of 16 lanes become one. */

/* Per 128-bit lane: the sums of a, b, c and d, each (l0 + l2) + (l1 + l3). */
INLINE __m512i quads_i(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

/* 128-bit lanes a0 + a1, a2 + a3, b0 + b1, b2 + b3. */
INLINE __m512i pairs_i(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

INLINE __m512 quads_f(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

INLINE __m512 pairs_f(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* The tree of kernels.h for 16 rows: lanes [16 rows][16] -> one sum per row. */
INLINE __m512 add_rows(const float *lanes) {
    __m512 q[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
        const float *l = lanes + 64 * i;
        q[i] = quads_f(_mm512_load_ps(l), _mm512_load_ps(l + 16), _mm512_load_ps(l + 32), _mm512_load_ps(l + 48));
    }
    return pairs_f(pairs_f(q[0], q[1]), pairs_f(q[2], q[3]));
}

/* Per 64-bit lane: the sums of a and b, as a0 a1 b0 b1 of each 128-bit lane. */
INLINE __m512i halves_i(__m512i a, __m512i b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

/* Sums of 16 groups, in their order, from the quads of their vectors. A group fills `width` 128-bit lanes, 0 for half a
 * lane: then from halves_i. */
INLINE __m512i order_groups(const __m512i *quads, int width) {
    if (width == 0) {
        const __m512i order = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        return _mm512_permutexvar_epi32(order, quads[0]);
    }
    if (width == 1) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_epi32(order, quads[0]);
    }
    if (width == 2) {
        const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        return _mm512_permutexvar_epi32(order, pairs_i(quads[0], quads[1]));
    }
    return pairs_i(pairs_i(quads[0], quads[1]), pairs_i(quads[2], quads[3]));
}

/* ---- dots of bytes */

/* Each 32-bit lane of sum += four products of unsigned codes and signed digits. */
INLINE __m512i dot4(__m512i sum, __m512i codes, __m512i digits, int code) {
#ifdef SE_VNNI
    (void)code;
    return _mm512_dpbusd_epi32(sum, codes, digits);
#else
    const __m512i ones = _mm512_set1_epi16(1), top = _mm512_set1_epi8((char)0x80);
    if (code != CODE_8) return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, digits), ones));
    /* Two products of full bytes overflow 16 bits; those of the top bits and of the rest do not. */
    __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_and_si512(codes, top), digits), ones);
    __m512i low = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_andnot_si512(top, codes), digits), ones);
    return _mm512_add_epi32(sum, _mm512_add_epi32(high, low));
#endif
}

/* Vectors of codes that lie over one another in the packed bytes: the even and the odd columns of ORDER_PAIRS. */
INLINE int parts_of(struct kind kind) {
    return code_width(kind.code) == 4 ? 2 : 1;
}

/* A block of a row: 16 groups, `bytes` of codes left in the row if it is not whole. */
struct block {
    const uint8_t *packed;
    const __m512i *decoded; /* or NULL */
    int64_t bytes;
    __m512 scale;
    __m512 bias;
};

/* How far ahead codes are asked into the second-level cache; into the first they would drive out the operand. */
enum { AHEAD_BYTES = 4096 };

/* 64 codes of 2, 3, 5 or 6 bits in order. Four codes, which begin at a multiple of 4 bits, go to each 32-bit lane. */
INLINE __m512i unpack_stream(const uint8_t *packed, int width) {
#define LANE(j) j * width / 2, j * width / 2 + 1, j * width / 2 + 2, j * width / 2 + 3
    const __m128i bytes = _mm_setr_epi8(LANE(0), LANE(1), LANE(2), LANE(3));
#undef LANE
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const void *)packed));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const void *)(packed + 2 * width)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const void *)(packed + 4 * width)), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const void *)(packed + 6 * width)), 3);
    x = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(bytes));
    if (width % 2 == 1) x = _mm512_srlv_epi32(x, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4)));
    const int two = (1 << 2 * width) - 1, one = (1 << width) - 1;
    x = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi32(two)),
                        _mm512_and_si512(_mm512_slli_epi32(x, 16 - 2 * width), _mm512_set1_epi32(two << 16)));
    return _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi32(one | one << 16)),
                           _mm512_and_si512(_mm512_slli_epi32(x, 8 - width), _mm512_set1_epi32(one << 8 | one << 24)));
}

/* Vector i of a block's codes as bytes, in the order of the shape: codes [parts]. */
INLINE void decode(__m512i *codes, const struct block *b, int i, struct kind kind, int whole) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int width = code_width(kind.code), bytes = width == 4 ? 64 : 8 * width;
    const uint8_t *packed = b->packed + bytes * i;
    if (whole) _mm_prefetch(packed + AHEAD_BYTES, _MM_HINT_T1);
    if (width != 4 && width != 8) {
        codes[0] = unpack_stream(packed, width);
        return;
    }
    const int64_t left = whole ? 64 : b->bytes - bytes * i;
    __m512i p = _mm512_setzero_si512();
    if (left >= 64) {
        p = _mm512_loadu_si512(packed);
    } else if (left > 0) {
        p = _mm512_maskz_loadu_epi8(~0ULL >> (64 - left), packed);
    }
    codes[0] = width == 4 ? _mm512_and_si512(p, nibble) : p;
    if (width == 4) codes[1] = _mm512_and_si512(_mm512_srli_epi16(p, 4), nibble);
    if (kind.code == CODE_FP4) {
        const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(FP4_CODES));
        codes[0] = _mm512_shuffle_epi8(table, codes[0]);
        codes[1] = _mm512_shuffle_epi8(table, codes[1]);
    }
}

/* Blocks of `rows` rows against planes of digits, each worth 256 times the next: the sum of every group.
 * The rows share every load of digits, which else would be the limit. */
INLINE void dot_planes(__m512i *sums, const struct block *b, int rows, const int8_t *digits, int planes,
                       struct kind kind, int whole) {
    const int halves = parts_of(kind);
    const int width = kind.group_size / halves / 16;             /* 128-bit lanes of a group */
    const int joined = width == 8 ? 2 : 1;                       /* vectors of a group */
    const int vectors = kind.group_size / 4 / halves, plane = BLOCK_GROUPS * kind.group_size;
    const int together = width == 0 ? 2 : 4;                     /* sums that are added up together */
    __m512i quads[MAX_STREAMS][4];
    UNROLL
    for (int q = 0; q < vectors / joined / together; q++) {
        __m512i sum[MAX_STREAMS][4];
        UNROLL
        for (int i = 0; i < together; i++) {
            __m512i codes[MAX_STREAMS][2][2]; /* [row][joined][half] */
            UNROLL
            for (int j = 0; j < rows * joined; j++) {
                const int row = j / joined, v = joined * (together * q + i) + j % joined;
                if (b->decoded == NULL) {
                    decode(codes[row][j % joined], &b[row], v, kind, whole);
                } else {
                    codes[row][j % joined][0] = b[row].decoded[halves * v];
                    if (halves == 2) codes[row][j % joined][1] = b[row].decoded[halves * v + 1];
                }
            }
            UNROLL
            for (int row = 0; row < rows; row++) sum[row][i] = _mm512_setzero_si512();
            UNROLL
            for (int j = 0; j < planes * joined * halves; j++) {
                const int p = j / (joined * halves), part = j / halves % joined, half = j % halves;
                const int v = joined * (together * q + i) + part;
                const __m512i x = _mm512_loadu_si512(digits + p * plane + half * plane / 2 + 64 * v);
                UNROLL
                for (int row = 0; row < rows; row++) {
                    if (p > 0 && part + half == 0) sum[row][i] = _mm512_slli_epi32(sum[row][i], 8);
                    sum[row][i] = dot4(sum[row][i], codes[row][part][half], x, kind.code);
                }
            }
        }
        UNROLL
        for (int row = 0; row < rows; row++) {
            const __m512i *v = sum[row];
            quads[row][q] = together == 4 ? quads_i(v[0], v[1], v[2], v[3]) : halves_i(v[0], v[1]);
        }
    }
    UNROLL
    for (int row = 0; row < rows; row++) sums[row] = order_groups(quads[row], width);
}

/* lanes[row] += a block of each row times the same block of an operand. */
INLINE void multiply(__m512 *lanes, const struct block *b, int rows, const struct operand *x, int64_t block,
                     struct kind kind, int whole) {
    const int plane = BLOCK_GROUPS * kind.group_size;
    const int8_t *digits = opaque(x->digits + block * kind.planes * plane);
    const int joined = kind.code == CODE_8 ? 1 : kind.planes; /* planes whose sum fits 32 bits */
    const __m512 scale = _mm512_loadu_ps(x->scale + BLOCK_GROUPS * block);
    const __m512 sum = _mm512_loadu_ps(x->sum + BLOCK_GROUPS * block);
    __m512i high[MAX_STREAMS], low[MAX_STREAMS];
    dot_planes(high, b, rows, digits, joined, kind, whole);
    if (joined < kind.planes) dot_planes(low, b, rows, digits + plane, 2, kind, whole);
    UNROLL
    for (int row = 0; row < rows; row++) {
        __m512 v = _mm512_cvtepi32_ps(high[row]);
        if (joined < kind.planes) v = _mm512_fmadd_ps(v, _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low[row]));
        lanes[row] = _mm512_fmadd_ps(_mm512_mul_ps(b[row].scale, scale), v, lanes[row]);
        lanes[row] = _mm512_fmadd_ps(b[row].bias, sum, lanes[row]);
    }
}

/* ---- blocks of rows */

enum { MAX_BLOCK_BYTES = BLOCK_GROUPS * MAX_GROUP, OVERREAD = 16 };

/* Whether masked loads read a block that is not whole: for the commonest codes, as only they are worth twice the code. */
INLINE int masked(struct kind kind) {
    return kind.code == CODE_4 || kind.code == CODE_8;
}

/* A block but for its scales. `copy` takes codes that are no whole block and that no masked load reads. */
INLINE void load_block(struct block *b, const struct weights *w, int64_t row, int64_t block, uint8_t *copy,
                       struct kind kind, int whole) {
    const int width = code_width(kind.code);
    const int64_t group_bytes = kind.group_size * width / 8, first = block * BLOCK_GROUPS;
    b->packed = opaque(w->weight + row * w->weight_stride + first * group_bytes);
    b->bytes = (w->shape.columns / kind.group_size - first) * group_bytes;
    b->decoded = NULL;
    if (!whole && !masked(kind)) {
        memset(copy, 0, MAX_BLOCK_BYTES + OVERREAD);
        b->packed = memcpy(copy, b->packed, (size_t)b->bytes);
    }
}

/* ---- tiles */

/* One operand: each stream from its first byte to its last, which is how DRAM is fastest. lanes [2][TILE_ROWS][16] */
INLINE void rows_by_one(const struct tile *tile, int64_t first, int64_t rows, float *lanes, struct kind kind) {
    const int streams = 2, last = (int)tile->streams - 1; /* one stream alone is rare: it is computed twice */
    const struct shape *shape = &tile->weights[0]->shape;
    const struct operand x = operand_at(shape, tile->operands[0]);
    const int64_t groups = shape->columns / kind.group_size, whole = groups / BLOCK_GROUPS, blocks = shape_blocks(shape);
    const int64_t per_chunk = CHUNK_GROUPS / BLOCK_GROUPS;
    const int stored = taken_as_stored(tile);
    float scales[MAX_STREAMS][CHUNK_GROUPS], biases[MAX_STREAMS][CHUNK_GROUPS];
    uint8_t copy[MAX_STREAMS][MAX_BLOCK_BYTES + OVERREAD];
    for (int64_t row = first; row < first + rows; row++) {
        __m512 sum[MAX_STREAMS] = {0};
        struct block b[MAX_STREAMS];
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = block % per_chunk * BLOCK_GROUPS, left = groups - block * BLOCK_GROUPS;
            for (int s = 0; s <= last && at == 0 && !stored; s++) {
                load_groups(tile->weights[s], tile->first[s] + row, block * BLOCK_GROUPS,
                            left < CHUNK_GROUPS ? left : CHUNK_GROUPS, scales[s], biases[s]);
            }
            UNROLL
            for (int s = 0; s < streams; s++) {
                const int i = s < last ? s : last;
                const struct weights *w = tile->weights[i];
                const struct groups from = stored ? stored_groups(w, tile->first[i] + row, present(left))
                                                  : float_groups(scales[i], biases[i]);
                load_block(&b[s], w, tile->first[i] + row, block, copy[s], kind, block < whole);
                sixteen_groups(&b[s].scale, &b[s].bias, &from, stored ? block * BLOCK_GROUPS : at, kind);
            }
            if (block < whole || !masked(kind)) {
                multiply(sum, b, streams, &x, block, kind, 1);
            } else {
                multiply(sum, b, streams, &x, block, kind, 0);
            }
        }
        for (int s = 0; s <= last; s++) _mm512_store_ps(lanes + 16 * (TILE_ROWS * s + row - first), sum[s]);
    }
}

enum { TILE_TOKENS = 8 }; /* their digits of one block stay in the first-level cache while the rows pass by */

/* Several operands: each block of a row is decoded once for all of them. lanes [TILE_TOKENS][TILE_ROWS][16] */
INLINE void rows_by_many(const struct tile *tile, int stream, int64_t first, int64_t rows, int64_t token,
                         int64_t tokens, float *lanes, struct kind kind) {
    const struct weights *w = tile->weights[stream];
    const int halves = parts_of(kind), vectors = BLOCK_GROUPS * kind.group_size / halves / 64;
    const int64_t groups = w->shape.columns / kind.group_size, whole = groups / BLOCK_GROUPS;
    float scales[BLOCK_GROUPS], biases[BLOCK_GROUPS];
    uint8_t copy[MAX_BLOCK_BYTES + OVERREAD];
    struct operand x[TILE_TOKENS];
    for (int64_t t = 0; t < tokens; t++) x[t] = operand_at(&w->shape, tile->operands[token + t]);
    for (int64_t block = 0; block < shape_blocks(&w->shape); block++) {
        const int64_t left = groups - block * BLOCK_GROUPS;
        for (int64_t row = 0; row < rows; row++) {
            struct block b;
            __m512i codes[32];
            load_groups(w, tile->first[stream] + first + row, block * BLOCK_GROUPS,
                        left < BLOCK_GROUPS ? left : BLOCK_GROUPS, scales, biases);
            load_block(&b, w, tile->first[stream] + first + row, block, copy, kind, block < whole);
            b.scale = _mm512_loadu_ps(scales);
            b.bias = _mm512_loadu_ps(biases);
            UNROLL
            for (int i = 0; i < vectors; i++) decode(codes + halves * i, &b, i, kind, block < whole || !masked(kind));
            b.decoded = codes;
            for (int64_t t = 0; t < tokens; t++) {
                float *l = lanes + 16 * (TILE_ROWS * t + row);
                __m512 sum = _mm512_load_ps(l);
                multiply(&sum, &b, 1, &x[t], block, kind, 1);
                _mm512_store_ps(l, sum);
            }
        }
    }
}

/* Rows first..first + rows of one stream times all tokens. lanes [TILE_TOKENS][TILE_ROWS][16] */
INLINE void stream_by_many(const struct tile *tile, int s, int64_t first, int64_t rows, float *lanes, struct kind kind) {
    const __mmask16 mask = (__mmask16)((1 << rows) - 1);
    for (int64_t token = 0; token < tile->tokens; token += TILE_TOKENS) {
        const int64_t left = tile->tokens - token, tokens = left < TILE_TOKENS ? left : TILE_TOKENS;
        memset(lanes, 0, (size_t)tokens * TILE_ROWS * 16 * sizeof *lanes);
        rows_by_many(tile, s, first, rows, token, tokens, lanes, kind);
        for (int64_t t = 0; t < tokens; t++) {
            float *y = tile->y[s][token + t] + tile->first[s] + first;
            _mm512_mask_storeu_ps(y, mask, add_rows(lanes + 16 * TILE_ROWS * t));
        }
    }
}

/* For one token the commonest codes meet their digits as they are loaded, two streams at a time; the others are unpacked
 * row by row like blocks of tokens. */
INLINE void coded_tile(const struct tile *tile, struct kind kind) {
    _Alignas(64) float lanes[TILE_TOKENS * TILE_ROWS * 16];
    const int64_t step = tile->tokens == 1 && !masked(kind) ? 1 : TILE_ROWS;
    for (int64_t first = 0; first < tile->rows; first += step) {
        const int64_t left = tile->rows - first, rows = left < step ? left : step;
        if (tile->tokens == 1 && masked(kind)) {
            rows_by_one(tile, first, rows, lanes, kind);
            for (int s = 0; s < tile->streams; s++) {
                _mm512_mask_storeu_ps(tile->y[s][0] + tile->first[s] + first, (__mmask16)((1 << rows) - 1),
                                      add_rows(lanes + 16 * TILE_ROWS * s));
            }
        } else {
            for (int s = 0; s < tile->streams; s++) stream_by_many(tile, s, first, rows, lanes, kind);
        }
    }
}

/* ---- plain weights */

/* The tree of kernels.h for the lanes of one row. */
INLINE float add_lanes(__m512 v) {
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4e));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    return _mm512_cvtss_f32(_mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e)));
}

/* One row of each stream times `tokens` operands. */
INLINE void plain_rows(const struct tile *tile, int64_t row, int64_t token, int streams, int tokens, int value) {
    const int64_t columns = tile->weights[0]->shape.columns;
    const int size = value == SE_F32 ? 4 : value == VALUE_FP8 ? 1 : 2;
    __m512 sum[MAX_STREAMS][4][2];
    const uint8_t *w[MAX_STREAMS];
    const float *x[4];
    UNROLL
    for (int s = 0; s < streams; s++) {
        w[s] = tile->weights[s]->weight + (tile->first[s] + row) * tile->weights[s]->weight_stride;
        UNROLL
        for (int t = 0; t < tokens; t++) sum[s][t][0] = sum[s][t][1] = _mm512_setzero_ps();
    }
    UNROLL
    for (int t = 0; t < tokens; t++) x[t] = (const float *)(const void *)tile->operands[token + t];
    for (int64_t k = 0; k < columns; k += PLAIN_LANES) {
        UNROLL
        for (int s = 0; s < streams; s++) {
            __m512 scale = _mm512_setzero_ps();
            if (value == VALUE_FP8) {
                const struct weights *fp8 = tile->weights[s];
                const uint8_t *scales = fp8->scales + (tile->first[s] + row) * fp8->scales_stride;
                scale = _mm512_set1_ps(256.0f * dtype_float(fp8->dtype, scales, k / fp8->per_scale));
            }
            _mm_prefetch(w[s] + k * size + AHEAD_BYTES, _MM_HINT_T1);
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int64_t at = k + 16 * half;
                __m512 v = load_values(w[s] + at * size, present(columns - at), value);
                if (value == VALUE_FP8) v = _mm512_mul_ps(v, scale);
                UNROLL
                for (int t = 0; t < tokens; t++) {
                    sum[s][t][half] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x[t] + at), sum[s][t][half]);
                }
            }
        }
    }
    UNROLL
    for (int s = 0; s < streams; s++) {
        UNROLL
        for (int t = 0; t < tokens; t++) {
            tile->y[s][token + t][tile->first[s] + row] = add_lanes(_mm512_add_ps(sum[s][t][0], sum[s][t][1]));
        }
    }
}

INLINE void plain_tile(const struct tile *tile, int value) {
    for (int64_t row = 0; row < tile->rows; row++) {
        int64_t token = 0;
        if (tile->streams == 2) {
            for (; token + 4 <= tile->tokens; token += 4) plain_rows(tile, row, token, 2, 4, value);
            for (; token < tile->tokens; token++) plain_rows(tile, row, token, 2, 1, value);
        } else {
            for (; token + 4 <= tile->tokens; token += 4) plain_rows(tile, row, token, 1, 4, value);
            for (; token < tile->tokens; token++) plain_rows(tile, row, token, 1, 1, value);
        }
    }
}

/* ---- the table */

static void plain_bf16(const struct tile *tile) {
    plain_tile(tile, SE_BF16);
}

static void plain_f16(const struct tile *tile) {
    plain_tile(tile, SE_F16);
}

static void plain_f32(const struct tile *tile) {
    plain_tile(tile, SE_F32);
}

static void plain_fp8(const struct tile *tile) {
    plain_tile(tile, VALUE_FP8);
}

#define KERNEL(code, group_size, planes)                                                       \
    static void tile_##code##_##group_size##_##planes(const struct tile *tile) {               \
        coded_tile(tile, (struct kind){CODE_##code, group_size, planes});                      \
    }
#define KERNELS(code, group_size) KERNEL(code, group_size, 1) KERNEL(code, group_size, 3)
KERNELS(2, 32) KERNELS(2, 64) KERNELS(2, 128)
KERNELS(3, 32) KERNELS(3, 64) KERNELS(3, 128)
KERNELS(4, 32) KERNELS(4, 64) KERNELS(4, 128)
KERNELS(5, 32) KERNELS(5, 64) KERNELS(5, 128)
KERNELS(6, 16) KERNELS(6, 32) KERNELS(6, 64) KERNELS(6, 128)
KERNELS(8, 32) KERNELS(8, 64) KERNELS(8, 128)
KERNELS(FP4, 16) KERNELS(FP4, 32)
#define BY_PRECISION(code, group_size) {tile_##code##_##group_size##_3, tile_##code##_##group_size##_1}
#define FROM_32(code) BY_PRECISION(code, 32), BY_PRECISION(code, 64), BY_PRECISION(code, 128)

#define KERNELS_AVX512(level)                                                                                    \
    {                                                                                                            \
        .name = level, .prepare = prepare, .activate = activate, .add_scaled = add_scaled, .read = read_bytes,   \
        .order_8 = ORDER_PLAIN,                                                                                  \
        .coded[CODE_2] = {{0}, FROM_32(2)}, .coded[CODE_3] = {{0}, FROM_32(3)},                                  \
        .coded[CODE_4] = {{0}, FROM_32(4)}, .coded[CODE_5] = {{0}, FROM_32(5)},                                  \
        .coded[CODE_6] = {BY_PRECISION(6, 16), FROM_32(6)}, .coded[CODE_8] = {{0}, FROM_32(8)},                  \
        .coded[CODE_FP4] = {BY_PRECISION(FP4, 16), BY_PRECISION(FP4, 32)},                                       \
        .plain = {plain_bf16, plain_f16, plain_f32, plain_fp8},                                                  \
    }
