/* ggml's types with a grid: an index chooses the magnitudes of 4 or 8 weights, which have signs of their own, or a shift.
 * What a grid holds, one byte to a weight, is formats/encodings/sources/grids.py's. Included by transcode.c. */
#ifndef SE_BLOCKS_IQ_H
#define SE_BLOCKS_IQ_H

#include "blocks.h"

static inline uint32_t load32(const uint8_t *from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* Seven signs and the eighth, which makes their number even, each as the lowest bit of a byte. */
static inline uint64_t even_signs(uint32_t seven) {
    uint32_t odd = seven ^ seven >> 4;
    odd = odd ^ odd >> 2;
    return spread_bits((seven & 127) | ((odd ^ odd >> 1) & 1) << 7);
}

static inline uint64_t eight_of(const places *to, uint32_t index) {
    return load64(to->grid + 8 * index);
}

static inline uint64_t two_fours_of(const places *to, uint32_t first, uint32_t second) {
    return load32(to->grid + 4 * first) | (uint64_t)load32(to->grid + 4 * second) << 32;
}

/* The scale that 4 bits stand for, of group `group`: an odd number. */
static inline uint8_t odd_scale(const uint8_t *nibbles, int group) {
    return (uint8_t)(2 * (nibbles[group / 2] >> 4 * (group % 2) & 15) + 1);
}

/* d, which all these types but one begin with. */
static inline bool put_d(const uint8_t *half, places *to) {
    memcpy(to->third, half, 2);
    to->third += 2;
    return is_finite_f16(half);
}

static inline bool put_iq2_xxs(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *indices = block + 2 + 8 * group;
        const uint32_t signs = load32(indices + 4);
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) codes[i] = eight_of(to, indices[i]) | even_signs(signs >> 7 * i & 127) << 2;
        to->codes = store3(to->codes, codes);
        *to->second++ = (uint8_t)(2 * (signs >> 28) + 1);
    }
    return put_d(block, to);
}

static inline bool put_iq2_xs(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            const uint32_t both = load16(block + 2 + 8 * group + 2 * i);
            codes[i] = eight_of(to, both & 511) | even_signs(both >> 9) << 2;
        }
        to->codes = store3(to->codes, codes);
    }
    for (int group = 0; group < 16; group++) *to->second++ = odd_scale(block + 66, group);
    return put_d(block, to);
}

static inline bool put_iq2_s(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            const uint32_t index = block[2 + 4 * group + i] | (block[66 + group] >> 2 * i & 3u) << 8;
            codes[i] = eight_of(to, index) | spread_bits(block[34 + 4 * group + i]) << 2;
        }
        to->codes = store3(to->codes, codes);
    }
    for (int group = 0; group < 16; group++) *to->second++ = odd_scale(block + 74, group);
    return put_d(block, to);
}

static inline bool put_iq3_xxs(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *indices = block + 2 + 8 * group;
        const uint32_t signs = load32(block + 66 + 4 * group);
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            codes[i] = two_fours_of(to, indices[2 * i], indices[2 * i + 1]) | even_signs(signs >> 7 * i & 127) << 3;
        }
        to->codes = store4(to->codes, codes);
        *to->second++ = (uint8_t)(2 * (signs >> 28) + 1);
    }
    return put_d(block, to);
}

static inline bool put_iq3_s(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        const uint8_t *indices = block + 2 + 8 * group, *signs = block + 74 + 4 * group;
        const uint32_t high = (uint32_t)block[66 + group] << 8;
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) { /* magnitude 2 m + 1 is code 8 + m, its negative 7 - m */
            const uint32_t first = indices[2 * i] | (high >> 2 * i & 256), second = indices[2 * i + 1] | (high >> (2 * i + 1) & 256);
            codes[i] = two_fours_of(to, first, second) ^ 8 * EACH_BYTE ^ 15 * spread_bits(signs[i]);
        }
        to->codes = store4(to->codes, codes);
        *to->second++ = odd_scale(block + 106, group);
    }
    return put_d(block, to);
}

/* A group that is shifted down is that of minus its weights, shifted up, times a negative scale. */
static inline bool put_iq1_s(const uint8_t *block, places *to) {
    for (int group = 0; group < 8; group++) {
        const uint32_t high = load16(block + 34 + 2 * group);
        const bool down = high >> 15;
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            codes[i] = eight_of(to, block[2 + 4 * group + i] | (high >> 3 * i & 7) << 8);
            if (down) codes[i] = 2 * EACH_BYTE - codes[i];
        }
        const int scale = 2 * (int)(high >> 12 & 7) + 1;
        to->codes = store2(to->codes, codes);
        *to->second++ = (uint8_t)(down ? -scale : scale);
    }
    return put_d(block, to);
}

static inline bool put_iq1_m(const uint8_t *block, places *to) {
    uint32_t d = 0;
    for (int group = 0; group < 8; group++) {
        uint64_t codes[4];
        for (int i = 0; i < 4; i++) {
            const uint32_t high = block[32 + 2 * group + i / 2] >> 4 * (i % 2);
            codes[i] = eight_of(to, block[4 * group + i] | (high & 7) << 8) | (high >> 3 & 1) * 4 * EACH_BYTE;
        }
        to->codes = store3(to->codes, codes);
    }
    for (int four = 0; four < 4; four++) { /* groups of 16, and 4 bits of d */
        const uint32_t scales = load16(block + 48 + 2 * four);
        d |= scales >> 12 << 4 * four;
        for (int i = 0; i < 4; i++) *to->second++ = (uint8_t)(2 * (scales >> 3 * i & 7) + 1);
    }
    const uint8_t half[2] = {(uint8_t)d, (uint8_t)(d >> 8)};
    return put_d(half, to);
}

#endif
