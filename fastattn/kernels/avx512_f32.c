/* AVX-512, float. */
#include "compiler.h"
#if defined(__x86_64__)
#define BITS 32
#include "avx512.h"
#include "kernels.inc.h"
TARGET_END
#endif
