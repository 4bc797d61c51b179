#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

/* A number that threads wait on until it is no longer what they saw. */
struct gate {
    _Atomic uint32_t value;
    char pad[60]; /* its own cache line: the spinners' */
};

struct pool {
    struct gate round;   /* one higher for every run */
    struct gate barrier; /* one higher for every barrier passed */
    _Atomic int64_t at_barrier;
    _Atomic int64_t sleepers;
    int64_t threads; /* the caller included */
    int64_t started;
    int64_t spin_ns;
    void (*work)(void *);
    void *argument;
    bool ending;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t thread[];
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Waits while gate holds `seen`: awake for spin_ns, for the next step often follows within microseconds, then asleep,
 * for a core that spins is a core that another program cannot have. */
static void gate_wait(struct pool *pool, struct gate *gate, uint32_t seen) {
    int64_t until = now_ns() + pool->spin_ns;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&gate->value, memory_order_acquire) != seen) return;
            relax();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1); /* before the look at the gate: gate_open looks in the other order */
    while (atomic_load(&gate->value) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void gate_open(struct pool *pool, struct gate *gate) {
    atomic_fetch_add(&gate->value, 1);
    if (atomic_load(&pool->sleepers) != 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

void pool_barrier(struct pool *pool) {
    if (pool->threads == 1) return;
    uint32_t seen = atomic_load(&pool->barrier.value);
    if (atomic_fetch_add(&pool->at_barrier, 1) + 1 == pool->threads) {
        atomic_store(&pool->at_barrier, 0);
        gate_open(pool, &pool->barrier);
    } else {
        gate_wait(pool, &pool->barrier, seen);
    }
}

static void *serve(void *argument) {
    struct pool *pool = argument;
    uint32_t round = 0;
    for (;;) {
        gate_wait(pool, &pool->round, round);
        round++;
        if (pool->ending) return NULL;
        pool->work(pool->argument);
        pool_barrier(pool);
    }
}

void pool_run(struct pool *pool, void (*work)(void *), void *argument) {
    pool->work = work;
    pool->argument = argument;
    if (pool->threads > 1) gate_open(pool, &pool->round);
    work(argument);
    pool_barrier(pool);
}

int64_t pool_threads(const struct pool *pool) {
    return pool->threads;
}

struct pool *pool_open(int64_t threads, int64_t spin_us) {
    struct pool *pool = calloc(1, sizeof *pool + (size_t)(threads - 1) * sizeof(pthread_t));
    if (pool == NULL) return NULL;
    pool->threads = threads;
    pool->spin_ns = spin_us * 1000;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (; pool->started < threads - 1; pool->started++) {
        if (pthread_create(&pool->thread[pool->started], NULL, serve, pool) != 0) {
            pool_close(pool);
            return NULL;
        }
    }
    return pool;
}

void pool_close(struct pool *pool) {
    if (pool == NULL) return;
    pool->ending = true;
    gate_open(pool, &pool->round);
    for (int64_t i = 0; i < pool->started; i++) pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}
