// 32 registers of 16 floats, each the sum of products of two values of bfloat16.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel.hpp"
#if HAS_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in its own header, of what is undefined on purpose
#endif
#define LANES 16
#define BF16 1
#define PLACES(vectors) ((vectors) == 1 ? 12 : (vectors) == 2 ? 12 : (vectors) == 3 ? 8 : 6)
#define MOST 4
#define STEP 3
#define PATH avx512_bf16
#define NAME "avx512_bf16"
#include "body.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
