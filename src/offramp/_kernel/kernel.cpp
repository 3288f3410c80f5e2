// The plain C interface: which instruction set, weights packed, and a program's operations over all threads.
#include "kernel.hpp"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <initializer_list>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace offramp {

const Path* path(int isa) {
#if defined(__x86_64__)
#if HAS_TILES
    if (isa == 4) return &amx_bf16;
#endif
#if HAS_BF16
    if (isa == 3) return &avx512_bf16;
#endif
    if (isa == 2) return &avx512;
    if (isa == 1) return &avx2;
#endif
    return isa == 0 ? &portable : nullptr;
}

// weight: (outputs, inputs, taps), as torch has it, rounded to what the set stores -> blocks of [run, unit][channel],
// whose last vector is filled up with zeros; then those of dot products: [run][channel][unit, filled up with zeros].
// run: how many of [tap, input] lie side by side in the input; each has units of 32 bits, the last filled up with zeros.
void pack(const Path& set, const float* weight, int inputs, int outputs, int taps, int run, uint32_t* packed) {
    const int64_t all = (int64_t)taps * inputs, units = vectors_of(run, set.pair);
    const int64_t dots = dots_of(outputs, (int)units, set.lanes);
    const auto bits = [&](int64_t o, int64_t first, int64_t k) {
        uint32_t found = 0;
        const int64_t tap = first + k;
        if (o < outputs && k < run) memcpy(&found, weight + (o * inputs + tap % inputs) * taps + tap / inputs, 4);
        return found;
    };
    const auto unit = [&](int64_t o, int64_t first, int64_t u) {
        return set.pair == 1 ? bits(o, first, u) : bits(o, first, 2 * u) >> 16 | (bits(o, first, 2 * u + 1) & 0xffff0000);
    };
    int64_t channel = 0, last = 0;
    for (int left = vectors_of((int)(outputs - dots), set.lanes); left > 0; channel = last) {
        const int vectors = next_block(left, set.most, set.step);
        last = channel + vectors * set.lanes;
        for (int64_t first = 0; first < all; first += run)
            for (int64_t u = 0; u < units; ++u)
                for (int64_t o = channel; o < last; ++o) *packed++ = unit(o, first, u);
        left -= vectors;
    }
    const int64_t filled = (int64_t)vectors_of((int)units, set.lanes) * set.lanes;
    for (int64_t first = 0; first < all; first += run)
        for (int64_t o = outputs - dots; o < outputs; ++o)
            for (int64_t u = 0; u < filled; ++u) *packed++ = u < units ? unit(o, first, u) : 0;
}

namespace {

#if HAS_TILES
// Whether this machine has tiles, and this process may use them: under Linux it must ask.
bool has_tiles() {
#if OFFRAMP_EMULATE_TILES
    return true;
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, tiles' data
#endif
}
#endif

bool runs(int isa) {
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f");
#if HAS_TILES
    if (isa == 4) return runs(3) && has_tiles();
#endif
    if (isa == 3) {  // what __builtin_cpu_supports calls it, older compilers do not know
        unsigned a = 0, b = 0, c = 0, d = 0;
        return has_avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
    }
    if (isa == 2) return has_avx512;
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

int64_t now_ns() {
    timespec now;
#if defined(__APPLE__)
    clock_gettime(CLOCK_UPTIME_RAW, &now);  // what time.monotonic_ns() reads
#else
    clock_gettime(CLOCK_MONOTONIC, &now);
#endif
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void rest() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Tasks are handed out in the order of the phases: one that waits, waits only for tasks that some thread has in hand.
struct Share {
    const Plan* plan;
    const Path* set;
    int64_t first, last;         // operations
    int64_t total;               // tasks
    const int32_t* stop;
    int64_t deadline_ns;
    std::atomic<int64_t> next;
    std::atomic<bool> given_up;
};

bool done(const Phase& phase) { return __atomic_load_n(&phase.done, __ATOMIC_ACQUIRE) >= phase.tasks; }

bool over(Share& share) {
    if (share.given_up.load(std::memory_order_relaxed)) return true;
    if (!(share.stop && __atomic_load_n(share.stop, __ATOMIC_RELAXED)) &&
        !(share.deadline_ns && now_ns() >= share.deadline_ns)) return false;
    share.given_up.store(true, std::memory_order_relaxed);
    return true;
}

// Whether `phase` was done before the call was given up.
bool await(const Share& share, const Phase& phase) {
    for (int spins = 0; !done(phase); ++spins) {
        if (share.given_up.load(std::memory_order_relaxed)) return false;
        if (spins < 4000) rest();
        else sched_yield();
    }
    return true;
}

bool ready(const Share& share, int64_t phase) {
    const Phase* phases = share.plan->phases;
    if (phase % 2) return await(share, phases[phase - 1]);
    const Op& op = share.plan->ops[phase / 2];
    for (int64_t i = 0; i < op.num_needs; ++i)
        for (int64_t before = 2 * (int64_t)op.needs[i]; before <= 2 * (int64_t)op.needs[i] + 1; ++before)
            if (!await(share, phases[before])) return false;
    return true;
}

void work(void* given) {
    Share& share = *static_cast<Share*>(given);
    const Flushed flushed;
    Phase* phases = share.plan->phases;
    int64_t phase = 2 * share.first, is_ready = -1;
    while (!over(share)) {
        const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= share.total) return;
        while (task >= phases[phase].first + phases[phase].tasks) ++phase;
        if (phase != is_ready && !ready(share, phase)) return;
        is_ready = phase;
        const Op& op = share.plan->ops[phase / 2];
        float* raw = op.raw < 0 || !op.region->halo.count ? nullptr : share.plan->raws[op.raw].at;
        share.set->task(op, phase % 2, task - phases[phase].first, raw);
        __atomic_fetch_add(&phases[phase].done, 1, __ATOMIC_RELEASE);
    }
}

void give(float from, float& to) { to = from; }
void give(uint16_t from, uint16_t& to) { to = from; }
void give(uint16_t from, float& to) {
    const uint32_t bits = (uint32_t)from << 16;
    memcpy(&to, &bits, 4);
}
void give(float from, uint16_t& to) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &from, 4);
    to = (uint16_t)(from != from ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int64_t ROWS = 8;      // of a resized map at a time
constexpr int64_t PLACES = 512;  // that are written or judged at a time

struct Rows {
    const Enlarging* map;
    const Path* set;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
};

void enlarge_rows(void* given) {
    Rows& rows = *static_cast<Rows*>(given);
    const Enlarging& map = *rows.map;
    float* between = static_cast<float*>(malloc((size_t)(map.width * map.channels) * sizeof(float)));
    if (!between) rows.failed.store(true, std::memory_order_relaxed);
    for (int64_t y; between && (y = rows.next.fetch_add(ROWS, std::memory_order_relaxed)) < map.height_to;)
        for (int64_t last = least(y + ROWS, map.height_to); y < last; ++y) rows.set->enlarge(map, y, between);
    free(between);
}

struct Places {
    const Judging* judged;
    const Path* set;
    std::atomic<int64_t> next;
};

void judge_some(void* given) {
    Places& p = *static_cast<Places*>(given);
    for (int64_t i; (i = p.next.fetch_add(PLACES, std::memory_order_relaxed)) < p.judged->places;)
        p.set->judge(*p.judged, i, least(i + PLACES, p.judged->places));
}

template <class From, class To>
void read_active(const Level& level, const Plane& from, int64_t channels, To* to, int64_t channel_step,
                 int64_t row_step, int64_t step) {
    for (int64_t i = 0; i < level.active.count; ++i) {
        const int64_t y = row_of(level.active.at[i]), x = column_of(level.active.at[i]);
        const From* here = static_cast<const From*>(from.at) + y * from.row + x * from.step;
        To* there = to + y * row_step + x * step;
        for (int64_t c = 0; c < channels; ++c) give(here[c], there[c * channel_step]);
    }
}

// A map from outside, (channels, height, width) to any strides (in values), of float (pair 1) or bfloat16.
struct Writing {
    const Region* region;
    Plane to;
    const void* from;
    int64_t channels, channel_step, row_step, step;
    int32_t pair, stored_pair;
    std::atomic<int64_t> next;
};

template <class From, class To>
void write_place(const Writing& w, uint32_t place) {
    const int64_t y = row_of(place), x = column_of(place);
    const From* from = static_cast<const From*>(w.from) + y * w.row_step + x * w.step;
    To* to = static_cast<To*>(w.to.at) + y * w.to.row + x * w.to.step;
    if (sizeof(From) == sizeof(To) && w.channel_step == 1) memcpy(to, from, (size_t)w.channels * sizeof(To));
    else for (int64_t c = 0; c < w.channels; ++c) give(from[c * w.channel_step], to[c]);
}

void write_some(void* given) {
    Writing& w = *static_cast<Writing*>(given);
    const List<uint32_t>&active = w.region->level->active, &halo = w.region->halo;
    const int64_t all = active.count + halo.count;
    for (int64_t i; (i = w.next.fetch_add(PLACES, std::memory_order_relaxed)) < all;)
        for (const int64_t last = least(i + PLACES, all); i < last; ++i) {
            const uint32_t place = i < active.count ? active.at[i] : halo.at[i - active.count];
            if (w.pair == 1 && w.stored_pair == 1) write_place<float, float>(w, place);
            else if (w.pair == 1) write_place<float, uint16_t>(w, place);
            else if (w.stored_pair == 1) write_place<uint16_t, float>(w, place);
            else write_place<uint16_t, uint16_t>(w, place);
        }
}

template <class From>
void read_active(const Level& level, const Plane& from, int64_t channels, void* to, int64_t channel_step,
                 int64_t row_step, int64_t step, int pair) {
    if (pair == 2) read_active<From>(level, from, channels, static_cast<uint16_t*>(to), channel_step, row_step, step);
    else read_active<From>(level, from, channels, static_cast<float*>(to), channel_step, row_step, step);
}

}  // namespace
}  // namespace offramp

using namespace offramp;

// Changes with the interface; the door does not talk to a library of another one.
API int64_t offramp_interface() {
    return 1000000 * 9 + (int64_t)(sizeof(Level) + sizeof(Region) + sizeof(Read) + sizeof(Conv) + sizeof(Term) +
                                   sizeof(Sum) + sizeof(Pool) + sizeof(Enlarging) + sizeof(Judging) + sizeof(Op) + sizeof(Plan));
}

API const char* offramp_isa(int isa) { return path(isa) && runs(isa) ? path(isa)->name : nullptr; }

// Whether a set that runs here gives, once a process, what the one before it does.
API int offramp_proves(int isa) {
#if HAS_TILES
    static const bool tiles = proves(4, 3);
    return isa != 4 || tiles;
#else
    return isa != 4;
#endif
}

API void offramp_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }

API int offramp_can_share() { return parallel != nullptr; }

API int offramp_pair(int isa) { return path(isa)->pair; }

// Of 32 bits.
API int64_t offramp_packed_units(int isa, int32_t inputs, int32_t outputs, int32_t taps, int32_t run) {
    const Path& set = *path(isa);
    const int units = vectors_of(run, set.pair), dots = dots_of(outputs, units, set.lanes);
    const int64_t per_run = (int64_t)units * vectors_of(outputs - dots, set.lanes) + dots * vectors_of(units, set.lanes);
    return (int64_t)taps * inputs / run * per_run * set.lanes;
}

// See pack().
API void offramp_pack(int isa, const float* weight, int32_t inputs, int32_t outputs, int32_t taps, int32_t run,
                      uint32_t* packed) {
    pack(*path(isa), weight, inputs, outputs, taps, run, packed);
}

// mask: (height, width). 0 where there is no memory for what it says.
API int offramp_settle(Plan* plan, const uint8_t* mask, int32_t height, int32_t width) {
    return settle(*plan, mask, height, width);
}

// Runs operations first to last - 1; how many were done before `stop` was set (null: never) or the deadline came (0:
// none). An operation starts when those that it needs are done, not when all before it are.
API int64_t offramp_run(Plan* plan, int64_t first, int64_t last, int32_t threads, const int32_t* stop,
                        int64_t deadline_ns) {
    Share share{plan, path(plan->isa), first, last, 0, stop, deadline_ns, {0}, {false}};
    Phase* phases = plan->phases;
    for (int64_t i = 2 * first; i < 2 * last; ++i) {
        phases[i].first = share.total;
        phases[i].done = 0;
        share.total += phases[i].tasks = share.set->tasks(plan->ops[i / 2], i % 2);
    }
    const int64_t most = least(threads, share.total);
    if (parallel && most > 1) parallel(work, &share, (unsigned)most, 0);
    else work(&share);
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) count += done(phases[2 * i]) && done(phases[2 * i + 1]);
    return count;
}

// What a view holds at a level's active places, to any strides (in values), in float (pair 1) or bfloat16 (pair 2).
API void offramp_read_active(int isa, const Level* level, const Plane* from, int64_t channels, void* to,
                             int64_t channel_step, int64_t row_step, int64_t step, int pair) {
    if (path(isa)->pair == 2)
        read_active<uint16_t>(*level, *from, channels, to, channel_step, row_step, step, pair);
    else read_active<float>(*level, *from, channels, to, channel_step, row_step, step, pair);
}

// Fills a view at its region's places, from a map of outside: see Writing.
API void offramp_write_region(int isa, const Region* region, const Plane* to, int64_t channels, const void* from,
                              int64_t channel_step, int64_t row_step, int64_t step, int pair, int32_t threads) {
    Writing w{region, *to, from, channels, channel_step, row_step, step, pair, path(isa)->pair, {0}};
    const int64_t most = least(threads, (region->level->active.count + region->halo.count + PLACES - 1) / PLACES);
    if (parallel && most > 1) parallel(write_some, &w, (unsigned)most, 0);
    else write_some(&w);
}

// 0 where there is no memory for a row.
API int offramp_enlarge(int isa, const Enlarging* map, int32_t threads) {
    Rows rows{map, path(isa), {0}, {false}};
    const int64_t most = least(threads, (map->height_to + ROWS - 1) / ROWS);
    if (parallel && most > 1) parallel(enlarge_rows, &rows, (unsigned)most, 0);
    else enlarge_rows(&rows);
    return !rows.failed.load();
}

// See judge().
API void offramp_judge(int isa, const Judging* judged, int32_t threads) {
    Places places{judged, path(isa), {0}};
    const int64_t most = least(threads, (judged->places + PLACES - 1) / PLACES);
    if (parallel && most > 1) parallel(judge_some, &places, (unsigned)most, 0);
    else judge_some(&places);
}

// Gives back what settle() took.
API void offramp_release(Plan* plan) {
    for (int64_t i = 0; i < plan->num_levels; ++i) {
        Level& l = plan->levels[i];
        for (void* at : {(void*)l.on.at, (void*)l.active.at, (void*)l.rows.at, (void*)l.wanted.at, (void*)l.halo.at, (void*)l.number.at,
                         (void*)l.start.at, (void*)l.source.at, (void*)l.excess.at, (void*)l.saves.at}) free(at);
    }
    for (int64_t i = 0; i < plan->num_regions; ++i) {
        Region& r = plan->regions[i];
        free(r.all.at);
        free(r.halo.at);
        free(r.rows.at);
    }
    for (int64_t i = 0; i < plan->num_raws; ++i) free(plan->raws[i].at);
    free(plan->scratch.at);
    free(plan->spans.at);
}
