#include "context.h"
#include "cpu.h"

#include <stdlib.h>
#include <time.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* The levels that this machine can run, best first; returns how many. */
static int available(const struct kernels **levels) {
    int count = 0;
#if defined(SE_EMULATED) /* tests/native/test_emulated.py: AVX-512 in software */
    levels[count++] = &kernels_avx512vbmi;
    levels[count++] = &kernels_avx512vnni;
    levels[count++] = &kernels_avx512;
#elif defined(__x86_64__)
    if (cpu_has_avx512vbmi()) levels[count++] = &kernels_avx512vbmi;
    if (cpu_has_avx512vnni()) levels[count++] = &kernels_avx512vnni;
    if (cpu_has_avx512()) levels[count++] = &kernels_avx512;
    if (cpu_has_avx2()) levels[count++] = __builtin_cpu_is("intel") ? &kernels_avx2_near : &kernels_avx2;
#elif defined(__aarch64__) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & (1 << 20)) != 0) levels[count++] = &kernels_neon; /* HWCAP_ASIMDDP */
#elif defined(__aarch64__) && defined(__APPLE__)
    levels[count++] = &kernels_neon; /* every Apple Silicon has the dot product */
#endif
    levels[count++] = &kernels_portable;
    return count;
}

static const struct loops *loops_of(const struct kernels *kernels) {
#if defined(__x86_64__) && !defined(SE_EMULATED)
    if (strncmp(kernels->name, "avx512", 6) == 0) return &loops_avx512;
    if (strcmp(kernels->name, "avx2") == 0) return &loops_avx2;
#endif
    (void)kernels;
    return &loops_portable;
}

enum { MAX_LEVELS = 5, NAMES_BYTES = 64 };

const char *se_levels(void) {
    static char names[NAMES_BYTES]; /* the same bytes at every call */
    const struct kernels *levels[MAX_LEVELS];
    char all[NAMES_BYTES] = "";
    int count = available(levels);
    for (int i = 0; i < count; i++) {
        if (i > 0) strcat(all, " ");
        strcat(all, levels[i]->name);
    }
    memcpy(names, all, sizeof names);
    return names;
}

int32_t se_abi_version(void) {
    return SE_ABI_VERSION;
}

se_context *se_open(const char *level, int64_t threads, int64_t spin_us) {
    const struct kernels *levels[MAX_LEVELS], *kernels = NULL;
    int count = available(levels);
    for (int i = count - 1; i >= 0; i--) {
        if (level == NULL || strcmp(level, levels[i]->name) == 0) kernels = levels[i];
    }
    if (kernels == NULL || threads < 1 || threads > 1024 || spin_us < 0) return NULL;
    se_context *context = calloc(1, sizeof *context);
    if (context == NULL) return NULL;
    context->kernels = kernels;
    context->loops = loops_of(kernels);
    context->pool = pool_open(threads, spin_us);
    if (context->pool == NULL) {
        free(context);
        return NULL;
    }
    return context;
}

void se_close(se_context *context) {
    if (context == NULL) return;
    pool_close(context->pool);
    free(context->scratch);
    free(context);
}

const char *se_level(const se_context *context) {
    return context->kernels->name;
}

int64_t se_scratch_bytes(const se_context *context) {
    return context->scratch_bytes;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int32_t context_enter(se_context *context) {
    if (atomic_exchange(&context->busy, true)) return SE_BUSY;
    context->entered_ns = now_ns();
    return SE_OK;
}

int32_t context_leave(se_context *context, int32_t status) {
    context->kernel_ns += now_ns() - context->entered_ns;
    atomic_store(&context->busy, false);
    return status;
}

int64_t se_kernel_ns(const se_context *context) {
    return context->kernel_ns;
}

bool context_reserve(se_context *context, int64_t bytes) {
    if (bytes <= context->scratch_bytes) return true;
    free(context->scratch);
    bytes = round_up(bytes, 1 << 16);
    context->scratch = aligned_alloc(ALIGNMENT, (size_t)bytes);
    context->scratch_bytes = context->scratch == NULL ? 0 : bytes;
    return context->scratch != NULL;
}

static void nothing(void *argument) {
    (void)argument;
}

int32_t se_dispatch(se_context *context) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    pool_run(context->pool, nothing, NULL);
    return context_leave(context, SE_OK);
}
