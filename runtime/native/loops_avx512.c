#define LOOPS loops_avx512
#include "loops_all.h"
