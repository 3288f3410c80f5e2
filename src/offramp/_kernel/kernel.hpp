// What the door, the geometry and the instruction sets share: raw buffers; no torch, no Python.
//
// The structures that Python fills in (native.py, field by field, so that the order is part of the interface) say once
// what a program does. What a mask changes lies in Level and Region alone, where settle() puts it.
//
// Activations lie in framed NHWC buffers whose frame is zero, of what an instruction set stores (Real: float or bfloat16).
// A place is y << 16 | x, counted from 0 inside the frame; a Plane says where a view's place (0, 0) is.
#pragma once
#include <stdint.h>

// Whether the compiler knows products of bfloat16.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define HAS_BF16 1
#endif

// Whether it knows tiles of it too. OFFRAMP_EMULATE_TILES: their instructions are emulated, for tests (tiles.hpp).
#if HAS_BF16 && OFFRAMP_EMULATE_TILES
#define HAS_TILES 1
#elif HAS_BF16 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#define HAS_TILES 1
#endif
#endif

namespace offramp {

constexpr int WINDOW = 3;        // interpolation looks that far: a 7x7 window
constexpr int SQUARES = 2 * WINDOW * WINDOW + 1;
constexpr int RAW_STEP = 16;     // rows of the raw copy are padded to whole vectors of the widest set

enum Kind { CONV, DEPTHWISE, SUM, POOL };

// What only grows. `room` and `count` are of T.
template <class T>
struct List {
    T* at;
    int64_t count, room;
};

struct Window {
    int32_t kernel[2], stride[2], padding[2], dilation[2];
};

// Where each place of one axis of a resized map reads: first and second, and the second's part; null: nearest.
struct Axis {
    const int32_t *first, *second;
    const float* part;
};

struct Level {
    int32_t height, width;
    List<uint8_t> on;            // (height, width): active
    List<uint32_t> active;       // places, row by row
    List<int32_t> rows;          // (height + 1): where each row begins in `active`
    List<uint8_t> wanted;        // (height, width): interpolated for some region
    List<uint32_t> halo;         // these places, row by row
    List<int32_t> number;        // (height + 6, width + 6): of an active place in `active`; -2 - that of a wanted one
                                 // in `halo`; else -1
    List<int32_t> start;         // (wanted + 1) into source and excess
    List<int32_t> source;        // numbers of active places, the nearest first
    List<uint8_t> excess;        // their squared distance, less that of the nearest
    List<uint8_t> saves;         // (active + 1): whether some wanted place is interpolated from it
};

struct Read {
    int32_t level, region;       // of the operation's output; region -1: its active places alone
    int32_t resized, unused;
    Window window;
    Axis rows, columns;
};

struct Region {
    Level* level;
    const Read* reads;
    int32_t num_reads, interpolates;  // whether convolutions write maps of this region
    List<uint8_t> all;           // (height, width)
    List<uint32_t> halo;         // the places of it that are not active, row by row
    List<int32_t> rows;          // (height + 1): where each row begins in `halo`
};

struct Plane {
    void* at;                    // Real: place (0, 0), the view's first channel; null: none
    int64_t row, step;           // values from row to row, from place to place
};

struct Conv {
    Plane source, out, residual;
    const float *weight, *scale, *shift, *bare;  // weight: packed; depthwise (taps, channels filled up)
    const int64_t* jump;         // (runs) where each contiguous read of a place begins, counted from its first tap
    int32_t runs, run;           // and how many values it has; depthwise: runs are taps
    int32_t inputs, outputs;     // of one group
    int32_t groups, relu;
    int32_t stride[2], padding[2];
    int32_t reach, unused;       // the largest excess whose weight counts
    float falloff[SQUARES + 1];  // the weight by excess
};

struct Term {
    Plane source;
    Axis rows, columns;          // first null: the places of the output
};

struct Sum {
    Plane out;
    const Term* terms;
    const float *scale, *shift;  // null: none
    int32_t count, channels, relu, unused;
};

struct Pool {
    Plane source, out;
    Window window;
    int32_t height, width, channels, mean, counts_padding, unused;  // sizes: the source's
};

// A map of floats, place by place without a gap, brought to another size bilinearly.
struct Enlarging {
    const float* from;
    float* to;
    Axis rows, columns;
    int64_t width, channels, height_to, width_to;
};

// Logits place by place without a gap; a byte of `out` a place; `within` those that are looked at, null: all.
struct Judging {
    const float* logits;
    const uint8_t* within;
    uint8_t* out;
    int64_t places, channels;
    float threshold, slack;
};

struct Op {
    int32_t kind, raw;           // which of the plan's raw copies it works with
    int32_t rows[2];             // of the output that it works out: from the first to before the second
    const void* body;
    const Region* region;        // of the output
    const int32_t* needs;        // operations that must be done before, counted from the plan's first
    int64_t num_needs;
};

// One operation's two phases, each alone on a cache line while threads count them down.
struct Phase {
    int64_t first, tasks, done, unused[5];
};

struct Plan {
    Level* levels;
    Region* regions;
    Op* ops;
    int64_t num_levels, num_regions, num_ops, num_raws;
    List<float>* raws;           // by Op::raw: what convolutions gave before they were finished, a row an active place
    Phase* phases;               // two an operation
    List<uint8_t> scratch;
    List<int32_t> spans;
    int32_t isa, excess;         // the largest excess that any convolution counts
};

// One instruction set. `most` vectors of channels stand in registers at a time; a `step` of them is the rule. A product
// takes `pair` values at a time, 32 bits of them: a float, or two of bfloat16.
struct Path {
    const char* name;
    int lanes, most, step, pair;
    int64_t (*tasks)(const Op&, int phase);
    void (*task)(const Op&, int phase, int64_t task, void* raw);
    void (*enlarge)(const Enlarging&, int64_t row, float* between);
    void (*judge)(const Judging&, int64_t first, int64_t last);
};

static inline int vectors_of(int channels, int lanes) { return (channels + lanes - 1) / lanes; }
static inline int next_block(int left, int most, int step) { return left <= most ? left : step; }
static inline int64_t row_of(uint32_t place) { return place >> 16; }
static inline int64_t column_of(uint32_t place) { return place & 0xffff; }
static inline int32_t& number_at(const Level& level, uint32_t place) {
    return level.number.at[(row_of(place) + WINDOW) * (level.width + 2 * WINDOW) + column_of(place) + WINDOW];
}
static inline int64_t raw_row(const Conv& c) {
    return ((int64_t)c.groups * c.outputs + RAW_STEP - 1) / RAW_STEP * RAW_STEP;
}
// Part of a list, from `first` on.
struct Slice {
    int64_t first, count;
};
static inline Slice slice_of(const List<int32_t>& rows, const Op& op) {
    return {rows.at[op.rows[0]], (int64_t)rows.at[op.rows[1]] - rows.at[op.rows[0]]};
}
static inline Slice active_of(const Op& op) { return slice_of(op.region->level->rows, op); }
static inline Slice halo_of(const Op& op) { return slice_of(op.region->rows, op); }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How many of the last output channels are dot products along a run, for a vector of channels would hold few of them:
// 18 channels are one vector of 16 and two dot products, not two vectors. units: of 32 bits in a run.
static inline int dots_of(int outputs, int units, int lanes) {
    const int last = outputs % lanes;
    return last <= lanes / 4 && 3 * last * vectors_of(units, lanes) < units ? last : 0;
}

constexpr int64_t WEIGHTS_IN_CACHE = 1 << 18;  // of 32 bits: beyond 1 MB one block of channels is done for all places first

bool settle(Plan& plan, const uint8_t* mask, int32_t height, int32_t width);
bool give_room(void** at, int64_t* room, int64_t count, int64_t size);
template <class T>
static inline bool room(List<T>& list, int64_t count) {
    return give_room(reinterpret_cast<void**>(&list.at), &list.room, count, sizeof(T));
}

extern const Path portable;
#if defined(__x86_64__)
extern const Path avx2;
extern const Path avx512;
#if HAS_BF16
extern const Path avx512_bf16;
#endif
#if HAS_TILES
extern const Path amx_bf16;
#endif
#endif

// By number, whether or not this machine runs it; null: not compiled.
const Path* path(int isa);
bool proves(int isa, int known);

void pack(const Path& set, const float* weight, int inputs, int outputs, int taps, int run, uint32_t* packed);

}  // namespace offramp
