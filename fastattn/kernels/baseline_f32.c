/* Every CPU, float. */
#include "compiler.h"
#define BITS 32
#include "baseline.h"
#include "kernels.inc.h"
