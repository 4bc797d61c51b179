/* Which instruction sets this machine has, asked at load. */
#ifndef SE_CPU_H
#define SE_CPU_H

#include <stdbool.h>

#if defined(__x86_64__)
#include <cpuid.h>

/* gcc 12 does not know the name; AVX, which f16c needs of the operating system, is implied by avx2. */
static inline bool cpu_has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

static inline bool cpu_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}

static inline bool cpu_has_avx512(void) {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static inline bool cpu_has_avx512vnni(void) {
    return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
}

/* A level of its own: Cascade Lake and Cooper Lake have VNNI without it. */
static inline bool cpu_has_avx512vbmi(void) {
    return cpu_has_avx512vnni() && __builtin_cpu_supports("avx512vbmi");
}
#endif

#endif
