/* Exact transcodes of published blocks: bits are moved, no value is rounded. The definition is the NumPy text of
 * formats/encodings/sources/ggml.py and gptq.py. Codes are handled eight at a time, one to a byte of a word. */
#include "blocks_iq.h"


/* ---- one function per type: a block to its place in every array; false where a scale is not finite */

static inline uint8_t *store_five_bits(uint8_t *to, const uint8_t *qh, const uint8_t *qs) {
    uint64_t codes[4];
    for (int i = 0; i < 4; i++) {
        codes[i] = (load64(qs + 8 * (i & 1)) >> (i < 2 ? 0 : 4) & LOW_HALVES) | spread_bits(qh[i]) << 4;
    }
    return store5(to, codes);
}

/* The 8 scales and 8 mins of 6 bits that K-quants spread over 12 bytes, one to a byte. */
static inline void six_bits(const uint8_t *packed, uint64_t *scales, uint64_t *mins) {
    uint32_t first, second, rest;
    memcpy(&first, packed, 4);
    memcpy(&second, packed + 4, 4);
    memcpy(&rest, packed + 8, 4);
    const uint64_t low = rest & 0x0f0f0f0f, high = rest >> 4 & 0x0f0f0f0f;
    *scales = (first & 0x3f3f3f3f) | (low | (first >> 2 & 0x30303030)) << 32;
    *mins = (second & 0x3f3f3f3f) | (high | (second >> 2 & 0x30303030)) << 32;
}

static inline bool put_q4_0(const uint8_t *block, places *to) {
    memcpy(to->second, block, 2);
    to->codes = store_halves(to->codes, block + 2, 16);
    to->second += 2;
    return is_finite_f16(block);
}

static inline bool put_q4_1(const uint8_t *block, places *to) {
    memcpy(to->second, block, 2);
    memcpy(to->third, block + 2, 2);
    to->codes = store_halves(to->codes, block + 4, 16);
    to->second += 2, to->third += 2;
    return is_finite_f16(block) && is_finite_f16(block + 2);
}

static inline bool put_q5_0(const uint8_t *block, places *to) {
    memcpy(to->second, block, 2);
    to->codes = store_five_bits(to->codes, block + 2, block + 6);
    to->second += 2;
    return is_finite_f16(block);
}

static inline bool put_q5_1(const uint8_t *block, places *to) {
    memcpy(to->second, block, 2);
    memcpy(to->third, block + 2, 2);
    to->codes = store_five_bits(to->codes, block + 4, block + 8);
    to->second += 2, to->third += 2;
    return is_finite_f16(block) && is_finite_f16(block + 2);
}

static inline bool put_q8_0(const uint8_t *block, places *to) {
    memcpy(to->second, block, 2);
    for (int i = 0; i < 32; i += 8, to->codes += 8) store64(to->codes, load64(block + 2 + i) ^ 128 * EACH_BYTE);
    to->second += 2;
    return is_finite_f16(block);
}

static inline bool put_mxfp4(const uint8_t *block, places *to) {
    *to->second++ = block[0];
    to->codes = store_halves(to->codes, block + 1, 16);
    return block[0] <= 0xfc; /* E8M0_MAX: twice a larger scale has no float32 */
}

static inline bool put_q2_k(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            codes[i] = load64(block + 16 + 32 * (group / 4) + 8 * i) >> 2 * (group % 4) & 3 * EACH_BYTE;
        }
        to->codes = store2(to->codes, codes);
    }
    memcpy(to->second, block, 16);
    memcpy(to->third, block + 80, 2);
    memcpy(to->fourth, block + 82, 2);
    to->second += 16, to->third += 2, to->fourth += 2;
    return is_finite_f16(block + 80) && is_finite_f16(block + 82);
}

/* Numbers of 6 bits, one to a byte, less 32 each. */
static inline uint64_t minus_32(uint64_t six) {
    const uint64_t x = six ^ 32 * EACH_BYTE, sign = x & 32 * EACH_BYTE;
    return x | sign << 1 | sign << 2;
}

static inline bool put_q3_k(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            const uint64_t low = load64(block + 32 + 32 * (group / 4) + 8 * i) >> 2 * (group % 4) & 3 * EACH_BYTE;
            codes[i] = low | (load64(block + 8 * i) >> group & EACH_BYTE) << 2;
        }
        to->codes = store3(to->codes, codes);
    }
    uint32_t high;
    memcpy(&high, block + 104, sizeof high);
    const uint64_t low = load64(block + 96), two = 0x03030303;
    const uint64_t first = (high & two) | (high >> 2 & two) << 32, second = (high >> 4 & two) | (high >> 6 & two) << 32;
    store64(to->second, minus_32((low & LOW_HALVES) | first << 4));
    store64(to->second + 8, minus_32((low >> 4 & LOW_HALVES) | second << 4));
    memcpy(to->third, block + 108, 2);
    to->second += 16, to->third += 2;
    return is_finite_f16(block + 108);
}

/* What Q4_K and Q5_K begin with: d, dmin, and the packed scales and mins. */
static inline bool put_scales(const uint8_t *block, places *to) {
    uint64_t scales, mins;
    six_bits(block + 4, &scales, &mins);
    scales = squeezed6(scales), mins = squeezed6(mins);
    const uint32_t last = (uint32_t)(mins >> 16);
    store64(to->second, scales | mins << 48);
    memcpy(to->second + 8, &last, sizeof last);
    memcpy(to->third, block, 2);
    memcpy(to->fourth, block + 2, 2);
    to->second += 12, to->third += 2, to->fourth += 2;
    return is_finite_f16(block) && is_finite_f16(block + 2);
}

static inline bool put_q4_k(const uint8_t *block, places *to) {
    for (int i = 0; i < 128; i += 32) to->codes = store_halves(to->codes, block + 16 + i, 32);
    return put_scales(block, to);
}

static inline bool put_q5_k(const uint8_t *block, places *to) {
    const uint8_t *qh = block + 16, *qs = block + 48;
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            const uint64_t low = load64(qs + 32 * (group / 2) + 8 * i) >> (group % 2 ? 4 : 0) & LOW_HALVES;
            codes[i] = low | (load64(qh + 8 * i) >> group & EACH_BYTE) << 4;
        }
        to->codes = store5(to->codes, codes);
    }
    return put_scales(block, to);
}

static inline bool put_q6_k(const uint8_t *block, places *to) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *ql = block + 64 * half, *qh = block + 128 + 32 * half;
        for (int quarter = 0; quarter < 4; quarter++) {
            uint64_t codes[4];
            for (int i = 0; i < 4; i++) {
                const uint64_t low = load64(ql + 32 * (quarter % 2) + 8 * i) >> (quarter < 2 ? 0 : 4) & LOW_HALVES;
                codes[i] = low | (load64(qh + 8 * i) >> 2 * quarter & 3 * EACH_BYTE) << 4;
            }
            to->codes = store6(to->codes, codes);
        }
    }
    memcpy(to->second, block + 192, 16);
    memcpy(to->third, block + 208, 2);
    to->second += 16, to->third += 2;
    return is_finite_f16(block + 208);
}

static inline bool put_iq4_nl(const uint8_t *block, places *to) {
    return put_q4_0(block, to);
}

static inline bool put_iq4_xs(const uint8_t *block, places *to) {
    const uint32_t high = load16(block + 2);
    for (int group = 0; group < 8; group++) {
        const int scale = (block[4 + group / 2] >> 4 * (group % 2) & 15) | (high >> 2 * group & 3) << 4;
        *to->second++ = (uint8_t)(scale - 32);
        to->codes = store_halves(to->codes, block + 8 + 16 * group, 16);
    }
    memcpy(to->third, block, 2);
    to->third += 2;
    return is_finite_f16(block);
}

#define BLOCKS(put, nbytes)                                                                                            \
    for (int64_t i = 0; i < blocks; i++) finite &= put(from + i * (nbytes), &to);                                      \
    break

int32_t se_transcode_blocks(int32_t type, int64_t blocks, const uint8_t *from, const uint8_t *grid,
                            uint8_t *const arrays[4]) {
    places to = {arrays[0], arrays[1], arrays[2], arrays[3], grid};
    bool finite = true;
    switch (type) {
    case SE_BLOCKS_Q4_0: BLOCKS(put_q4_0, 18);
    case SE_BLOCKS_Q4_1: BLOCKS(put_q4_1, 20);
    case SE_BLOCKS_Q5_0: BLOCKS(put_q5_0, 22);
    case SE_BLOCKS_Q5_1: BLOCKS(put_q5_1, 24);
    case SE_BLOCKS_Q8_0: BLOCKS(put_q8_0, 34);
    case SE_BLOCKS_Q4_K: BLOCKS(put_q4_k, 144);
    case SE_BLOCKS_Q5_K: BLOCKS(put_q5_k, 176);
    case SE_BLOCKS_Q6_K: BLOCKS(put_q6_k, 210);
    case SE_BLOCKS_MXFP4: BLOCKS(put_mxfp4, 17);
    case SE_BLOCKS_Q2_K: BLOCKS(put_q2_k, 84);
    case SE_BLOCKS_Q3_K: BLOCKS(put_q3_k, 110);
    case SE_BLOCKS_IQ4_NL: BLOCKS(put_iq4_nl, 18);
    case SE_BLOCKS_IQ4_XS: BLOCKS(put_iq4_xs, 136);
    case SE_BLOCKS_IQ3_S: BLOCKS(put_iq3_s, 110);
    case SE_BLOCKS_IQ3_XXS: BLOCKS(put_iq3_xxs, 98);
    case SE_BLOCKS_IQ2_S: BLOCKS(put_iq2_s, 82);
    case SE_BLOCKS_IQ2_XS: BLOCKS(put_iq2_xs, 74);
    case SE_BLOCKS_IQ2_XXS: BLOCKS(put_iq2_xxs, 66);
    case SE_BLOCKS_IQ1_S: BLOCKS(put_iq1_s, 50);
    case SE_BLOCKS_IQ1_M: BLOCKS(put_iq1_m, 56);
    default: return SE_UNSUPPORTED;
    }
    return finite ? SE_OK : SE_NOT_FINITE;
}

/* ---- AWQ: nibble k of a word of eight rows is row ROW_OF[k] */

enum { TILE_WORDS = 32, TILE_COLUMNS = 128 }; /* whole lines of cache of source and result */

static const int ROW_OF[8] = {0, 2, 4, 6, 1, 3, 5, 7};

struct square {
    uint32_t columns[TILE_COLUMNS][TILE_WORDS];
    uint32_t rows[8 * TILE_WORDS][TILE_COLUMNS / 8];
};

/* The upper parts of `first` for the lower parts of `second`, where mask has the lower ones and shift is their width. */
static inline void swap(uint32_t *restrict first, uint32_t *restrict second, int shift, uint32_t mask) {
    for (int word = 0; word < TILE_WORDS; word++) {
        const uint32_t low = first[word], high = second[word];
        first[word] = (low & mask) | (high & mask) << shift;
        second[word] = (low >> shift & mask) | (high & ~mask);
    }
}

/* Of eight columns' words side by side: nibble j of column i becomes nibble i of column j. */
static inline void transpose(uint32_t x[8][TILE_WORDS]) {
    for (int i = 0; i < 8; i += 2) swap(x[i], x[i + 1], 4, 0x0f0f0f0f);
    for (int i = 0; i < 8; i += 4) {
        swap(x[i], x[i + 2], 8, 0x00ff00ff);
        swap(x[i + 1], x[i + 3], 8, 0x00ff00ff);
    }
    for (int i = 0; i < 4; i++) swap(x[i], x[i + 4], 16, 0x0000ffff);
}

static void turn(struct square *square, int64_t columns) {
    for (int64_t column = 0; column < columns; column += 8) {
        transpose(square->columns + column);
        for (int k = 0; k < 8; k++) {
            for (int word = 0; word < TILE_WORDS; word++) {
                square->rows[8 * word + ROW_OF[k]][column / 8] = square->columns[column + k][word];
            }
        }
    }
}

int32_t se_transcode_awq(const uint32_t *from, int64_t stride, int64_t words, int64_t columns, uint32_t *codes) {
    if (columns % 8 != 0) return SE_UNSUPPORTED;
    struct square square = {0};
    for (int64_t word = 0; word < words; word += TILE_WORDS) {
        const int64_t height = words - word < TILE_WORDS ? words - word : TILE_WORDS;
        for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
            const int64_t width = columns - column < TILE_COLUMNS ? columns - column : TILE_COLUMNS;
            for (int64_t i = 0; i < width; i++) {
                memcpy(square.columns[i], from + (column + i) * stride + word, (size_t)height * sizeof *from);
            }
            turn(&square, width);
            for (int64_t row = 0; row < 8 * height; row++) {
                memcpy(codes + (8 * word + row) * (columns / 8) + column / 8, square.rows[row],
                       (size_t)(width / 8) * sizeof *codes);
            }
        }
    }
    return SE_OK;
}
