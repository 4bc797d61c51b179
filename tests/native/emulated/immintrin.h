/* AVX-512 in software, for machines without it: SIMDe (libsimde-dev) and the few instructions that it lacks. Kernels that
 * include <immintrin.h> find this file first when the test compiles them, without any -m flag and so on any processor. */
#ifndef SE_EMULATED_IMMINTRIN_H
#define SE_EMULATED_IMMINTRIN_H

#define SIMDE_NO_INLINE /* inlined, a kernel is megabytes long */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h" /* f16_float */

#define __mmask16 uint16_t
#define __mmask32 uint32_t
#define __mmask64 uint64_t
#undef _mm512_madd_epi16 /* SIMDe 0.7.4 gives it the arguments of its masked form */
#define _mm512_madd_epi16 simde_mm512_madd_epi16

#define EMULATED static __attribute__((noinline, unused))

#define COPY(from, type, n) \
    type from##_[n];        \
    memcpy(from##_, &from, sizeof from##_)

/* SIMDe rounds the product too. */
EMULATED simde__m512 emulated_fmadd_ps(simde__m512 a, simde__m512 b, simde__m512 c) {
    COPY(a, float, 16);
    COPY(b, float, 16);
    COPY(c, float, 16);
    for (int i = 0; i < 16; i++) c_[i] = fmaf(a_[i], b_[i], c_[i]);
    memcpy(&c, c_, sizeof c);
    return c;
}
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated_fmadd_ps

EMULATED simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
    COPY(a, int32_t, 16);
    float r_[16];
    simde__m512 r;
    for (int i = 0; i < 16; i++) r_[i] = (float)a_[i];
    memcpy(&r, r_, sizeof r);
    return r;
}
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps

#define EMULATED_WIDEN(name, vector, from, to)      \
    EMULATED simde__m512i name(vector a) {          \
        COPY(a, from, 16);                          \
        to r_[16];                                  \
        simde__m512i r;                             \
        for (int i = 0; i < 16; i++) r_[i] = a_[i]; \
        memcpy(&r, r_, sizeof r);                   \
        return r;                                   \
    }
EMULATED_WIDEN(emulated_cvtepu16_epi32, simde__m256i, uint16_t, uint32_t)
EMULATED_WIDEN(emulated_cvtepu8_epi32, simde__m128i, uint8_t, uint32_t)
EMULATED_WIDEN(emulated_cvtepi8_epi32, simde__m128i, int8_t, int32_t)
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32

EMULATED simde__m512 emulated_cvtph_ps(simde__m256i a) {
    COPY(a, uint16_t, 16);
    float r_[16];
    simde__m512 r;
    for (int i = 0; i < 16; i++) r_[i] = f16_float(a_[i]);
    memcpy(&r, r_, sizeof r);
    return r;
}
#define _mm512_cvtph_ps emulated_cvtph_ps

EMULATED simde__m128 emulated_cvtph_ps_128(simde__m128i a) {
    COPY(a, uint16_t, 8);
    float r_[4];
    simde__m128 r;
    for (int i = 0; i < 4; i++) r_[i] = f16_float(a_[i]);
    memcpy(&r, r_, sizeof r);
    return r;
}
#define _mm_cvtph_ps emulated_cvtph_ps_128

EMULATED simde__m512 emulated_shuffle_f32x4(simde__m512 a, simde__m512 b, int places) {
    COPY(a, float, 16);
    COPY(b, float, 16);
    float r_[16];
    simde__m512 r;
    for (int i = 0; i < 4; i++) memcpy(r_ + 4 * i, (i < 2 ? a_ : b_) + 4 * (places >> 2 * i & 3), 16);
    memcpy(&r, r_, sizeof r);
    return r;
}
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4

EMULATED float emulated_cvtss_f32(simde__m512 a) {
    COPY(a, float, 16);
    return a_[0];
}
#define _mm512_cvtss_f32 emulated_cvtss_f32

EMULATED void emulated_mask_storeu_ps(void *to, uint16_t mask, simde__m512 a) {
    COPY(a, float, 16);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) memcpy((uint8_t *)to + 4 * i, &a_[i], 4);
    }
}
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

/* Masked loads touch only what the mask names, as the instruction does. */
#define EMULATED_LOAD(name, vector, type, n)                                        \
    EMULATED vector name(uint64_t mask, const void *from) {                         \
        type r_[n] = {0};                                                           \
        vector r;                                                                   \
        for (size_t i = 0; i < n; i++) {                                            \
            if (mask >> i & 1) memcpy(&r_[i], (const type *)from + i, sizeof r_[i]); \
        }                                                                           \
        memcpy(&r, r_, sizeof r);                                                   \
        return r;                                                                   \
    }
EMULATED_LOAD(emulated_maskz_loadu_epi8, simde__m256i, uint8_t, 32)
EMULATED_LOAD(emulated_maskz_loadu_epi16, simde__m256i, uint16_t, 16)
EMULATED_LOAD(emulated_maskz_loadu_epi8_128, simde__m128i, uint8_t, 16)
EMULATED_LOAD(emulated_maskz_loadu_epi8_512, simde__m512i, uint8_t, 64)
EMULATED_LOAD(emulated_maskz_loadu_ps, simde__m512, float, 16)
#define _mm_maskz_loadu_epi8 emulated_maskz_loadu_epi8_128
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8_512
#define _mm256_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi16 emulated_maskz_loadu_epi16
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_maskz_load_ps emulated_maskz_loadu_ps

#endif
