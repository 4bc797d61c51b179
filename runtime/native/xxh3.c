/* XXH3-64 with seed 0 for inputs of more than 240 bytes, after the specification of xxHash 0.8 (Collet). */
#include "reader.h"

#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { STRIPE = 64, LANES = 8, SECRET_BYTES = 192, STRIPES_PER_BLOCK = (SECRET_BYTES - STRIPE) / 8 };
enum { BLOCK = STRIPE * STRIPES_PER_BLOCK };

static const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static const uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
static const uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5;

static inline uint64_t read64(const uint8_t *bytes) { /* little-endian machines only, as all of the container */
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* One stripe into the lanes: each lane takes its neighbour's value and its own value's product of halves. */
#if defined(__SSE2__) /* every x86-64; half as fast again as what gcc makes of the loop */
static inline void accumulate(uint64_t lanes[LANES], const uint8_t *stripe, const uint8_t *secret) {
    for (int i = 0; i < LANES; i += 2) {
        __m128i *pair = (__m128i *)(void *)(lanes + i);
        __m128i value = _mm_loadu_si128((const __m128i *)(const void *)(stripe + 8 * i));
        __m128i key = _mm_xor_si128(value, _mm_loadu_si128((const __m128i *)(const void *)(secret + 8 * i)));
        __m128i product = _mm_mul_epu32(key, _mm_srli_epi64(key, 32));
        __m128i swapped = _mm_shuffle_epi32(value, 0x4e);
        _mm_storeu_si128(pair, _mm_add_epi64(_mm_loadu_si128(pair), _mm_add_epi64(swapped, product)));
    }
}
#else
static inline void accumulate(uint64_t lanes[LANES], const uint8_t *stripe, const uint8_t *secret) {
    uint64_t value[LANES];
    memcpy(value, stripe, sizeof value);
    for (int i = 0; i < LANES; i++) {
        uint64_t key = value[i] ^ read64(secret + 8 * i);
        lanes[i] += value[i ^ 1] + (key & 0xffffffff) * (key >> 32);
    }
}
#endif

static uint64_t folded(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t se_xxh3(const uint8_t *bytes, int64_t n) {
    if (n <= 240) return 0;
    uint64_t lanes[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const int64_t blocks = (n - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; b++) {
        for (int s = 0; s < STRIPES_PER_BLOCK; s++) accumulate(lanes, bytes + b * BLOCK + s * STRIPE, SECRET + 8 * s);
        for (int i = 0; i < LANES; i++) { /* scramble */
            lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ read64(SECRET + SECRET_BYTES - STRIPE + 8 * i)) * P32_1;
        }
    }
    const int64_t stripes = (n - 1 - blocks * BLOCK) / STRIPE;
    for (int64_t s = 0; s < stripes; s++) accumulate(lanes, bytes + blocks * BLOCK + s * STRIPE, SECRET + 8 * s);
    accumulate(lanes, bytes + n - STRIPE, SECRET + SECRET_BYTES - STRIPE - 7);
    uint64_t hash = (uint64_t)n * P64_1;
    for (int i = 0; i < LANES; i += 2) {
        hash += folded(lanes[i] ^ read64(SECRET + 11 + 8 * i), lanes[i + 1] ^ read64(SECRET + 19 + 8 * i));
    }
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
    return hash ^ hash >> 32;
}
