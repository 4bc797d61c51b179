/* Functions of one number, shared by all loops. Every operation is one IEEE operation and fmaf is written where it is
 * meant, so the bits are the same for every instruction set, and for a vector of them. */
#ifndef SE_SCALAR_H
#define SE_SCALAR_H

#include "kernels.h"

/* exp(x) for x <= 0 within 2 ulp: 2^n * e^r with |r| <= ln(2)/2; below -87.3 it is 0 where float32 has subnormals. */
static inline float exp_nonpositive(float x) {
    float clamped = x < -87.33654f ? -87.33654f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = fmaf(n, -0.693359375f, clamped); /* ln(2) in two parts: the first exact times n */
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f; /* Cephes expf */
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    float y = p * bits_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.33654f ? 0.0f : y;
}

/* 1 / (1 + exp(-x)) by the two branches of NumpyOps.sigmoid. */
static inline float sigmoid(float x) {
    float y = exp_nonpositive(-fabsf(x));
    return (x >= 0 ? 1.0f : y) / (1.0f + y);
}

/* tanh(x): its series where exponentials would cancel, else by exp. */
static inline float tangent(float x) {
    float a = fabsf(x), s = x * x;
    float p = 2.1869488e-2f; /* 62 / 2835 */
    p = fmaf(p, s, -5.3968254e-2f);
    p = fmaf(p, s, 1.3333334e-1f);
    p = fmaf(p, s, -3.3333334e-1f);
    float small = fmaf(p * s, x, x);
    float y = exp_nonpositive(-2.0f * a);
    float large = (1.0f - y) / (1.0f + y);
    return a < 0.25f ? small : x < 0 ? -large : large;
}

static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

#endif
