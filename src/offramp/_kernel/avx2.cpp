// 16 registers of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernel.hpp"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define PLACES(vectors) ((vectors) == 1 ? 10 : (vectors) == 2 ? 6 : 4)
#define MOST 3
#define STEP 2
#define PATH avx2
#define NAME "avx2"
#include "body.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
