#include "context.h"
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* A slot's read, and its place in a queue while it waits there. */
struct request {
    se_fetch fetch;
    int32_t state; /* enum se_slot_state */
    int64_t detail;
    int64_t next, previous; /* slots, or NONE */
};

enum { NONE = -1 };

struct queue {
    int64_t first, last; /* slots, or NONE */
};

struct se_reader {
    uint8_t *slots;
    int64_t slot_bytes, num_slots, bytes_in_flight;
    pthread_mutex_t mutex;
    pthread_cond_t work, ended;
    struct queue queues[2]; /* wanted, early */
    struct request *requests; /* [num_slots] */
    int64_t queued[2];
    int64_t under_way, bytes_under_way, began_ns;
    se_reader_counters counters;
    _Atomic int32_t stopping;
    bool some_ended; /* reads, of which those who wait have not been told */
    bool closing;
    int64_t started;
    pthread_t thread[];
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool pending(const struct request *request) {
    return request->state == SE_SLOT_QUEUED || request->state == SE_SLOT_READING;
}

static int queue_of(const struct request *request) {
    return (request->fetch.flags & SE_FETCH_EARLY) != 0;
}

static void enqueue(se_reader *reader, int64_t slot) {
    struct request *request = &reader->requests[slot];
    struct queue *queue = &reader->queues[queue_of(request)];
    request->state = SE_SLOT_QUEUED;
    reader->queued[queue_of(request)]++;
    request->next = NONE;
    request->previous = queue->last;
    *(queue->last == NONE ? &queue->first : &reader->requests[queue->last].next) = slot;
    queue->last = slot;
}

static void dequeue(se_reader *reader, int64_t slot) {
    struct request *request = &reader->requests[slot];
    struct queue *queue = &reader->queues[queue_of(request)];
    reader->queued[queue_of(request)]--;
    *(request->previous == NONE ? &queue->first : &reader->requests[request->previous].next) = request->next;
    *(request->next == NONE ? &queue->last : &reader->requests[request->next].previous) = request->previous;
}

/* Where so many wait, reads are what all waits for: a sweep of a prompt, not the misses of one token. */
enum { MANY_QUEUED = 8 };

/* The next read that may begin, or NONE: two at once always may, so that the disk never waits for us, of guesses one,
 * which must not be in the way of what comes. More, within bytes_in_flight, only where many are queued: fewer at once
 * arrive one after another, and the first is computed while the next is read. */
static int64_t eligible(const se_reader *reader) {
    const bool early = reader->queues[0].first == NONE;
    const int64_t slot = reader->queues[early].first;
    if (slot == NONE || reader->under_way < (early ? 1 : 2)) return slot;
    if (reader->queued[early] < MANY_QUEUED) return NONE;
    return reader->bytes_under_way + reader->requests[slot].fetch.nbytes <= reader->bytes_in_flight ? slot : NONE;
}

/* Unlocks, then wakes who waits for a read that has ended, and one thread if a read may begin: it takes that read and
 * wakes the next. Whoever is woken finds the lock free, and no one is woken for nothing (docs/LEARNED.md 54). */
static void unlock_and_wake(se_reader *reader) {
    const bool ended = reader->some_ended, more = eligible(reader) != NONE;
    reader->some_ended = false;
    pthread_mutex_unlock(&reader->mutex);
    if (ended) pthread_cond_broadcast(&reader->ended);
    if (more) pthread_cond_signal(&reader->work);
}

/* Reads and checks outside the lock; returns the state that the slot is in afterwards. */
static int32_t carry_out(const se_fetch *fetch, uint8_t *slot, int64_t *detail) {
    int64_t done = 0;
    while (done < fetch->nbytes) {
        ssize_t n = pread(fetch->fd, slot + done, (size_t)(fetch->nbytes - done), fetch->offset + done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return *detail = errno, SE_SLOT_FAILED;
        if (n == 0) return *detail = done, SE_SLOT_SHORT;
        done += n;
    }
#if defined(POSIX_FADV_DONTNEED)
    if (fetch->flags & SE_FETCH_BUFFERED) posix_fadvise(fetch->fd, fetch->offset, fetch->nbytes, POSIX_FADV_DONTNEED);
#endif
    if (fetch->flags & SE_FETCH_CHECK) {
        uint64_t found = se_xxh3(slot, fetch->nbytes);
        if (found != fetch->checksum) return *detail = (int64_t)found, SE_SLOT_WRONG;
    }
    return SE_SLOT_FULL;
}

/* Takes a read, carries it out and notes how it ended; the lock is held before and after, but not meanwhile. */
static void read_slot(se_reader *reader, int64_t slot) {
    struct request *request = &reader->requests[slot];
    const se_fetch fetch = request->fetch; /* its flags may change meanwhile */
    dequeue(reader, slot);
    request->state = SE_SLOT_READING;
    if (reader->under_way++ == 0) reader->began_ns = now_ns();
    reader->bytes_under_way += fetch.nbytes;
    unlock_and_wake(reader);
    int64_t detail = 0;
    int32_t state = carry_out(&fetch, reader->slots + slot * reader->slot_bytes, &detail);
    pthread_mutex_lock(&reader->mutex);
    request->state = state;
    request->detail = detail;
    reader->bytes_under_way -= fetch.nbytes;
    if (--reader->under_way == 0) reader->counters.busy_ns += now_ns() - reader->began_ns;
    if (state == SE_SLOT_FULL) reader->counters.nbytes += fetch.nbytes;
    reader->some_ended = true;
}

static void *serve(void *argument) {
    se_reader *reader = argument;
    pthread_mutex_lock(&reader->mutex);
    for (;;) {
        int64_t slot = eligible(reader);
        if (slot != NONE) {
            read_slot(reader, slot);
        } else if (reader->some_ended) {
            unlock_and_wake(reader);
            pthread_mutex_lock(&reader->mutex);
        } else if (reader->closing) {
            break;
        } else {
            pthread_cond_wait(&reader->work, &reader->mutex);
        }
    }
    pthread_mutex_unlock(&reader->mutex);
    return NULL;
}

se_reader *se_reader_open(uint8_t *slots, int64_t slot_bytes, int64_t num_slots, int64_t threads,
                          int64_t bytes_in_flight) {
    if (threads < 1 || threads > 1024 || num_slots < 0 || slot_bytes < 0) return NULL;
    se_reader *reader = calloc(1, sizeof *reader + (size_t)threads * sizeof(pthread_t));
    if (reader == NULL) return NULL;
    pthread_mutex_init(&reader->mutex, NULL);
    pthread_cond_init(&reader->work, NULL);
    pthread_cond_init(&reader->ended, NULL);
    reader->slots = slots;
    reader->slot_bytes = slot_bytes;
    reader->num_slots = num_slots;
    reader->bytes_in_flight = bytes_in_flight;
    reader->queues[0] = reader->queues[1] = (struct queue){NONE, NONE};
    reader->requests = calloc((size_t)num_slots + 1, sizeof *reader->requests);
    for (; reader->requests != NULL && reader->started < threads; reader->started++) {
        if (pthread_create(&reader->thread[reader->started], NULL, serve, reader) != 0) break;
    }
    if (reader->started == threads) return reader;
    se_reader_close(reader);
    return NULL;
}

void se_reader_close(se_reader *reader) {
    if (reader == NULL) return;
    pthread_mutex_lock(&reader->mutex);
    reader->closing = true;
    for (int q = 0; q < 2; q++) {
        while (reader->queues[q].first != NONE) {
            int64_t slot = reader->queues[q].first;
            dequeue(reader, slot);
            reader->requests[slot].state = SE_SLOT_CANCELLED;
        }
    }
    pthread_cond_broadcast(&reader->work);
    pthread_mutex_unlock(&reader->mutex);
    for (int64_t i = 0; i < reader->started; i++) pthread_join(reader->thread[i], NULL);
    pthread_cond_destroy(&reader->ended);
    pthread_cond_destroy(&reader->work);
    pthread_mutex_destroy(&reader->mutex);
    free(reader->requests);
    free(reader);
}

int32_t se_reader_submit(se_reader *reader, const se_fetch *fetches, int64_t n) {
    int32_t status = SE_OK;
    pthread_mutex_lock(&reader->mutex);
    for (int64_t i = 0; i < n && status == SE_OK; i++) {
        const se_fetch *f = &fetches[i];
        if (f->slot < 0 || f->slot >= reader->num_slots || f->nbytes < 0 || f->nbytes > reader->slot_bytes) {
            status = SE_UNSUPPORTED;
        } else if (pending(&reader->requests[f->slot])) {
            status = SE_BUSY;
        }
    }
    for (int64_t i = 0; i < n && status == SE_OK; i++) {
        reader->requests[fetches[i].slot].fetch = fetches[i];
        enqueue(reader, fetches[i].slot);
    }
    unlock_and_wake(reader);
    return status;
}

void se_reader_promote(se_reader *reader, const int64_t *slots, int64_t n) {
    pthread_mutex_lock(&reader->mutex);
    for (int64_t i = 0; i < n; i++) {
        struct request *request = &reader->requests[slots[i]];
        if (request->state != SE_SLOT_QUEUED || !(request->fetch.flags & SE_FETCH_EARLY)) continue;
        dequeue(reader, slots[i]);
        request->fetch.flags &= ~SE_FETCH_EARLY;
        enqueue(reader, slots[i]);
    }
    unlock_and_wake(reader);
}

void se_reader_cancel(se_reader *reader, const int64_t *slots, int64_t n, int32_t wait) {
    pthread_mutex_lock(&reader->mutex);
    for (int64_t i = 0; i < n; i++) {
        struct request *request = &reader->requests[slots[i]];
        if (request->state != SE_SLOT_QUEUED) continue;
        dequeue(reader, slots[i]);
        request->state = SE_SLOT_CANCELLED;
    }
    for (int64_t i = 0; i < n && wait; i++) {
        while (pending(&reader->requests[slots[i]])) pthread_cond_wait(&reader->ended, &reader->mutex);
    }
    pthread_mutex_unlock(&reader->mutex);
}

/* The first of the slots that has no read under way, or NONE. */
static int64_t first_ended(const se_reader *reader, const int64_t *slots, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!pending(&reader->requests[slots[i]])) return i;
    }
    return NONE;
}

int64_t se_reader_wait_any(se_reader *reader, const int64_t *slots, int64_t n) {
    int64_t found;
    pthread_mutex_lock(&reader->mutex);
    int64_t began = 0;
    while ((found = first_ended(reader, slots, n)) == NONE && n > 0) {
        if (began == 0) began = now_ns();
        pthread_cond_wait(&reader->ended, &reader->mutex);
    }
    if (began != 0) reader->counters.wait_ns += now_ns() - began;
    pthread_mutex_unlock(&reader->mutex);
    return found;
}

int32_t se_reader_state(se_reader *reader, int64_t slot, int64_t *detail) {
    pthread_mutex_lock(&reader->mutex);
    int32_t state = reader->requests[slot].state;
    *detail = reader->requests[slot].detail;
    pthread_mutex_unlock(&reader->mutex);
    return state;
}

void se_reader_stop(se_reader *reader, int32_t stop) {
    atomic_store(&reader->stopping, stop);
}

void se_reader_count(se_reader *reader, se_reader_counters *counters) {
    pthread_mutex_lock(&reader->mutex);
    *counters = reader->counters;
    if (reader->under_way != 0) counters->busy_ns += now_ns() - reader->began_ns;
    pthread_mutex_unlock(&reader->mutex);
}

/* ---- computing on slots as they fill */

/* Moves the experts whose slots are no longer pending to the front of `left`; waits for one. Returns how many, or
 * NONE when one of them holds no record. */
static int64_t arrived(se_reader *reader, const se_arriving *arriving, int64_t *left, int64_t n) {
    int64_t ready = 0;
    bool whole = true;
    pthread_mutex_lock(&reader->mutex);
    for (int64_t began = 0; ready == 0;) {
        for (int64_t i = 0; i < n; i++) {
            const struct request *request = &reader->requests[arriving[left[i]].slot];
            if (pending(request)) continue;
            whole = whole && request->state == SE_SLOT_FULL;
            int64_t swap = left[ready];
            left[ready++] = left[i];
            left[i] = swap;
        }
        if (ready == 0 && began == 0) began = now_ns();
        if (ready == 0) pthread_cond_wait(&reader->ended, &reader->mutex);
        if (ready != 0 && began != 0) reader->counters.wait_ns += now_ns() - began;
    }
    pthread_mutex_unlock(&reader->mutex);
    return whole ? ready : NONE;
}

int32_t se_experts_streamed(se_context *context, se_reader *reader, int32_t precision, const se_expert_layout *layout,
                            const se_arriving *arriving, const int64_t *pairs, int64_t num_experts, const float *x,
                            const float *weights, int64_t tokens, int64_t k, const se_expert_norm *norm, float *outputs,
                            float *y) {
    for (int64_t i = 0; i < num_experts; i++) {
        if (arriving[i].slot < 0 || arriving[i].slot >= reader->num_slots) return SE_UNSUPPORTED;
    }
    int64_t *left = malloc((size_t)num_experts * (sizeof *left + sizeof(se_expert)) + 1);
    if (left == NULL) return SE_NO_MEMORY;
    se_expert *experts = (se_expert *)(left + num_experts);
    for (int64_t i = 0; i < num_experts; i++) left[i] = i;
    int32_t status = SE_OK;
    for (int64_t begin = 0, ready; begin < num_experts && status == SE_OK; begin += ready) {
        ready = arrived(reader, arriving, left + begin, num_experts - begin);
        if (ready == NONE || atomic_load(&reader->stopping)) {
            status = ready == NONE ? SE_READ_FAILED : SE_STOPPED;
            break;
        }
        for (int64_t i = 0; i < ready; i++) {
            const se_arriving *a = &arriving[left[begin + i]];
            experts[i] = (se_expert){reader->slots + a->slot * reader->slot_bytes, pairs + a->first, a->count};
        }
        status = se_experts(context, precision, layout, experts, ready, x, weights, tokens, k, norm, outputs);
    }
    free(left);
    if (status != SE_OK || y == NULL) return status;
    const bool scaled = layout->activation.scale_input != 0;
    return se_weighted_sum(context, outputs, scaled ? NULL : weights, tokens, k, layout->down.rows, y);
}
