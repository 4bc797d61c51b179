/* Sums of products, and of 16 vectors at once. */
#ifndef SE_SUMS_AVX512_H
#define SE_SUMS_AVX512_H

#include "kernels.h"
#include "straight.h"

#include <immintrin.h>

/* A vector that is loaded once, by an instruction of its own. */
INLINE __m512i in_register(__m512i v) {
#ifndef SE_EMULATED
    __asm__("" : "+v"(v));
#endif
    return v;
}

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

/* Sums of 16 groups, in their order, from the quads of their vectors, in which a group had 4, 8 or 16 lanes; from
 * halves_i if it had two, from the vector itself if it had one. */
INLINE __m512i order_groups(const __m512i *quads, int lanes) {
    if (lanes == 1) return quads[0];
    if (lanes == 2) {
        const __m512i order = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        return _mm512_permutexvar_epi32(order, quads[0]);
    }
    if (lanes == 4) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_epi32(order, quads[0]);
    }
    if (lanes == 8) {
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
    if (!is_wide(code)) return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, digits), ones));
    /* Two products of full bytes overflow 16 bits; those of the top bits and of the rest do not. */
    __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_and_si512(codes, top), digits), ones);
    __m512i low = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_andnot_si512(top, codes), digits), ones);
    return _mm512_add_epi32(sum, _mm512_add_epi32(high, low));
#endif
}

#endif
