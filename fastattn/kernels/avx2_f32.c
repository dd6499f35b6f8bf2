/* AVX2, float. */
#include "compiler.h"
#if defined(__x86_64__)
#define BITS 32
#include "avx2.h"
#include "kernels.inc.h"
TARGET_END
#endif
