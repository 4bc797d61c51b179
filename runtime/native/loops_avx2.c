#define LOOPS loops_avx2
#include "loops_all.h"
