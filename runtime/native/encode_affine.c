/* The affine encoder of `repack convert`: which compiled loops run, and the plain ones. */
#include "cpu.h"
#include "encode_affine.h"

ENCODE_AFFINE(encode_affine_portable)

struct level {
    const char *name;
    encode_affine_fn *encode;
};

/* The levels that this machine can run, best first, from one of the table on. NEON is in every aarch64: portable. */
static const struct level *available(void) {
    static const struct level levels[] = {
#if defined(__x86_64__)
        {"avx512", encode_affine_avx512},
        {"avx2", encode_affine_avx2},
#endif
        {"portable", encode_affine_portable},
        {NULL, NULL},
    };
#if defined(__x86_64__)
    return levels + (cpu_has_avx512() ? 0 : cpu_has_avx2() ? 1 : 2);
#else
    return levels;
#endif
}

const char *se_encode_level(int32_t number) {
    const struct level *level = available();
    for (; number > 0 && level->name != NULL; number--) level++;
    return level->name;
}

int32_t se_encode_affine(const char *level, int32_t bits, int64_t group_size, int32_t dtype, int32_t scale_dtype,
                         const uint8_t *values, int64_t groups, uint8_t *codes, uint8_t *scales, uint8_t *biases) {
    const struct level *found = available();
    while (level != NULL && found->name != NULL && strcmp(level, found->name) != 0) found++;
    if (found->name == NULL || dtype < SE_BF16 || dtype > SE_F32 || scale_dtype < SE_BF16 || scale_dtype > SE_F32) {
        return SE_UNSUPPORTED;
    }
    return found->encode(bits, group_size, dtype, scale_dtype, values, groups, codes, scales, biases);
}
