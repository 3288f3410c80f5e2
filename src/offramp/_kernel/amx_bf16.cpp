// As avx512_bf16, but that dense products go through tiles. Proven in emulation; it has never run on hardware.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel.hpp"
#if HAS_TILES
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in its own header, of what is undefined on purpose
#endif
#define LANES 16
#define BF16 1
#define TILES 1
#define PLACES(vectors) 32
#define MOST 2
#define STEP 2
#define PATH amx_bf16
#define NAME "amx_bf16"
#include "body.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
