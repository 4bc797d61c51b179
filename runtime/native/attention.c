/* Softmax attention over a cache of keys and values.
 *
 * Keys are taken in blocks that begin at multiples of BLOCK_KEYS, whatever the chunk: a query's softmax over each block
 * is taken alone, and the blocks are merged in order (as in Dao et al., FlashAttention, 2205.14135). So it does not
 * matter which thread took a block, or which other queries shared the pass. Tiles of queries that share a key head are
 * the tasks; where they are too few for the threads, the blocks of a tile are. */
#include "context.h"

#include <math.h>

enum {
    WAVE_BLOCKS = 64,   /* blocks whose partial results wait for their turn at a time */
    TILES_PER_THREAD = 4, /* fewer are shared badly */
};

struct attention_job {
    const struct loops *loops;
    const se_kv_cache *cache;
    const float *q, *k, *v, *sinks;
    const uint8_t *selection;
    const se_turn *turn;
    const se_beside *beside;
    float *turned_q, *turned_k; /* as q and k, turned */
    int64_t length, tokens, heads, window;
    float scale;
    float *y;

    int64_t group;       /* query heads per key head */
    int64_t value_width; /* rounded up to LANES */
    int64_t tile_tokens, tile_rows, num_tiles;
    int64_t own_blocks, num_blocks; /* of the cache; and of what is seen beside it, behind them */
    bool gathers;                   /* the keys that a token sees beside the cache */
    int64_t first_block, wave_blocks; /* of the wave */

    _Atomic int64_t num_threads; /* that have taken their scratch */
    float *packed;               /* [threads, tile_rows, width] */
    float *scores;               /* [threads, tile_rows, BLOCK_KEYS] */
    float *gathered;             /* [threads, BLOCK_KEYS / KEY_LANES, width, KEY_LANES] where keys beside are chosen */
    float *totals;               /* [threads or tiles] partials */
    float *partials;             /* [threads or tiles * WAVE_BLOCKS] partials */
    struct tasks tasks;
};

static int64_t partial_floats(const struct attention_job *job) {
    return job->tile_rows * (2 + job->value_width);
}

static struct partial partial_at(const struct attention_job *job, float *partials, int64_t i) {
    float *at = partials + i * partial_floats(job);
    return (struct partial){at + job->tile_rows * job->value_width, at + job->tile_rows * (job->value_width + 1), at};
}

/* ---- the cache */

static void store_token(const struct attention_job *job, int64_t token) {
    const se_kv_cache *cache = job->cache;
    const int64_t position = job->length + token, value_width = job->value_width;
    for (int64_t h = 0; h < cache->heads; h++) {
        const float *k = job->k + (token * cache->heads + h) * cache->width;
        float *keys = cache->keys + (h * cache->capacity + position / KEY_LANES * KEY_LANES) * cache->width;
        for (int64_t i = 0; i < cache->width; i++) keys[KEY_LANES * i + position % KEY_LANES] = k[i];
        if (cache->values == NULL) continue;
        const float *v = job->v + (token * cache->heads + h) * cache->value_width;
        float *value = cache->values + (h * cache->capacity + position) * value_width;
        memset(value, 0, (size_t)value_width * sizeof *value);
        memcpy(value, v, (size_t)cache->value_width * sizeof *value);
    }
}

static void store_tokens(void *argument) {
    struct attention_job *job = argument;
    for (int64_t task; take(&job->tasks, &task);) {
        for (int64_t t = task * KEY_LANES; t < (task + 1) * KEY_LANES && t < job->tokens; t++) store_token(job, t);
    }
}

/* ---- queries and keys as they were projected */

/* One head: its norm, if any, by way of `scratch`, then its rotation. */
static void turn_head(const struct attention_job *job, int64_t token, const float *norm, const float *x, float *scratch,
                      float *y) {
    const se_turn *turn = job->turn;
    const int64_t width = job->cache->width, angle = token * turn->half;
    if (norm != NULL) {
        job->loops->rms_norm(x, norm, turn->eps, width, scratch);
        x = scratch;
    }
    job->loops->rotate(x, turn->cosine + angle, turn->sine + angle, turn->half, width, turn->interleaved, y);
}

/* What a thread works with. */
struct scratch {
    float *packed, *scores, *gathered;
};

static int64_t own_scratch(struct attention_job *job, struct scratch *scratch);

static void turn_tokens(void *argument) {
    struct attention_job *job = argument;
    const int64_t kv_heads = job->cache->heads, width = job->cache->width;
    struct scratch own;
    own_scratch(job, &own);
    for (int64_t t; take(&job->tasks, &t);) {
        for (int64_t h = 0; h < job->heads; h++) {
            const int64_t at = (t * job->heads + h) * width;
            turn_head(job, t, job->turn->q_norm, job->q + at, own.packed, job->turned_q + at);
        }
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t at = (t * kv_heads + h) * width;
            turn_head(job, t, job->turn->k_norm, job->k + at, own.packed, job->turned_k + at);
        }
    }
}

/* ---- tiles */

struct tile_of_queries {
    struct queries queries, beside;
    int64_t key_head, token; /* its first */
    int64_t begin, end;      /* blocks of the cache that any of its queries sees */
};

/* Tile number i; its rows are gathered into packed unless they lie together. */
static struct tile_of_queries tile_at(const struct attention_job *job, int64_t i, float *packed) {
    const int64_t per_head = job->num_tiles / job->cache->heads, width = job->cache->width, group = job->group;
    struct tile_of_queries tile = {.key_head = i / per_head, .token = i % per_head * job->tile_tokens};
    const int64_t left = job->tokens - tile.token, tokens = left < job->tile_tokens ? left : job->tile_tokens;
    const float *q = job->q + (tile.token * job->heads + tile.key_head * group) * width;
    if (tokens > 1) {
        for (int64_t t = 0; t < tokens; t++) {
            memcpy(packed + t * group * width, q + t * job->heads * width, (size_t)(group * width) * sizeof *q);
        }
        q = packed;
    }
    tile.queries = (struct queries){
        .q = q,
        .rows = tokens * group,
        .group = group,
        .position = job->length + tile.token,
        .width = width,
        .value_width = job->value_width,
        .window = job->window,
        .scale = job->scale,
        .selection_stride = job->length + job->tokens,
    };
    if (job->selection != NULL) {
        tile.queries.selection = job->selection + tile.token * tile.queries.selection_stride;
    }
    if (job->beside != NULL) {
        tile.beside = tile.queries;
        tile.beside.position = job->beside->count - 1;
        tile.beside.together = true;
        tile.beside.window = INT64_MAX;
        tile.beside.selection = job->beside->selection + tile.token * job->beside->count;
        tile.beside.selection_stride = job->beside->count;
    }
    const int64_t oldest = tile.queries.position - job->window + 1;
    tile.begin = oldest < 0 ? 0 : oldest / BLOCK_KEYS;
    tile.end = (tile.queries.position + tokens - 1) / BLOCK_KEYS + 1;
    return tile;
}

static bool sees(const struct attention_job *job, const struct tile_of_queries *tile, int64_t block) {
    return (block >= tile->begin && block < tile->end) || block >= job->own_blocks;
}

/* The keys that a token selects from number `first` of them on, side by side; returns how many, BLOCK_KEYS at most. */
static int64_t gather(const se_beside *beside, const uint8_t *selection, int64_t first, int64_t width, float *keys) {
    int64_t passed = 0, n = 0;
    for (int64_t j = 0; j < beside->count && n < BLOCK_KEYS; j++) {
        if (!selection[j] || passed++ < first) continue;
        const float *from = beside->keys + j / KEY_LANES * KEY_LANES * width + j % KEY_LANES;
        float *to = keys + n / KEY_LANES * KEY_LANES * width + n % KEY_LANES;
        for (int64_t i = 0; i < width; i++) to[i * KEY_LANES] = from[i * KEY_LANES];
        n++;
    }
    return n;
}

static void attend_beside(const struct attention_job *job, const struct tile_of_queries *tile, int64_t first,
                          const struct scratch *own, const struct partial *partial) {
    const int64_t width = job->cache->width;
    struct queries queries = tile->beside;
    if (!job->gathers) {
        job->loops->attend(&queries, first, job->beside->keys + first * width, NULL, own->scores, partial);
        return;
    }
    const int64_t n = gather(job->beside, queries.selection, first, width, own->gathered);
    queries.selection = NULL;
    queries.position = n - 1;
    if (n > 0) {
        job->loops->attend(&queries, 0, own->gathered, NULL, own->scores, partial);
    } else {
        memset(partial->sum, 0, (size_t)queries.rows * sizeof *partial->sum);
    }
}

static void attend_block(const struct attention_job *job, const struct tile_of_queries *tile, int64_t block,
                         const struct scratch *own, const struct partial *partial) {
    if (block >= job->own_blocks) {
        attend_beside(job, tile, (block - job->own_blocks) * BLOCK_KEYS, own, partial);
        return;
    }
    const int64_t at = tile->key_head * job->cache->capacity + block * BLOCK_KEYS;
    const float *values = job->cache->values == NULL ? NULL : job->cache->values + at * job->value_width;
    job->loops->attend(&tile->queries, block * BLOCK_KEYS, job->cache->keys + at * job->cache->width, values,
                       own->scores, partial);
}

static void nothing_yet(const struct attention_job *job, const struct partial *total) {
    memset(total->mixed, 0, (size_t)partial_floats(job) * sizeof *total->mixed);
    for (int64_t r = 0; r < job->tile_rows; r++) total->largest[r] = -INFINITY;
}

/* Divides, and puts the rows where they belong. */
static void finish(const struct attention_job *job, const struct tile_of_queries *tile, const struct partial *total) {
    const int64_t group = job->group, width = job->cache->value_width;
    for (int64_t r = 0; r < tile->queries.rows; r++) {
        const int64_t head = tile->key_head * group + r % group;
        const float *mixed = total->mixed + r * job->value_width;
        float *y = job->y + ((tile->token + r / group) * job->heads + head) * width;
        float sum = total->sum[r], keep = 1.0f;
        if (job->sinks != NULL) {
            const float largest = total->largest[r], sink = job->sinks[head], top = largest > sink ? largest : sink;
            keep = exp_nonpositive(largest - top);
            sum = sum * keep + exp_nonpositive(sink - top);
        }
        for (int64_t i = 0; i < width; i++) y[i] = mixed[i] * keep / sum;
    }
}

/* A thread's own scratch; returns its number. */
static int64_t own_scratch(struct attention_job *job, struct scratch *scratch) {
    const int64_t self = atomic_fetch_add(&job->num_threads, 1), width = job->cache->width;
    *scratch = (struct scratch){job->packed + self * job->tile_rows * width,
                                job->scores + self * job->tile_rows * BLOCK_KEYS, NULL};
    if (job->gathers) scratch->gathered = job->gathered + self * BLOCK_KEYS * width;
    return self;
}

static void whole_tiles(void *argument) {
    struct attention_job *job = argument;
    struct scratch own;
    const int64_t self = own_scratch(job, &own);
    const struct partial total = partial_at(job, job->totals, self), partial = partial_at(job, job->partials, self);
    for (int64_t i; take(&job->tasks, &i);) {
        const struct tile_of_queries tile = tile_at(job, i, own.packed);
        nothing_yet(job, &total);
        for (int64_t block = tile.begin; block < job->num_blocks; block++) {
            if (!sees(job, &tile, block)) continue;
            attend_block(job, &tile, block, &own, &partial);
            job->loops->merge(&tile.queries, &total, &partial);
        }
        finish(job, &tile, &total);
    }
}

static void blocks_of_tiles(void *argument) {
    struct attention_job *job = argument;
    struct scratch own;
    own_scratch(job, &own);
    for (int64_t i; take(&job->tasks, &i);) {
        const int64_t block = job->first_block + i % job->wave_blocks;
        const struct tile_of_queries tile = tile_at(job, i / job->wave_blocks, own.packed);
        const struct partial partial = partial_at(job, job->partials, i);
        if (sees(job, &tile, block)) attend_block(job, &tile, block, &own, &partial);
    }
}

/* Blocks as tasks, some at a time, merged in order. */
static void run_in_waves(se_context *context, struct attention_job *job, int64_t products) {
    for (int64_t i = 0; i < job->num_tiles; i++) {
        const struct partial total = partial_at(job, job->totals, i);
        nothing_yet(job, &total);
    }
    struct tile_of_queries tile = tile_at(job, 0, job->packed);
    for (job->first_block = tile.begin; job->first_block < job->num_blocks; job->first_block += WAVE_BLOCKS) {
        const int64_t left = job->num_blocks - job->first_block;
        job->wave_blocks = left < WAVE_BLOCKS ? left : WAVE_BLOCKS;
        job->tasks = (struct tasks){0, job->num_tiles * job->wave_blocks};
        job->num_threads = 0;
        context_run(context, blocks_of_tiles, job, products);
        for (int64_t i = 0; i < job->tasks.count; i++) {
            const int64_t block = job->first_block + i % job->wave_blocks;
            tile = tile_at(job, i / job->wave_blocks, job->packed);
            const struct partial total = partial_at(job, job->totals, i / job->wave_blocks);
            const struct partial partial = partial_at(job, job->partials, i);
            if (sees(job, &tile, block)) job->loops->merge(&tile.queries, &total, &partial);
        }
    }
    for (int64_t i = 0; i < job->num_tiles; i++) {
        tile = tile_at(job, i, job->packed);
        const struct partial total = partial_at(job, job->totals, i);
        finish(job, &tile, &total);
    }
}

static int32_t attention(se_context *context, struct attention_job *job) {
    const se_kv_cache *cache = job->cache;
    const int64_t threads = pool_threads(context->pool), stop = job->length + job->tokens;
    job->gathers = job->beside != NULL && job->beside->gathered;
    const int64_t further = job->beside == NULL ? 0 : job->gathers ? job->beside->most : job->beside->count;
    job->own_blocks = (stop + BLOCK_KEYS - 1) / BLOCK_KEYS;
    job->num_blocks = job->own_blocks + (further + BLOCK_KEYS - 1) / BLOCK_KEYS;
    job->group = job->heads / cache->heads;
    job->value_width = round_up(cache->value_width, LANES);
    job->tile_tokens = job->group < TILE_QUERIES ? TILE_QUERIES / job->group : 1;
    if (job->tile_tokens > job->tokens) job->tile_tokens = job->tokens;
    if (job->gathers) job->tile_tokens = 1;
    job->tile_rows = job->tile_tokens * job->group;
    job->num_tiles = cache->heads * ((job->tokens + job->tile_tokens - 1) / job->tile_tokens);
    const bool waves = threads > 1 && job->num_blocks > 1 && job->num_tiles < TILES_PER_THREAD * threads;
    struct cutter cutter = {0};
    for (int pass = 0; pass < 2; pass++) {
        cutter.used = 0;
        job->packed = cut(&cutter, 4 * threads * job->tile_rows * cache->width);
        job->scores = cut(&cutter, 4 * threads * job->tile_rows * BLOCK_KEYS);
        job->gathered = cut(&cutter, job->gathers ? 4 * threads * BLOCK_KEYS * cache->width : 0);
        job->turned_q = cut(&cutter, job->turn != NULL ? 4 * job->tokens * job->heads * cache->width : 0);
        job->turned_k = cut(&cutter, job->turn != NULL ? 4 * job->tokens * cache->heads * cache->width : 0);
        job->totals = cut(&cutter, 4 * (waves ? job->num_tiles : threads) * partial_floats(job));
        job->partials = cut(&cutter, 4 * (waves ? job->num_tiles * WAVE_BLOCKS : threads) * partial_floats(job));
        if (pass == 0 && !context_reserve(context, cutter.used)) return SE_NO_MEMORY;
        cutter.memory = context->scratch;
    }
    const int64_t values = job->tokens * cache->heads * (cache->width + cache->value_width);
    const int64_t products = job->tokens * job->heads * (cache->width + cache->value_width) * (stop + further);
    if (job->turn != NULL) {
        job->tasks = (struct tasks){0, job->tokens};
        context_run(context, turn_tokens, job, 2 * job->tokens * (job->heads + cache->heads) * cache->width);
        job->q = job->turned_q;
        job->k = job->turned_k;
        job->num_threads = 0;
    }
    job->tasks = (struct tasks){0, (job->tokens + KEY_LANES - 1) / KEY_LANES};
    context_run(context, store_tokens, job, values);
    job->tasks = (struct tasks){0, job->num_tiles};
    if (waves) {
        run_in_waves(context, job, products);
    } else {
        context_run(context, whole_tiles, job, products);
    }
    return SE_OK;
}

int32_t se_attention(se_context *context, const se_kv_cache *cache, int64_t length, const float *q, const float *k,
                     const float *v, int64_t tokens, int64_t heads, float scale, int64_t window, const float *sinks,
                     const uint8_t *selection, const se_turn *turn, const se_beside *beside, float *y) {
    if (context_enter(context) != SE_OK) return SE_BUSY;
    if (cache->heads < 1 || heads % cache->heads != 0 || cache->capacity % KEY_LANES != 0 || tokens < 1 || length < 0 ||
        length + tokens > cache->capacity || window < 0 ||
        (turn != NULL && (turn->half < 0 || 2 * turn->half > cache->width)) ||
        (beside != NULL && (beside->count < 1 || beside->most < 0 || cache->heads != 1 || cache->width % LANES != 0 ||
                            cache->value_width != cache->width)) ||
        (cache->values == NULL && (cache->value_width % LANES != 0 || cache->value_width > cache->width))) {
        return context_leave(context, SE_UNSUPPORTED);
    }
    struct attention_job job = {
        .loops = context->loops,
        .cache = cache,
        .q = q,
        .k = k,
        .v = v,
        .sinks = sinks,
        .selection = selection,
        .turn = turn,
        .beside = beside,
        .length = length,
        .tokens = tokens,
        .heads = heads,
        .window = window == 0 ? INT64_MAX : window,
        .scale = scale,
        .y = y,
    };
    return context_leave(context, attention(context, &job));
}
