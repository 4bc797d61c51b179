#include "encode_affine.h"

ENCODE_AFFINE(encode_affine_avx512)
