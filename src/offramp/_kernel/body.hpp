// What each instruction set compiles for itself; it says LANES, PLACES(vectors), MOST, STEP, PATH and NAME before,
// BF16 where its maps hold bfloat16, and TILES where its dense products go through tiles.
//
// Everything has internal linkage and nothing comes from the standard library: a function shared between the sets could
// be taken by the linker from the wrong one.
namespace offramp {
namespace {

// Places of a task: a multiple of every number of places that a block takes.
#if TILES
constexpr int CHUNK = 128;
#else
constexpr int CHUNK = 120;
#endif

#include "vector.hpp"
#include "conv.hpp"
#include "sum.hpp"
#include "sure.hpp"

// A convolution's second phase is its halo, which reads what the first one saved; all else has one phase.
int64_t tasks(const Op& op, int phase) {
    const auto chunks = [](int64_t places) { return (places + CHUNK - 1) / CHUNK; };
    if (op.kind == SUM || op.kind == POOL) return phase ? 0 : chunks(places_of(op));
    if (phase) return chunks(halo_of(op).count);
    const int64_t count = chunks(active_of(op).count);
    return op.kind == CONV ? count * parts_of(*static_cast<const Conv*>(op.body), count) : count;
}

void task(const Op& op, int phase, int64_t number, void* saved) {
    Real* raw = static_cast<Real*>(saved);
    if (phase) halo(op, number, raw);
    else if (op.kind == CONV) convolve(op, number, raw);
    else if (op.kind == DEPTHWISE) depthwise(op, number, raw);
    else if (op.kind == SUM) add_up(op, number);
    else pool(op, number);
}

}  // namespace

extern const Path PATH;
const Path PATH = {NAME, LANES, MOST, STEP, PAIR, tasks, task, enlarge, judge};

}  // namespace offramp
