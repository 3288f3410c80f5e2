// What every machine has: vectors of 4 floats (SSE2, NEON), or what the compiler makes of them.
#include "kernel.hpp"
#define LANES 4
#define PLACES(vectors) ((vectors) == 1 ? 10 : (vectors) == 2 ? 6 : 4)
#define MOST 3
#define STEP 2
#define PATH portable
#define NAME "portable"
#include "body.hpp"
