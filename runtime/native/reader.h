/* Reads of records into a pool of slots, by threads that wait in the kernel so that no one else has to.
 *
 * A slot has one read at a time and a state. Whoever computes on a slot asks for its state first, so neither two reads
 * into one slot nor work on a slot that is being filled can happen, whatever the caller believes. */
#ifndef SE_READER_H
#define SE_READER_H

#include "se_native.h"

typedef struct se_reader se_reader;

enum se_slot_state {
    SE_SLOT_EMPTY = 0,     /* no read was asked for since the last was forgotten */
    SE_SLOT_QUEUED = 1,    /* a read waits for its turn */
    SE_SLOT_READING = 2,   /* the disk is at it */
    SE_SLOT_FULL = 3,      /* all bytes are there, and checked if that was asked for */
    SE_SLOT_FAILED = 4,    /* detail: errno */
    SE_SLOT_SHORT = 5,     /* detail: bytes that were there */
    SE_SLOT_WRONG = 6,     /* detail: the checksum found */
    SE_SLOT_CANCELLED = 7, /* it never began */
};

enum se_fetch_flags {
    SE_FETCH_CHECK = 1,    /* compare with `checksum` */
    SE_FETCH_BUFFERED = 2, /* the file goes through the page cache: drop there what was read */
    SE_FETCH_EARLY = 4,    /* a guess: begins only when nothing that is wanted waits */
};

/* One read: nbytes of a file from offset on, into the start of a slot. */
typedef struct {
    int64_t slot;
    int64_t offset;
    int64_t nbytes;
    uint64_t checksum; /* XXH3-64 */
    int32_t fd;
    int32_t flags; /* enum se_fetch_flags */
} se_fetch;
static_assert(sizeof(se_fetch) == 40, "mirrored in runtime/native_reader.py");

typedef struct {
    int64_t nbytes;   /* read so far */
    int64_t busy_ns;  /* while at least one read was under way */
    int64_t wait_ns;  /* that a computation had nothing to do but wait for reads */
} se_reader_counters;
static_assert(sizeof(se_reader_counters) == 24, "mirrored in runtime/native_reader.py");

/* slots: num_slots pieces of slot_bytes each, on multiples of 4096. At most `threads` reads and bytes_in_flight bytes
 * are under way at once where many are queued, and two otherwise, whatever their size. NULL without memory or threads. */
SE_API se_reader *se_reader_open(uint8_t *slots, int64_t slot_bytes, int64_t num_slots, int64_t threads,
                                 int64_t bytes_in_flight);
/* Cancels what is queued and waits for what is under way. */
SE_API void se_reader_close(se_reader *reader);

/* Queues reads, in that order. SE_BUSY, and nothing is queued, when a slot has a read under way; SE_UNSUPPORTED for a
 * slot or a size that is none. */
SE_API int32_t se_reader_submit(se_reader *reader, const se_fetch *fetches, int64_t n);

/* Early reads that are wanted after all go behind the others that are wanted. */
SE_API void se_reader_promote(se_reader *reader, const int64_t *slots, int64_t n);

/* Cancels the reads of these slots that have not begun; with `wait`, returns when the others have ended. */
SE_API void se_reader_cancel(se_reader *reader, const int64_t *slots, int64_t n, int32_t wait);

/* Waits until one of these slots has no read under way and returns its place among them. */
SE_API int64_t se_reader_wait_any(se_reader *reader, const int64_t *slots, int64_t n);

SE_API int32_t se_reader_state(se_reader *reader, int64_t slot, int64_t *detail);

/* Ends every computation that waits for reads, until it is set back; from any thread. */
SE_API void se_reader_stop(se_reader *reader, int32_t stop);

SE_API void se_reader_count(se_reader *reader, se_reader_counters *counters);

/* An expert in a slot, chosen by `count` pairs (token * k + place) from pairs[first] on. */
typedef struct {
    int64_t slot;
    int64_t first;
    int64_t count;
} se_arriving;
static_assert(sizeof(se_arriving) == 24, "mirrored in runtime/backends/abi.py");

/* Experts as se_experts takes them, but in slots whose reads may still be under way: those that are there are computed
 * at once, the others as they arrive. Each pair has its own row of `outputs`, so the order of arrival changes no bit.
 * y [T, D] or NULL: then, once these experts are there, every row of `outputs` is, and y becomes the sum over k, in that
 * order, of weights[t, i] * outputs[t * k + i], or of the outputs alone where the weights have scaled the inputs.
 * SE_READ_FAILED when a slot holds no record (its state tells why), SE_STOPPED after se_reader_stop. */
SE_API int32_t se_experts_streamed(se_context *context, se_reader *reader, int32_t precision,
                                   const se_expert_layout *layout, const se_arriving *arriving, const int64_t *pairs,
                                   int64_t num_experts, const float *x, const float *weights, int64_t tokens, int64_t k,
                                   const se_expert_norm *norm, float *outputs, float *y);

/* XXH3-64, seed 0, of more than 240 bytes; 0 for fewer. */
SE_API uint64_t se_xxh3(const uint8_t *bytes, int64_t n);

#endif
