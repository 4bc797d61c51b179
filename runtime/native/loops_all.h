/* Included once by each loops_*.c, whose flags decide on the instruction set. */
#include "loops_attention.h"
#include "loops_delta.h"
#include "loops_heads.h"

const struct loops LOOPS = {
    .rms_norm = rms_norm,
    .scaled_norm = scaled_norm,
    .l2_norm = l2_norm,
    .map = map,
    .rotate = rotate,
    .largest = largest,
    .exponents = exponents,
    .convolve = convolve,
    .attend = attend,
    .merge = merge,
    .delta = delta,
    .decode_rows = decode_rows,
    .add_rows = add_rows,
    .dot_rows = dot_rows,
};
