/* AVX2, double. */
#include "compiler.h"
#if defined(__x86_64__)
#define BITS 64
#include "avx2.h"
#include "kernels.inc.h"
TARGET_END
#endif
