// What the door, the geometry and the three instruction sets share: raw buffers; no torch, no Python, no heap.
//
// Activations lie in framed NHWC buffers (H + 2, W + 2, C) of float whose frame is zero; a place is the index of its
// pixel in the frame, y * (W + 2) + x with y and x counted from 1. The indices fit 32 bits.
#pragma once
#include <stdint.h>

namespace offramp {

constexpr int WINDOW = 3;        // interpolation looks that far: a 7x7 window
constexpr int SQUARES = 2 * WINDOW * WINDOW + 1;
constexpr int RAW_STEP = 16;     // rows of the raw copy are padded to whole vectors of the widest set

// One masked convolution. The door fills it in field by field (ctypes), so that the order is part of the interface.
struct Conv {
    const float* input;          // framed, channels `inputs`
    float* output;               // framed, channels `outputs`
    const float* weight;         // packed by offramp_pack for the same instruction set
    const float* scale;          // (outputs) or null: 1
    const float* shift;          // (outputs) or null: 0
    const float* residual;       // framed like the output, or null; may be the output
    float* raw;                  // (slots, outputs rounded up to RAW_STEP)
    const int32_t* active;       // (num_active) places of the output
    const int32_t* slot;         // (num_active) row of `raw` that a halo reads this place from, or -1
    const int32_t* halo;         // (num_halo) places of the output
    const int32_t* start;        // (num_halo + 1) into source and square
    const int32_t* source;       // rows of `raw`, nearest first
    const uint8_t* square;       // their squared distances
    int64_t num_active, num_halo;
    int32_t input_width, output_width;  // of the frames: W + 2
    int32_t inputs, outputs, kernel, stride, relu, isa, threads;
    float sharpness, cutoff;     // lambda of the papers; weights below cutoff times the nearest one's are left out
};

// What one call works out for all its threads.
struct Job {
    Conv conv;
    float weight[2][SQUARES];    // by the nearest place's squared distance, 1 or 2, and the place's own
    int reach[2];                // the largest squared distance whose weight counts
};

// One instruction set. `most` vectors of channels stand in registers at a time; a `step` of them is the rule.
struct Path {
    const char* name;
    int lanes, most, step;
    int64_t (*tasks)(const Conv&);
    void (*active)(const Job&, int64_t task);
    void (*halo)(const Job&, int64_t task);
};

static inline int vectors_of(int channels, int lanes) { return (channels + lanes - 1) / lanes; }
static inline int next_block(int left, int most, int step) { return left <= most ? left : step; }

constexpr int HALO_CHUNK = 128;
constexpr int64_t WEIGHTS_IN_CACHE = 1 << 18;  // floats: beyond 1 MB one block of channels is done for all places first

extern const Path portable;
#if defined(__x86_64__)
extern const Path avx2;
extern const Path avx512;
#endif

}  // namespace offramp
