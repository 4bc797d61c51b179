/* AVX-512 without VNNI: Skylake-SP and its kind. */
#include "kernels_avx512.h"

const struct kernels kernels_avx512 = KERNELS_AVX512("avx512", true);
