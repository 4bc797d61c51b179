/* AVX-512 with VNNI: four products and their sum are one instruction. */
#define SE_VNNI
#include "kernels_avx512.h"

const struct kernels kernels_avx512vnni = KERNELS_AVX512("avx512vnni", true);
