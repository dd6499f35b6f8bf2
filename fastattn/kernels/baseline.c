/* What every CPU of the target runs: vectors of 16 bytes (SSE2 on x86-64, NEON on AArch64, emulated elsewhere). */
#include "compiler.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define ISA baseline
#define VECTOR_BYTES 16
#define ROWS 6
#define FEW_ROWS 2
#define PLACE_ROWS 2
#define STEPS 1
#define CHUNK 32
#if defined(__aarch64__) /* 32 registers */
#define VECS 4
#else
#define VECS 2
#endif

#if defined(__SSE2__)
#define HAS_MAX
static ALWAYS_INLINE __m128 max_f32(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
static ALWAYS_INLINE __m128d max_f64(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
#define HAS_MIN
static ALWAYS_INLINE __m128 min_f32(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
static ALWAYS_INLINE __m128d min_f64(__m128d a, __m128d b) { return _mm_min_pd(a, b); }
#endif

#include "instantiate.inc.h"
