/* NEON, double. */
#include "compiler.h"
#if defined(__aarch64__)
#define BITS 64
#include "neon.h"
#include "kernels.inc.h"
#endif
