/* AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): a code of any width is unpacked by two shuffles. */
#define SE_VNNI
#define SE_VBMI
#include "kernels_avx512.h"

const struct kernels kernels_avx512vbmi = KERNELS_AVX512("avx512vbmi", false);
