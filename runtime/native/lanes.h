/* Sixteen float32 side by side, whatever an instruction set calls them. Every operation is one IEEE operation per lane,
 * so loops written with lanes give the same bits everywhere. */
#ifndef SE_LANES_H
#define SE_LANES_H

#include "scalar.h"

enum { LANES = 16 };

#if defined(__AVX512F__)
#include <immintrin.h>
typedef struct { __m512 v[1]; } lanes;
enum { WIDTH = 16 };
#define EACH(op) _mm512_##op
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
typedef struct { __m256 v[2]; } lanes;
enum { WIDTH = 8 };
#define EACH(op) _mm256_##op
#elif defined(__ARM_NEON)
#include <arm_neon.h>
typedef struct { float32x4_t v[4]; } lanes;
enum { WIDTH = 4 };
#else
typedef struct { float v[16]; } lanes;
enum { WIDTH = 1 };
#endif

/* One line per operation: on x86, on NEON, and plain. */
#if defined(EACH)
#define LOAD(p) EACH(loadu_ps)(p)
#define STORE(p, a) EACH(storeu_ps)(p, a)
#define ALL(x) EACH(set1_ps)(x)
#define ADD(a, b) EACH(add_ps)(a, b)
#define MULTIPLY(a, b) EACH(mul_ps)(a, b)
#define FMA(a, b, c) EACH(fmadd_ps)(a, b, c)
#elif defined(__ARM_NEON)
#define LOAD(p) vld1q_f32(p)
#define STORE(p, a) vst1q_f32(p, a)
#define ALL(x) vdupq_n_f32(x)
#define ADD(a, b) vaddq_f32(a, b)
#define MULTIPLY(a, b) vmulq_f32(a, b)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#else
#define LOAD(p) (*(p))
#define STORE(p, a) (*(p) = (a))
#define ALL(x) (x)
#define ADD(a, b) ((a) + (b))
#define MULTIPLY(a, b) ((a) * (b))
#define FMA(a, b, c) fmaf(a, b, c)
#endif

#define EVERY_PART for (int i = 0; i < LANES / WIDTH; i++)

static inline lanes lanes_load(const float *p) {
    lanes r;
    EVERY_PART r.v[i] = LOAD(p + WIDTH * i);
    return r;
}

static inline void lanes_store(float *p, lanes a) {
    EVERY_PART STORE(p + WIDTH * i, a.v[i]);
}

static inline lanes lanes_all(float x) {
    lanes r;
    EVERY_PART r.v[i] = ALL(x);
    return r;
}

static inline lanes lanes_add(lanes a, lanes b) {
    EVERY_PART a.v[i] = ADD(a.v[i], b.v[i]);
    return a;
}

static inline lanes lanes_multiply(lanes a, lanes b) {
    EVERY_PART a.v[i] = MULTIPLY(a.v[i], b.v[i]);
    return a;
}

/* a * b + c, rounded once. */
static inline lanes lanes_fma(lanes a, lanes b, lanes c) {
    EVERY_PART c.v[i] = FMA(a.v[i], b.v[i], c.v[i]);
    return c;
}

/* The sum of all lanes as the tree that kernels.h describes. */
static inline float lanes_sum(const float *lane) {
    float q[4];
    for (int i = 0; i < 4; i++) {
        const float *l = lane + 4 * i;
        q[i] = (l[0] + l[2]) + (l[1] + l[3]);
    }
    return (q[0] + q[1]) + (q[2] + q[3]);
}

#endif
