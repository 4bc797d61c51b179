/* From the tile_by_one, turn_rows and turned_by_many of an instruction set to kernels by code, group size and planes. */
#ifndef SE_TABLE_H
#define SE_TABLE_H

#define KERNEL(code, group_size, planes)                                                                             \
    static void turned_##code##_##group_size##_##planes(const struct tile *tile, int s, int64_t first, int64_t rows, \
                                                        int64_t token, int64_t tokens) {                             \
        turned_by_many(tile, s, first, rows, token, tokens, (struct kind){CODE_##code, group_size, planes},          \
                       turn_##code##_##group_size);                                                                  \
    }                                                                                                                \
    static void tile_##code##_##group_size##_##planes(const struct tile *tile) {                                     \
        if (tile->tokens > 1) {                                                                                      \
            turned_tile(tile, turned_##code##_##group_size##_##planes);                                              \
        } else {                                                                                                     \
            tile_by_one(tile, (struct kind){CODE_##code, group_size, planes});                                       \
        }                                                                                                            \
    }
/* Codes are turned alike for every precision. */
#define TURN(code, group_size)                                                                                       \
    APART void turn_##code##_##group_size(struct turned *turned, int vector, const struct weights *w, int64_t first, \
                                          int64_t rows, int64_t block, int slice) {                                  \
        turn_rows(turned, vector, w, first, rows, block, slice, (struct kind){CODE_##code, group_size, 1});          \
    }
#define KERNELS(code, group_size) \
    TURN(code, group_size) KERNEL(code, group_size, 1) KERNEL(code, group_size, 2) KERNEL(code, group_size, 3)
#define BY_PRECISION(code, group_size) \
    {tile_##code##_##group_size##_1, tile_##code##_##group_size##_2, tile_##code##_##group_size##_3}
#define FROM_32(code) BY_PRECISION(code, 32), BY_PRECISION(code, 64), BY_PRECISION(code, 128)

#endif
