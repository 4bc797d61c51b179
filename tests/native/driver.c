/* Runs the kernels of every instruction set of this machine on cases from a file, and compares with what NumPy says of
 * them: `driver fixtures/kernels.bin`. Linked statically, so that it runs alone, also under an emulator.
 *
 * All levels, numbers of threads and of tokens per call must agree to the bit. The last line is a checksum of all
 * results, which must be the same on every architecture. */
#include "../../runtime/native/se_native.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINEAR = 0, EXPERTS = 1, ENCODE = 2, ALIGNMENT = 64 };
static const char *const PRECISIONS[SE_EXACT] = {"fast", "close", "exact"};

/* tests/fixtures/make_kernels.py writes them: numbers, then pieces, each on the next multiple of ALIGNMENT. */
struct header {
    char magic[8];
    int64_t num_cases;
    int64_t matrix_bytes;
    int64_t expert_layout_bytes;
};
struct case_header {
    int64_t kind;
    int64_t tokens; /* or groups */
    int64_t k;
    int64_t num_experts;
    int64_t record_bytes;
    int64_t outputs; /* floats that are expected */
    double tolerance[SE_EXACT]; /* of the error over the norm, by precision less one */
};
struct encoding {
    int32_t bits, group_size, dtype, scale_dtype;
};

static const uint8_t *cursor, *end;

static void fail(const char *what, const char *level, int64_t number) {
    fprintf(stderr, "driver: %s (level %s, case %lld)\n", what, level, (long long)number);
    exit(1);
}

static const void *take(int64_t bytes) {
    const uint8_t *piece = cursor;
    if (bytes < 0 || bytes > end - cursor) fail("the file ends early", "-", -1);
    cursor += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return piece;
}

static void read_file(const char *name) {
    FILE *file = fopen(name, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) fail("the file cannot be read", "-", -1);
    long bytes = ftell(file);
    rewind(file);
    uint8_t *content = aligned_alloc(ALIGNMENT, (size_t)(bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (content == NULL || fread(content, 1, (size_t)bytes, file) != (size_t)bytes) fail("a short read", "-", -1);
    fclose(file);
    cursor = content;
    end = content + bytes;
}

static uint64_t checksum(uint64_t sum, const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) sum = (sum ^ ((const uint8_t *)data)[i]) * 0x100000001b3; /* FNV-1a */
    return sum;
}

static double error(const float *found, const float *expected, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)found[i] - (double)expected[i];
        difference += d * d;
        norm += (double)expected[i] * (double)expected[i];
    }
    return sqrt(difference / norm);
}

/* Activations are not in the file: a sequence that spreads evenly over -0.5 to 0.5, exact in float. */
static float *activations(int64_t n) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)((uint32_t)i * 2654435761u >> 8) * 0x1p-24f - 0.5f;
    return x;
}

/* ---- one case with one context: y [outputs] */

struct linear {
    const se_matrix *matrix;
    const uint8_t *base;
    const float *x;
};

static int32_t run_linear(se_context *context, int32_t precision, const struct case_header *c, const struct linear *l,
                          int one_by_one, float *y) {
    if (!one_by_one) return se_linear(context, precision, l->matrix, 1, l->base, l->x, c->tokens, y);
    int32_t status = SE_OK;
    for (int64_t t = 0; t < c->tokens && status == SE_OK; t++) {
        const float *x = l->x + t * l->matrix->columns;
        status = se_linear(context, precision, l->matrix, 1, l->base, x, 1, y + t * l->matrix->rows);
    }
    return status;
}

struct experts {
    const se_expert_layout *layout;
    const uint8_t *records;
    const int64_t *ids; /* [tokens, k] */
    const float *x, *weights;
    const se_expert_norm *norm; /* or NULL */
};

static int32_t run_experts(se_context *context, int32_t precision, const struct case_header *c, const struct experts *e,
                           int one_by_one, float *y) {
    se_expert *chosen = calloc((size_t)c->num_experts, sizeof *chosen);
    int64_t *pairs = calloc((size_t)(c->tokens * c->k), sizeof *pairs), used = 0;
    int32_t status = SE_OK;
    for (int64_t expert = 0; expert < c->num_experts; expert++) {
        se_expert *entry = &chosen[expert];
        *entry = (se_expert){e->records + expert * c->record_bytes, pairs + used, 0};
        for (int64_t pair = 0; pair < c->tokens * c->k; pair++) {
            if (e->ids[pair] != expert) continue;
            pairs[used++] = pair;
            entry->num_pairs++;
        }
        if (one_by_one && status == SE_OK && entry->num_pairs > 0) {
            status = se_experts(context, precision, e->layout, entry, 1, e->x, e->weights, c->tokens, c->k, e->norm,
                                y);
        }
    }
    if (!one_by_one) {
        status = se_experts(context, precision, e->layout, chosen, c->num_experts, e->x, e->weights, c->tokens, c->k,
                            e->norm, y);
    }
    free(chosen);
    free(pairs);
    return status;
}

static int32_t run(se_context *context, int32_t precision, const struct case_header *c, const void *work,
                   int one_by_one, float *y) {
    return c->kind == LINEAR ? run_linear(context, precision, c, work, one_by_one, y)
                             : run_experts(context, precision, c, work, one_by_one, y);
}

/* ---- one case on all levels */

/* Every level, thread count and way to call it against the plain loops, and these against NumPy. */
static uint64_t compare(const struct case_header *c, const void *work, const float *expected, int64_t number,
                        uint64_t sum, double *worst) {
    char levels[256];
    const int64_t bytes = c->outputs * (int64_t)sizeof(float);
    float *first = malloc((size_t)bytes), *y = malloc((size_t)bytes);
    for (int32_t precision = SE_FAST; precision <= SE_EXACT; precision++) {
        int runs = 0;
        strcpy(levels, se_levels());
        for (char *level = strtok(levels, " "); level != NULL; level = strtok(NULL, " ")) {
            for (int variant = 0; variant < 4; variant++) {
                se_context *context = se_open(level, 1 + variant % 2 * 2, 50);
                if (context == NULL) fail("no context", level, number);
                float *to = runs++ == 0 ? first : y;
                memset(to, 0xff, (size_t)bytes);
                if (run(context, precision, c, work, variant / 2, to) != SE_OK) fail("refused", level, number);
                if (memcmp(first, to, (size_t)bytes) != 0) fail("another level has other bits", level, number);
                se_close(context);
            }
        }
        sum = checksum(sum, first, bytes);
        const double found = error(first, expected, c->outputs);
        if (!(found <= c->tolerance[precision - 1])) fail("far from NumPy", PRECISIONS[precision - 1], number);
        if (found > worst[precision - 1]) worst[precision - 1] = found;
    }
    free(first);
    free(y);
    return sum;
}

static void compare_encoding(const struct case_header *c, int64_t number) {
    const struct encoding *e = take(sizeof *e);
    const int64_t values = c->tokens * e->group_size, scale_bytes = c->tokens * (e->scale_dtype == SE_F32 ? 4 : 2);
    const uint8_t *x = take(values * (e->dtype == SE_F32 ? 4 : 2)), *codes = take(values * e->bits / 8);
    const uint8_t *scales = take(scale_bytes), *biases = take(scale_bytes);
    uint8_t *found[3] = {malloc((size_t)values), malloc((size_t)scale_bytes), malloc((size_t)scale_bytes)};
    const char *level;
    for (int32_t i = 0; (level = se_encode_level(i)) != NULL; i++) {
        int32_t status = se_encode_affine(level, e->bits, e->group_size, e->dtype, e->scale_dtype, x, c->tokens,
                                          found[0], found[1], found[2]);
        if (status != SE_OK) fail("the encoder refuses", level, number);
        if (memcmp(found[0], codes, (size_t)(values * e->bits / 8)) != 0) fail("other codes than NumPy", level, number);
        if (memcmp(found[1], scales, (size_t)scale_bytes) != 0) fail("other scales than NumPy", level, number);
        if (memcmp(found[2], biases, (size_t)scale_bytes) != 0) fail("other biases than NumPy", level, number);
    }
    for (int i = 0; i < 3; i++) free(found[i]);
}

/* Rows that are expected, each times `weight`, then divided by the root of its mean square. */
static float *normalised(const float *rows, int64_t n, int64_t columns, const se_expert_norm *norm) {
    float *y = malloc((size_t)n * sizeof *y);
    for (int64_t begin = 0; begin < n; begin += columns) {
        double squares = 0;
        for (int64_t i = 0; i < columns; i++) {
            const double scaled = (double)rows[begin + i] * (double)norm->weight[i];
            squares += scaled * scaled;
        }
        const double root = sqrt(squares / (double)columns + (double)norm->eps);
        for (int64_t i = 0; i < columns; i++) {
            y[begin + i] = (float)((double)rows[begin + i] * (double)norm->weight[i] / root);
        }
    }
    return y;
}

static uint64_t run_case(int64_t number, uint64_t sum, double *worst) {
    const struct case_header *c = take(sizeof *c);
    if (c->kind == ENCODE) {
        compare_encoding(c, number);
        return sum;
    }
    if (c->kind == LINEAR) {
        struct linear l = {.matrix = take(sizeof *l.matrix)};
        l.base = take(c->record_bytes);
        float *x = activations(c->tokens * l.matrix->columns);
        l.x = x;
        sum = compare(c, &l, take(c->outputs * (int64_t)sizeof(float)), number, sum, worst);
        free(x);
        return sum;
    }
    struct experts e = {.layout = take(sizeof *e.layout)};
    e.records = take(c->num_experts * c->record_bytes);
    e.ids = take(c->tokens * c->k * (int64_t)sizeof *e.ids);
    e.weights = take(c->tokens * c->k * (int64_t)sizeof(float));
    float *x = activations(c->tokens * e.layout->gate.columns);
    e.x = x;
    const float *expected = take(c->outputs * (int64_t)sizeof(float));
    sum = compare(c, &e, expected, number, sum, worst);
    const int64_t columns = e.layout->down.rows;
    float *weight = activations(columns);
    for (int64_t i = 0; i < columns; i++) weight[i] += 1.0f;
    e.norm = &(se_expert_norm){weight, 1e-3f, 0};
    float *after = normalised(expected, c->outputs, columns, e.norm);
    sum = compare(c, &e, after, number, sum, worst);
    free(after);
    free(weight);
    free(x);
    return sum;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: driver FILE\n");
        return 2;
    }
    read_file(argv[1]);
    const struct header *header = take(sizeof *header);
    if (memcmp(header->magic, "SEKERNEL", 8) != 0 || header->matrix_bytes != (int64_t)sizeof(se_matrix) ||
        header->expert_layout_bytes != (int64_t)sizeof(se_expert_layout)) {
        fail("the file was written for another version", "-", -1);
    }
    uint64_t sum = 0xcbf29ce484222325;
    double worst[SE_EXACT] = {0};
    for (int64_t i = 0; i < header->num_cases; i++) sum = run_case(i, sum, worst);
    printf("levels: %s\n", se_levels());
    printf("encoder levels:");
    for (int32_t i = 0; se_encode_level(i) != NULL; i++) printf(" %s", se_encode_level(i));
    printf("\ncases: %lld\nlargest error:", (long long)header->num_cases);
    for (int i = 0; i < SE_EXACT; i++) printf(" %s %.1e", PRECISIONS[i], worst[i]);
    printf("\n");
    printf("bits: %016llx\n", (unsigned long long)sum);
    return 0;
}
