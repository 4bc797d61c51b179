/* Packed codes of a row, and as vectors of bytes, for AVX-512. */
#ifndef SE_CODES_AVX512_H
#define SE_CODES_AVX512_H

#include "groups_avx512.h"
#include "sums_avx512.h"

enum { OVERREAD = 48 }; /* bytes behind its codes that the last vector of a block may read */

/* Runs of a group (kernels.h) for codes of 2 and 3 bits, and of 5 and 6 in exact: a shuffle of two loads has a run of
 * other groups to give as easily as the columns that follow. Six bits in fast are slower with runs (docs/LEARNED.md 77). */
enum { RUNS_2 = 2 };
#if defined(SE_VBMI)
enum { RUNS_3 = 4, RUNS_6 = 2 };
#else
enum { RUNS_3 = 2, RUNS_6 = 1 };
#endif
#define RUNS                                                                                                  \
    {{RUNS_2, RUNS_2, RUNS_2}, {RUNS_3, RUNS_3, RUNS_3}, {1, 1, 1}, {1, 1, RUNS_6}, {1, 1, RUNS_6}, {1, 1, 1}, \
     {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {RUNS_3, RUNS_3, RUNS_3}, {RUNS_3, RUNS_3, RUNS_3}}

/* Vectors of codes that lie over one another in the packed bytes: the columns of ORDER_PAIRS, or of ORDER_FOURS. Without
 * VBMI two codes of 3 bits are unpacked as one of 6. */
#if defined(SE_VBMI)
#define ORDERS ORDERS_OF(ORDER_PLAIN, ORDER_PLAIN, ORDER_PAIRS)
#else
#define ORDERS ORDERS_OF(ORDER_PAIRS, ORDER_PLAIN, ORDER_PAIRS)
#endif
INLINE int parts_of(struct kind kind) {
    static const enum order by_code[NUM_CODES] = ORDERS;
    return order_parts(by_code[kind.code]);
}

/* Vectors, of each part, that meet in the same lanes: those of a run each, or of one long group. */
INLINE int runs_of(struct kind kind) {
    static const int by_code[NUM_CODES][SE_EXACT] = RUNS;
    const int most = most_runs(kind.group_size, parts_of(kind));
    const int wanted = by_code[kind.code][kind.planes - 1], runs = wanted < most ? wanted : most;
    const int whole = kind.group_size / parts_of(kind) / 64;
    return runs < whole ? whole : runs;
}

/* What codes in the low bits of bytes stand for, whatever lies above them. */
INLINE __m512i integers(__m512i bytes, int code) {
    const __m512i low = _mm512_set1_epi8((char)((1 << code_width(code)) - 1));
    if (code < CODE_FP4) return _mm512_and_si512(bytes, low);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)CODE_INTEGERS[code - CODE_FP4]));
#if defined(SE_VBMI)
    return _mm512_permutexvar_epi8(bytes, table); /* which is there four times */
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
#endif
}

/* Vector v of codes of 3, 5 or 6 bits, in the order of the shape. */
#if defined(SE_VBMI)
/* Eight codes, which fill whole bytes, go to each 64-bit lane, and each of its bytes takes the bits of one. */
INLINE __m512i unpack_stream(const uint8_t *packed, int v, struct kind kind) {
    const int width = code_width(kind.code), runs = runs_of(kind), run = kind.group_size / runs, r = v % runs;
    const int bytes = 8 * width * runs; /* of `runs` vectors; the last 64 of them are a load of their own */
#define COLUMN(i) (8 * (i) / run * kind.group_size + r * run + 8 * (i) % run)
#define BYTE(i) (COLUMN(i) * width / 8 + (COLUMN(i) * width / 8 + width > 64 ? 128 - bytes : 0))
#define LANE(i) (int64_t)(0x0706050403020100u + 0x0101010101010101u * BYTE(i)) /* bytes behind the last one may wrap */
    const __m512i places = _mm512_setr_epi64(LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7));
#undef LANE
#undef BYTE
#undef COLUMN
    const __m512i bits = _mm512_set1_epi64(0x0706050403020100 * width), low = _mm512_loadu_si512(packed + v / runs * bytes);
    const __m512i high = _mm512_loadu_si512(packed + v / runs * bytes + (bytes > 64 ? bytes - 64 : 0));
    const __m512i x = bytes > 64 ? _mm512_permutex2var_epi8(low, places, high) : _mm512_permutexvar_epi8(places, low);
    return integers(_mm512_multishift_epi64_epi8(bits, x), kind.code);
}
#else
/* In 16-bit lanes two codes each, as pairs are shifted to the end and parted. */
INLINE __m512i part_pairs(__m512i x, __m512i shifts, int width) {
    x = _mm512_srlv_epi16(x, shifts);
    return _mm512_ternarylogic_epi32(x, _mm512_slli_epi16(x, 8 - width), _mm512_set1_epi16(0xff), 0xe4); /* its low bytes */
}

#define EIGHT(of) _mm512_setr_epi64(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7))
/* Codes of 3 bits, which stay in pairs: a pair is a code here. Of 32 codes in 12 bytes, the outer eights of codes lie in the
 * first and the last word, the inner ones in words that begin two bytes later, and each eight goes to the lane of its group. */
INLINE __m512i unpack_pairs(const uint8_t *packed, int v) {
    const int inner = v % 2, from = v / 2 * 96 + 2 * inner, second = inner ? 28 : 32; /* nothing behind the 96 is read */
#define EIGHT_OF(l) (2 * (l) + ((l) + inner) % 2)                    /* of the lane */
#define BYTE(l) (3 * EIGHT_OF(l) - 2 * inner)                        /* that it begins with */
#define WORD(l) (int64_t)(BYTE(l) / 4 < 16 ? BYTE(l) / 4 : 16 + BYTE(l) / 4 - second / 4)
#define WORDS(i) (WORD(2 * (i)) | WORD(2 * (i) + 1) << 32)
#define BYTES(l) (int64_t)((l) % 4 * 0x04040404 + BYTE(l) % 4 * 0x01010101 + 0x02010100)
#define PAIRS(i) (BYTES(2 * (i)) | BYTES(2 * (i) + 1) << 32)
    const __m512i words = EIGHT(WORDS), bytes = EIGHT(PAIRS), shifts = _mm512_set1_epi32(0x00040000);
#undef PAIRS
#undef BYTES
#undef WORDS
#undef WORD
#undef BYTE
#undef EIGHT_OF
    const __m512i low = _mm512_loadu_si512(packed + from), high = _mm512_loadu_si512(packed + from + second);
    return part_pairs(_mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, words, high), bytes), shifts, 6);
}

/* Eight codes, which fill whole bytes, go to each 64-bit lane by the two words that they lie in, and two of them to each of
 * its 16-bit lanes. */
INLINE __m512i unpack_stream(const uint8_t *packed, int v, struct kind kind) {
    const int width = code_width(kind.code);
    if (width == 3) return unpack_pairs(packed, v);
#define WORD(i) (int64_t)(width * (i) / 4)
#define WORDS(i) (WORD(i) | (WORD(i) + 1) << 32)
#define BYTE(i, j) (int64_t)(8 * ((i) % 2) + width * (i) % 4 + 2 * width * (j) / 8)
#define PAIR(i, j) (BYTE(i, j) | (BYTE(i, j) + 1) << 8) << 16 * (j)
#define PAIRS(i) PAIR(i, 0) | PAIR(i, 1) | PAIR(i, 2) | PAIR(i, 3)
    const __m512i words = EIGHT(WORDS), bytes = EIGHT(PAIRS);
#undef PAIRS
#undef PAIR
#undef BYTE
#undef WORDS
#undef WORD
    const __m512i shifts = _mm512_set1_epi64(width == 5 ? 0x0006000400020000 : 0x0004000000040000);
    __m512i x = _mm512_permutexvar_epi32(words, _mm512_loadu_si512(packed + 8 * width * v));
    return integers(part_pairs(_mm512_shuffle_epi8(x, bytes), shifts, width), kind.code);
}
#undef EIGHT
#endif

/* Words of a run, of one part. */
INLINE int run_words(struct kind kind) {
    return kind.group_size / parts_of(kind) / 4 / runs_of(kind);
}

/* Whether codes are read as they lie: in whole bytes, and no run of a group is to be brought to other ones. */
INLINE bool in_order(struct kind kind) {
    return 8 % code_width(kind.code) == 0 && (runs_of(kind) == 1 || run_words(kind) >= 16);
}

/* Vector v of codes of 2 bits in two runs: the words of one run of each group. */
INLINE __m512i load_run(const uint8_t *packed, int v, struct kind kind) {
    const int run = run_words(kind);
#define WORD(l) (((l) / run * 2 + v % 2) * run + (l) % run)
    const __m512i words = _mm512_setr_epi32(WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5), WORD(6), WORD(7), WORD(8),
                                            WORD(9), WORD(10), WORD(11), WORD(12), WORD(13), WORD(14), WORD(15));
#undef WORD
    const uint8_t *both = packed + 128 * (v / 2);
    return _mm512_permutex2var_epi32(_mm512_loadu_si512(both), words, _mm512_loadu_si512(both + 64));
}

/* Of 64 bytes the codes of one part: the first ones of all, the second ones, and so on. */
INLINE __m512i part_of(__m512i packed, int part, struct kind kind) {
    return integers(part == 0 ? packed : _mm512_srli_epi16(packed, code_width(kind.code) * part), kind.code);
}

/* The codes of 64 bytes: their first ones, then their second ones, and so on. */
INLINE void take_apart(__m512i *codes, __m512i packed, struct kind kind) {
    UNROLL
    for (int part = 0; part < parts_of(kind); part++) codes[part] = part_of(packed, part, kind);
}

/* Vector v of packed codes with each part in bytes, whatever lies above it. */
INLINE __m512i packed_bytes(const uint8_t *packed, int v, struct kind kind) {
    if (in_order(kind)) return _mm512_loadu_si512(packed + 64 * v);
    return kind.code == CODE_2 ? load_run(packed, v, kind) : unpack_stream(packed, v, kind);
}

/* Vector v of packed codes as bytes, in the order of the shape: codes [parts]. */
INLINE void unpack(__m512i *codes, const uint8_t *packed, int v, struct kind kind) {
    codes[0] = packed_bytes(packed, v, kind);
    if (parts_of(kind) > 1) take_apart(codes, in_register(codes[0]), kind);
}

/* ---- blocks of rows */

enum { MAX_BLOCK_BYTES = BLOCK_GROUPS * MAX_GROUP };

INLINE int block_bytes(struct kind kind) {
    return BLOCK_GROUPS * kind.group_size * code_width(kind.code) / 8;
}

/* Bytes behind the codes of a block that may be read with them. */
INLINE int overread(struct kind kind) {
    return 8 % code_width(kind.code) == 0 ? 0 : OVERREAD;
}

/* How many rows may be read where they are, whole blocks each. Behind the end of a row are the codes of the next one, which
 * meet digits of zero; the last rows would be read beyond the matrix. */
INLINE int64_t rows_in_place(const struct weights *w, struct kind kind) {
    const int64_t reach = shape_blocks(&w->shape) * block_bytes(kind) + overread(kind), all = w->rows * w->weight_stride;
    return all < reach ? 0 : (all - reach) / w->weight_stride + 1;
}

/* The packed codes of a block of any row: at the end of the matrix they are a copy. */
INLINE const uint8_t *block_codes(const struct weights *w, int64_t row, int64_t block, uint8_t *copy, struct kind kind) {
    const int64_t bytes = block_bytes(kind);
    const int64_t first = row * w->weight_stride + block * bytes, left = w->rows * w->weight_stride - first;
    if (left >= bytes + overread(kind)) return opaque(w->weight + first);
    memset(copy, 0, (size_t)(bytes + OVERREAD));
    memcpy(copy, w->weight + first, (size_t)(left < bytes ? left : bytes));
    return opaque(copy);
}

#endif
