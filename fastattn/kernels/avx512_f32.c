/* AVX-512, float; and what AVX512-BF16 and AMX do otherwise. */
#include "compiler.h"
#if defined(__x86_64__)
#define BITS 32
#include "avx512.h"
#include "kernels.inc.h"
TARGET_END
#if COMPILES_AVX512_BF16
TARGET_BEGIN(AVX512 ",avx512bf16" AMX)
#include "dot_bf16.inc.h"
TARGET_END
#endif
#endif
