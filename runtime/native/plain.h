/* From the plain_tile of an instruction set, which this is included behind, to a kernel for every enum value. */
#ifndef SE_PLAIN_H
#define SE_PLAIN_H

static void plain_bf16(const struct tile *tile) {
    plain_tile(tile, SE_BF16);
}

static void plain_f16(const struct tile *tile) {
    plain_tile(tile, SE_F16);
}

static void plain_f32(const struct tile *tile) {
    plain_tile(tile, SE_F32);
}

static void plain_fp8(const struct tile *tile) {
    plain_tile(tile, VALUE_FP8);
}

#endif
