// The plain C interface: which instruction set, where a mask works, weights packed, one convolution over all threads.
#include "kernel.hpp"

#include <math.h>

#include <atomic>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace offramp {
namespace {

const Path* path(int isa) {
#if defined(__x86_64__)
    if (isa == 2) return &avx512;
    if (isa == 1) return &avx2;
#endif
    return isa == 0 ? &portable : nullptr;
}

bool runs(int isa) {
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 2) return has_avx2 && __builtin_cpu_supports("avx512f");
    if (isa == 1) return has_avx2;
#endif
    return isa == 0;
}

// GOMP_parallel of the libgomp that torch runs on.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

// Tiny weights and products are rounded to 0 for the time of a call: numbers below 1e-38 cost a hundred times as much.
class Flushed {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();

public:
    Flushed() { _mm_setcsr(before | 0x8040); }
    ~Flushed() { _mm_setcsr(before); }
#endif
};

struct Share {
    const Job* job;
    void (*one)(const Job&, int64_t);
    int64_t tasks;
    std::atomic<int64_t> next;
};

void work(void* given) {
    Share& share = *static_cast<Share*>(given);
    const Flushed flushed;
    for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.tasks;)
        share.one(*share.job, task);
}

void share_out(const Job& job, void (*one)(const Job&, int64_t), int64_t tasks) {
    Share share{&job, one, tasks, {0}};
    const int64_t threads = job.conv.threads < tasks ? job.conv.threads : tasks;
    if (parallel && threads > 1) parallel(work, &share, (unsigned)threads, 0);
    else work(&share);
}

constexpr int FRAME = WINDOW;  // of the map of places
constexpr int32_t SETTLED = -2, ACTIVE = -1;

struct Offset {
    int8_t dy, dx, square;
};

// The window without its centre, nearest first.
int offsets(Offset* to) {
    int count = 0;
    for (int square = 1; square < SQUARES; ++square)
        for (int dy = -WINDOW; dy <= WINDOW; ++dy)
            for (int dx = -WINDOW; dx <= WINDOW; ++dx)
                if (dy * dy + dx * dx == square) to[count++] = {(int8_t)dy, (int8_t)dx, (int8_t)square};
    return count;
}

}  // namespace
}  // namespace offramp

using namespace offramp;

// Changes with the interface; the door does not talk to a library of another one.
API int64_t offramp_interface() { return 1000 * 1 + (int64_t)sizeof(Conv); }

API const char* offramp_isa(int isa) { return path(isa) && runs(isa) ? path(isa)->name : nullptr; }

API void offramp_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

API int offramp_can_share() { return parallel != nullptr; }

// Active places and those next to one (3x3). map: (H + 6) * (W + 6); active, halo: H * W at most; counts: 2.
API void offramp_places(const uint8_t* mask, int32_t height, int32_t width, int32_t* map, int32_t* active,
                        int32_t* halo, int64_t* counts) {
    const int64_t wide = width + 2 * FRAME;
    for (int64_t i = 0; i < (height + 2 * FRAME) * wide; ++i) map[i] = SETTLED;
    for (int32_t y = 0; y < height; ++y)
        for (int32_t x = 0; x < width; ++x)
            if (mask[(int64_t)y * width + x]) map[(y + FRAME) * wide + x + FRAME] = ACTIVE;
    int64_t num_active = 0, num_halo = 0;
    for (int32_t y = 0; y < height; ++y)
        for (int32_t x = 0; x < width; ++x) {
            const int32_t* at = map + (y + FRAME) * wide + x + FRAME;
            const int32_t place = (y + 1) * (width + 2) + x + 1;
            bool touches = false;
            for (int64_t dy = -wide; dy <= wide; dy += wide)
                touches |= (at[dy - 1] == ACTIVE) | (at[dy] == ACTIVE) | (at[dy + 1] == ACTIVE);
            active[num_active] = place;  // written always and counted where true: a branch would often be guessed wrong
            num_active += *at == ACTIVE;
            halo[num_halo] = place;
            num_halo += touches & (*at != ACTIVE);
        }
    counts[0] = num_active;
    counts[1] = num_halo;
}

// What each halo place is interpolated from. start: num_halo + 1; source, square: 48 * num_halo at most; slot:
// num_active; counts: pairs, rows of the raw copy. `map` is the one that offramp_places left.
API void offramp_neighbours(int32_t width, int32_t* map, const int32_t* active, int64_t num_active, const int32_t* halo,
                            int64_t num_halo, int32_t* slot, int32_t* start, int32_t* source, uint8_t* square,
                            int64_t* counts) {
    Offset window[SQUARES * SQUARES];
    const int around = offsets(window);
    const int64_t wide = width + 2 * FRAME;
    const auto in_map = [&](int32_t place) {
        return map + (place / (width + 2) - 1 + FRAME) * wide + place % (width + 2) - 1 + FRAME;
    };
    int32_t pairs = 0, slots = 0;
    for (int64_t h = 0; h < num_halo; ++h) {
        start[h] = pairs;
        int32_t* at = in_map(halo[h]);
        for (int i = 0; i < around; ++i) {
            int32_t& there = at[window[i].dy * wide + window[i].dx];
            if (there == ACTIVE) there = slots++;
            source[pairs] = there;
            square[pairs] = (uint8_t)window[i].square;
            pairs += there != SETTLED;
        }
    }
    start[num_halo] = pairs;
    for (int64_t i = 0; i < num_active; ++i) slot[i] = *in_map(active[i]);  // ACTIVE is the -1 of "no row"
    counts[0] = pairs;
    counts[1] = slots;
}

API int64_t offramp_packed_floats(int isa, int32_t inputs, int32_t outputs, int32_t kernel) {
    const int lanes = path(isa)->lanes;
    return (int64_t)kernel * kernel * inputs * vectors_of(outputs, lanes) * lanes;
}

// weight: (outputs, inputs, kernel, kernel), as torch has it -> blocks of [tap row][tap column, input][channel], whose
// last vector is filled up with zeros.
API void offramp_pack(int isa, const float* weight, int32_t inputs, int32_t outputs, int32_t kernel, float* packed) {
    const Path& set = *path(isa);
    const int64_t taps = (int64_t)kernel * kernel, row = (int64_t)kernel * inputs;
    int64_t channel = 0, last = 0;
    for (int left = vectors_of(outputs, set.lanes); left > 0; channel = last) {
        const int vectors = next_block(left, set.most, set.step);
        last = channel + vectors * set.lanes;
        for (int64_t tap = 0; tap < kernel * row; ++tap)
            for (int64_t o = channel; o < last; ++o)
                *packed++ = o < outputs ? weight[(o * inputs + tap % inputs) * taps + tap / inputs] : 0;
        left -= vectors;
    }
}

API void offramp_conv(const Conv* conv) {
    Job job{*conv, {}, {}};
    const double square = (double)conv->sharpness * conv->sharpness;
    // Relative to the nearest place, so that a sharp kernel never comes to 0 / 0.
    for (int nearest = 1; nearest <= 2; ++nearest)
        for (int far = nearest; far < SQUARES; ++far) {
            const float weight = job.weight[nearest - 1][far] = (float)exp(-square * (far - nearest));
            if (weight >= conv->cutoff) job.reach[nearest - 1] = far;
        }
    const Path& set = *path(conv->isa);
    share_out(job, set.active, set.tasks(*conv));
    share_out(job, set.halo, (conv->num_halo + HALO_CHUNK - 1) / HALO_CHUNK);
}
