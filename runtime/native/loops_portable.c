#define LOOPS loops_portable
#include "loops_all.h"
