/* The plain loops, vectorised by the compiler for AVX2 (flags: build_hook.py); kernels of its own are not written yet. */
#define TABLE kernels_avx2
#define NAME "avx2"
#include "kernels_portable.c"
