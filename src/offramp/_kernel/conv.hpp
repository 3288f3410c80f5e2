// Convolutions at active places. See body.hpp.

// Folded batch norm, residual and ReLU of one vector of channels at one place.
inline void finish(const Conv& c, Real* out, const Real* residual, int count, V value) {
    if (residual) value += load_upto(residual, count);
    store_upto(out, c.relu ? relu(value) : value, count);
}

// Where the first tap of an output place lies in the input.
inline const Real* first_tap(const Conv& c, uint32_t place) {
    return static_cast<const Real*>(c.source.at) + (row_of(place) * c.stride[0] - c.padding[0]) * c.source.row +
           (column_of(place) * c.stride[1] - c.padding[1]) * c.source.step;
}

struct Chunk {
    const uint32_t* places;
    const uint8_t* saves;
    Real* raw;                   // of the first place; null: none is saved
    int64_t count, row;          // values from one place's raw copy to the next
};

inline Real* raw_of(const Chunk& chunk, int64_t number) {
    return chunk.raw && chunk.saves[number] ? chunk.raw + number * chunk.row : nullptr;
}

inline Chunk chunk_of(const Op& op, int64_t number, Real* raw, int64_t row) {
    const Slice here = active_of(op);
    const int64_t first = here.first + number * CHUNK;
    return {op.region->level->active.at + first, op.region->level->saves.at + first, raw ? raw + first * row : nullptr,
            least(CHUNK, here.count - number * CHUNK), row};
}

// Finishes B vectors of one place from channel `first` on, of which `left` channels are there.
template <int B>
inline void finish_all(const Conv& c, uint32_t place, Real* raw, int first, int left, const V* sum, const V* scale,
                       const V* shift) {
    Real* out = at(c.out, place) + first;
    const Real* residual = c.residual.at ? at(c.residual, place) + first : nullptr;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
        const int count = (int)least(LANES, left - b * LANES);
        if (raw) store_upto(raw + first + b * LANES, sum[b], count);
        finish(c, out + b * LANES, residual ? residual + b * LANES : nullptr, count, sum[b] * scale[b] + shift[b]);
    }
}

// One block of output channels: from `first` on, of which `left` are of this group, which reads inputs from `input` on.
struct Block {
    const float* weight;
    int first, left, input;
};

// Scale and shift of a block's vectors.
template <int B>
inline void finish_by(const Conv& c, const Block& of, V (&scale)[B], V (&shift)[B]) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
        const int count = (int)least(LANES, of.left - b * LANES);
        scale[b] = load_upto(c.scale + of.first + b * LANES, count);
        shift[b] = load_upto(c.shift + of.first + b * LANES, count);
    }
}

#if TILES
#include "tiles.hpp"
#else
template <int P, int B, class Value>
inline __attribute__((always_inline)) void multiply(V (&sum)[P][B], const float* weight, Value value) {
    V w[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) w[b] = load(weight + b * LANES);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
        const V x = value(p);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[p][b] = add_product(sum[p][b], w[b], x);
    }
}

// P places x B vectors of output channels in registers; each run of taps is one contiguous read.
template <int P, int B>
void block(const Conv& c, const Chunk& chunk, const Block& of, int64_t from, int valid) {
    const Real* tap[P];
    for (int p = 0; p < P; ++p) tap[p] = first_tap(c, chunk.places[from + (p < valid ? p : valid - 1)]) + of.input;
    V sum[P][B] = {};
    const float* weight = of.weight;
    int64_t before = 0;
    for (int r = 0; r < c.runs; ++r) {
        const int64_t jump = c.jump[r] - before;
        before = c.jump[r];
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) tap[p] += jump;
        for (int k = 0; k + PAIR <= c.run; k += PAIR, weight += B * LANES)
            multiply<P, B>(sum, weight, [&](int p) { return spread_pair(tap[p] + k); });
        if (c.run % PAIR) {
            multiply<P, B>(sum, weight, [&](int p) { return spread_last(tap[p] + c.run - 1); });
            weight += B * LANES;
        }
    }
    V scale[B], shift[B];
    finish_by(c, of, scale, shift);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
        if (p >= valid) break;
        finish_all<B>(c, chunk.places[from + p], raw_of(chunk, from + p), of.first, of.left, sum[p], scale, shift);
    }
}
#endif

// Asks for what the next places read and write: short runs are over before the machine's own prefetcher sees them. Of
// what is written `count` channels from `first` on: all at once would be more than a core waits for at a time.
inline void ahead(const Conv& c, const Chunk& chunk, int64_t from, int64_t until, int first, int64_t count) {
    for (int64_t i = from; i < until && i < chunk.count; ++i) {
        const uint32_t place = chunk.places[i];
        if (!first) {
            const bool runs_on = c.stride[1] == 1 && c.run > c.source.step && place == chunk.places[i - 1] + 1;
            const int64_t known = runs_on ? c.run - c.source.step : 0;
            const Real* tap = first_tap(c, place);
            for (int r = 0; r < c.runs; ++r) fetch(tap + c.jump[r] + known, c.run - known);
        }
        fetch(at(c.out, place) + first, count);
        if (c.residual.at) fetch(at(c.residual, place) + first, count);
    }
}

template <int P, int B>
void blocks(const Conv& c, const Chunk& chunk, const Block& of) {
    const int64_t count = least(B * LANES, of.left);
    for (int64_t from = 0; from < chunk.count; from += P) {
        ahead(c, chunk, from + P, from + 2 * P, of.first, count);
        block<P, B>(c, chunk, of, from, (int)least(P, chunk.count - from));
    }
}

void channels(const Conv& c, const Chunk& chunk, const Block& of, int vectors) {
    switch (vectors) {
        case 1: blocks<PLACES(1), 1>(c, chunk, of); break;
        case 2: blocks<PLACES(2), 2>(c, chunk, of); break;
#if MOST == 4
        case 4: blocks<PLACES(4), 4>(c, chunk, of); break;
#endif
#if MOST > 2
        default: blocks<PLACES(3), 3>(c, chunk, of);
#endif
    }
}

// P places x T channels, each a sum over vectors of the inputs of a run.
template <int P, int T>
void dot_block(const Conv& c, const Chunk& chunk, const Block& of, int64_t from, int valid) {
    const Real* tap[P];
    for (int p = 0; p < P; ++p) tap[p] = first_tap(c, chunk.places[from + (p < valid ? p : valid - 1)]) + of.input;
    V sum[P][T] = {};
    const int vectors = vectors_of(c.run, PAIR * LANES);
    const float* weight = of.weight;
    for (int r = 0; r < c.runs; ++r, weight += T * vectors * LANES)
        for (int v = 0, k = 0; v < vectors; ++v, k += PAIR * LANES) {
            V x[P];
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) x[p] = load_run(tap[p] + c.jump[r] + k, c.run - k);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const V w = load(weight + (t * vectors + v) * LANES);
#pragma GCC unroll 8
                for (int p = 0; p < P; ++p) sum[p][t] = add_product(sum[p][t], w, x[p]);
            }
        }
    const V scale = load_part(c.scale + of.first, T), shift = load_part(c.shift + of.first, T);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        if (p >= valid) break;
        V dot = {};
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) dot[t] = total(sum[p][t]);
        finish_all<1>(c, chunk.places[from + p], raw_of(chunk, from + p), of.first, T, &dot, &scale, &shift);
    }
}

template <int T>
void dots(const Conv& c, const Chunk& chunk, const Block& of) {
    for (int64_t from = 0; from < chunk.count; from += 4)
        dot_block<4, T>(c, chunk, of, from, (int)least(4, chunk.count - from));
}

inline int units_of(const Conv& c) { return vectors_of(c.run, PAIR); }  // of a run, 32 bits each

inline int few_of(const Conv& c) { return dots_of(c.outputs, units_of(c), LANES); }

constexpr int64_t MANY = 16;  // chunks, which busy some threads

// How many tasks share the output channels of one chunk of places: one where the weights stay in the cache. Else each
// block of them is used for all places, and these are read once a block; where one tap reads a place, that is more than
// all weights once a chunk.
inline int64_t parts_of(const Conv& c, int64_t chunks) {
    if ((int64_t)c.groups * c.runs * units_of(c) * c.outputs <= WEIGHTS_IN_CACHE) return 1;
    if (c.runs == 1 && c.run == c.inputs && chunks >= MANY) return 1;
    const int few = few_of(c);
    int64_t count = few > 0;
    for (int left = vectors_of(c.outputs - few, LANES); left > 0; left -= next_block(left, MOST, STEP)) ++count;
    return count * c.groups;
}

void convolve(const Op& op, int64_t task, Real* raw) {
    const Conv& c = *static_cast<const Conv*>(op.body);
    const int64_t chunks = (active_of(op).count + CHUNK - 1) / CHUNK, units = (int64_t)c.runs * units_of(c);
    const bool parted = parts_of(c, chunks) > 1;
    const int64_t only = parted ? task / chunks : -1;
    const Chunk chunk = chunk_of(op, parted ? task % chunks : task, raw, raw_row(c));
#if TILES
    const Tiles tiles(c);
#endif
    const int few = few_of(c);
    const float* weight = c.weight;
    int64_t number = 0;
    for (int group = 0; group < c.groups; ++group) {
        Block of{weight, group * c.outputs, c.outputs - few, group * c.inputs};
        for (int left = vectors_of(c.outputs - few, LANES); left > 0; ++number) {
            const int vectors = next_block(left, MOST, STEP);
            if (only < 0 || only == number) channels(c, chunk, of, vectors);
            of.weight += units * vectors * LANES;
            of.first += vectors * LANES;
            of.left -= vectors * LANES;
            left -= vectors;
        }
        if (few && (only < 0 || only == number)) {
            if (few == 1) dots<1>(c, chunk, of);
#if LANES > 4
            else if (few == 2) dots<2>(c, chunk, of);
#endif
#if LANES > 8
            else if (few == 3) dots<3>(c, chunk, of);
            else dots<4>(c, chunk, of);
#endif
        }
        number += few > 0;
        weight = of.weight + (int64_t)c.runs * few * vectors_of(c.run, PAIR * LANES) * LANES;
    }
}

// P places x one vector of channels, each of which sees itself alone. weight: (taps, channels rounded up to RAW_STEP).
template <int P>
inline void depthwise_block(const Conv& c, const Chunk& chunk, int64_t from, int first, int count) {
    const Real* tap[P];
    V sum[P] = {};
    for (int p = 0; p < P; ++p) tap[p] = first_tap(c, chunk.places[from + p]) + first;
    for (int r = 0; r < c.runs; ++r) {
        const V w = load(c.weight + r * chunk.row + first);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[p] += w * load_upto(tap[p] + c.jump[r], count);
    }
    const V scale = load_upto(c.scale + first, count), shift = load_upto(c.shift + first, count);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
        finish_all<1>(c, chunk.places[from + p], raw_of(chunk, from + p), first, count, &sum[p], &scale, &shift);
}

void depthwise(const Op& op, int64_t task, Real* raw) {
    const Conv& c = *static_cast<const Conv*>(op.body);
    const Chunk chunk = chunk_of(op, task, raw, raw_row(c));
    for (int first = 0; first < c.groups; first += LANES) {
        const int count = (int)least(LANES, c.groups - first);
        int64_t from = 0;
        for (; from + 6 <= chunk.count; from += 6) depthwise_block<6>(c, chunk, from, first, count);
        for (; from < chunk.count; ++from) depthwise_block<1>(c, chunk, from, first, count);
    }
}

// B vectors of channels of one halo place: one pass over its neighbours, whose weights are summed on the way.
template <int B>
inline void interpolate(const Op& op, const Conv& c, int64_t h, int channel, const Real* raw) {
    const Level& level = *op.region->level;
    const uint32_t place = op.region->halo.at[h];
    const int32_t number = -2 - number_at(level, place);
    const int64_t step = raw_row(c), last = level.start.at[number + 1];
    int64_t i = level.start.at[number];
    V sum[B] = {};
    float all = 0;
    for (; i < last && level.excess.at[i] <= c.reach; ++i) {  // the nearest come first
        const float weight = c.falloff[level.excess.at[i]];
        const Real* from = raw + level.source.at[i] * step + channel;
        all += weight;
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[b] += load(from + b * LANES) * spread(weight);
    }
    const bool bare = all == 0;
    const V part = spread(1 / all);
    Real* out = at(c.out, place) + channel;
    const Real* residual = c.residual.at ? at(c.residual, place) + channel : nullptr;
    const int outputs = c.groups * c.outputs;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b, channel += LANES) {
        const int count = (int)least(LANES, outputs - channel);
        const V value = bare ? load_upto(c.bare + channel, count)
                             : sum[b] * part * load_upto(c.scale + channel, count) + load_upto(c.shift + channel, count);
        finish(c, out + b * LANES, residual ? residual + b * LANES : nullptr, count, value);
    }
}

constexpr int AHEAD = 8;  // halo places

void halo(const Op& op, int64_t task, const Real* raw) {
    const Conv& c = *static_cast<const Conv*>(op.body);
    const List<uint32_t>& halo = op.region->halo;
    const Slice here = halo_of(op);
    const int64_t first = here.first + task * CHUNK, last = least(first + CHUNK, here.first + here.count);
    const int outputs = c.groups * c.outputs;
    for (int64_t h = first; h < last; ++h) {
        if (h + AHEAD < halo.count) {
            fetch(at(c.out, halo.at[h + AHEAD]), outputs);
            if (c.residual.at) fetch(at(c.residual, halo.at[h + AHEAD]), outputs);
        }
        for (int channel = 0, left; (left = vectors_of(outputs - channel, LANES)) > 0;) {
            const int vectors = (int)least(left, 4);
            if (vectors == 4) interpolate<4>(op, c, h, channel, raw);
            else if (vectors == 3) interpolate<3>(op, c, h, channel, raw);
            else if (vectors == 2) interpolate<2>(op, c, h, channel, raw);
            else interpolate<1>(op, c, h, channel, raw);
            channel += vectors * LANES;
        }
    }
}
