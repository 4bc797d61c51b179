/* What makes a compiler write straight code: every constant of a kernel known, every short loop unrolled. */
#ifndef SE_STRAIGHT_H
#define SE_STRAIGHT_H

#if defined(SE_EMULATED) /* by functions, where constants are worth nothing (tests/native) */
#define INLINE static
#define UNROLL
#elif defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll")
#else
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* A function of its own: the time of compilers grows faster than what a function has in it (docs/LEARNED.md 90). */
#define APART static __attribute__((noinline))

/* The pointer itself, of which the compiler no longer knows how it was made: else it keeps a register, or a place on the
 * stack, for every constant offset from it. */
INLINE const void *opaque(const void *pointer) {
    __asm__("" : "+r"(pointer));
    return pointer;
}

#endif
