/* A pool of threads that waits awake for a moment, then asleep; the caller is its thread 0. */
#ifndef SE_POOL_H
#define SE_POOL_H

#include <stdint.h>

struct pool;

/* threads counts the caller; an idle thread spins for spin_us before it sleeps. NULL without memory or threads. */
struct pool *pool_open(int64_t threads, int64_t spin_us);
void pool_close(struct pool *pool);
int64_t pool_threads(const struct pool *pool);

/* Runs work(argument) once on every thread, and returns when all are done. Not from inside `work`. */
void pool_run(struct pool *pool, void (*work)(void *argument), void *argument);

/* Inside `work`: waits until every thread of the pool has come here; what they wrote is seen by all. */
void pool_barrier(struct pool *pool);

#endif
