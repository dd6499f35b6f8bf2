/* NEON, float. */
#include "compiler.h"
#if defined(__aarch64__)
#define BITS 32
#include "neon.h"
#include "kernels.inc.h"
#endif
