/* Every CPU, double. */
#include "compiler.h"
#define BITS 64
#include "baseline.h"
#include "kernels.inc.h"
