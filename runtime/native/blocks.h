/* What blocks of ggml are taken apart with: eight codes at a time, one to a byte of a word. Included by transcode.c. */
#ifndef SE_BLOCKS_H
#define SE_BLOCKS_H

#include "kernels.h"

#include <stdbool.h>

static const uint64_t LOW_HALVES = 0x0f0f0f0f0f0f0f0f, EACH_BYTE = 0x0101010101010101;

static inline uint64_t load64(const uint8_t *from) {
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

static inline uint16_t load16(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return half;
}

static inline void store64(uint8_t *to, uint64_t word) {
    memcpy(to, &word, sizeof word);
}

static inline bool is_finite_f16(const uint8_t *half) {
    return (load16(half) & 0x7c00) != 0x7c00;
}

/* Eight codes, one to a byte, side by side in the low bits. */
static inline uint64_t squeezed4(uint64_t x) {
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (x | x >> 16) & 0x00000000ffffffff;
}

static inline uint64_t squeezed2(uint64_t x) {
    x = (x | x >> 6) & 0x000f000f000f000f;
    x = (x | x >> 12) & 0x000000ff000000ff;
    return (x | x >> 24) & 0x000000000000ffff;
}

static inline uint64_t squeezed3(uint64_t x) {
    x = (x | x >> 5) & 0x003f003f003f003f;
    x = (x | x >> 10) & 0x00000fff00000fff;
    return (x | x >> 20) & 0x0000000000ffffff;
}

static inline uint64_t squeezed5(uint64_t x) {
    x = (x & 0x001f001f001f001f) | (x & 0x1f001f001f001f00) >> 3;
    x = (x & 0x000003ff000003ff) | (x & 0x03ff000003ff0000) >> 6;
    return (x & 0x00000000000fffff) | (x & 0x000fffff00000000) >> 12;
}

static inline uint64_t squeezed6(uint64_t x) {
    x = (x & 0x003f003f003f003f) | (x & 0x3f003f003f003f00) >> 2;
    x = (x & 0x00000fff00000fff) | (x & 0x0fff00000fff0000) >> 4;
    return (x & 0x0000000000ffffff) | (x & 0x00ffffff00000000) >> 8;
}

/* 32 codes as four words of eight -> their stream of bits; returns its end. */
static inline uint8_t *store2(uint8_t *to, const uint64_t codes[4]) {
    store64(to, squeezed2(codes[0]) | squeezed2(codes[1]) << 16 | squeezed2(codes[2]) << 32 | squeezed2(codes[3]) << 48);
    return to + 8;
}

static inline uint8_t *store3(uint8_t *to, const uint64_t codes[4]) {
    const uint64_t c = squeezed3(codes[2]), d = squeezed3(codes[3]);
    const uint32_t last = (uint32_t)(c >> 16 | d << 8);
    store64(to, squeezed3(codes[0]) | squeezed3(codes[1]) << 24 | c << 48);
    memcpy(to + 8, &last, sizeof last);
    return to + 12;
}

static inline uint8_t *store4(uint8_t *to, const uint64_t codes[4]) {
    store64(to, squeezed4(codes[0]) | squeezed4(codes[1]) << 32);
    store64(to + 8, squeezed4(codes[2]) | squeezed4(codes[3]) << 32);
    return to + 16;
}

static inline uint8_t *store5(uint8_t *to, const uint64_t codes[4]) {
    const uint64_t a = squeezed5(codes[0]), b = squeezed5(codes[1]), c = squeezed5(codes[2]), d = squeezed5(codes[3]);
    const uint32_t last = (uint32_t)(d >> 8);
    store64(to, a | b << 40);
    store64(to + 8, b >> 24 | c << 16 | d << 56);
    memcpy(to + 16, &last, sizeof last);
    return to + 20;
}

static inline uint8_t *store6(uint8_t *to, const uint64_t codes[4]) {
    const uint64_t a = squeezed6(codes[0]), b = squeezed6(codes[1]), c = squeezed6(codes[2]), d = squeezed6(codes[3]);
    store64(to, a | b << 48);
    store64(to + 8, b >> 16 | c << 32);
    store64(to + 16, c >> 32 | d << 16);
    return to + 24;
}

/* n bytes whose lower halves are n codes and whose upper ones the next n -> the same codes in order; n is 16 or 32. */
static inline uint8_t *store_halves(uint8_t *to, const uint8_t *qs, int n) {
    for (int shift = 0; shift < 8; shift += 4) {
        for (int i = 0; i < n; i += 16, to += 8) {
            const uint64_t low = squeezed4(load64(qs + i) >> shift & LOW_HALVES);
            const uint64_t high = squeezed4(load64(qs + i + 8) >> shift & LOW_HALVES);
            store64(to, low | high << 32);
        }
    }
    return to;
}

/* Bits 0 to 7 of a byte, each as the lowest bit of a byte. */
static inline uint64_t spread_bits(uint64_t bits) {
    const uint64_t spread = (bits & 0xff) * EACH_BYTE & 0x8040201008040201; /* byte i has bit i alone */
    return (spread + 0x7f7f7f7f7f7f7f7f) >> 7 & EACH_BYTE;
}

/* The places of a block in every array. */
typedef struct {
    uint8_t *codes, *second, *third, *fourth; /* in the order of the encoding's arrays */
    const uint8_t *grid;                      /* of types that have one */
} places;

#endif
