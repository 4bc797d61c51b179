/* Reading without computing: what benchmarks divide by. */
#include "context.h"

enum { CHUNK_BYTES = 256 << 10 };

struct read_job {
    const struct kernels *kernels;
    const uint8_t *const *pieces;
    int64_t bytes;
    int32_t loop;
    struct tasks chunks;
    _Atomic uint64_t seen; /* so that no compiler drops the loads */
};

static uint64_t read_chunk(const struct read_job *job, const uint8_t *bytes, const uint8_t *other, int64_t n) {
    static const int64_t ahead[] = {0, 1024, 4096, 4096};
    if (job->loop != SE_READ_STREAMS) return job->kernels->read(bytes, n, ahead[job->loop]);
    uint64_t seen = 0;
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t step = n - i < 1024 ? n - i : 1024;
        seen |= job->kernels->read(bytes + i, step, 4096) | job->kernels->read(other + i, step, 4096);
    }
    return seen;
}

static void read_chunks(void *argument) {
    struct read_job *job = argument;
    const bool streams = job->loop == SE_READ_STREAMS;
    const int64_t length = streams ? job->bytes / 2 : job->bytes, per_piece = (length + CHUNK_BYTES - 1) / CHUNK_BYTES;
    uint64_t seen = 0;
    for (int64_t i; take(&job->chunks, &i);) {
        const uint8_t *piece = job->pieces[i / per_piece];
        const int64_t begin = i % per_piece * CHUNK_BYTES;
        const int64_t n = begin + CHUNK_BYTES < length ? CHUNK_BYTES : length - begin;
        seen |= read_chunk(job, piece + begin, piece + length + begin, n);
    }
    atomic_fetch_or(&job->seen, seen);
}

int32_t se_read(se_context *context, int32_t loop, const uint8_t *const *pieces, int64_t num_pieces, int64_t bytes) {
    if (loop < SE_READ_PLAIN || loop > SE_READ_STREAMS || bytes < 1) return SE_UNSUPPORTED;
    if (context_enter(context) != SE_OK) return SE_BUSY;
    const int64_t length = loop == SE_READ_STREAMS ? bytes / 2 : bytes;
    struct read_job job = {.kernels = context->kernels, .pieces = pieces, .bytes = bytes, .loop = loop};
    job.chunks.count = num_pieces * ((length + CHUNK_BYTES - 1) / CHUNK_BYTES);
    pool_run(context->pool, read_chunks, &job);
    return context_leave(context, SE_OK);
}
