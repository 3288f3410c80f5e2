// The body that each instruction set compiles for itself; it says LANES, PLACES(vectors), MOST, STEP, PATH before.
//
// Everything has internal linkage and nothing comes from the standard library: a function shared between the sets could
// be taken by the linker from the wrong one.
namespace offramp {
namespace {

typedef float V __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline V load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, V value) { *reinterpret_cast<Loose*>(to) = value; }

#if LANES == 16
inline __mmask16 leading(int count) { return (__mmask16)((1u << count) - 1); }
inline V load_part(const float* from, int count) { return (V)_mm512_maskz_loadu_ps(leading(count), from); }
inline void store_part(float* to, V value, int count) { _mm512_mask_storeu_ps(to, leading(count), (__m512)value); }
inline V spread(float value) { return (V)_mm512_set1_ps(value); }
#elif LANES == 8
const int32_t LEADING[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i leading(int count) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(LEADING + 8 - count)); }
inline V load_part(const float* from, int count) { return (V)_mm256_maskload_ps(from, leading(count)); }
inline void store_part(float* to, V value, int count) { _mm256_maskstore_ps(to, leading(count), (__m256)value); }
inline V spread(float value) { return (V)_mm256_set1_ps(value); }
#else
inline V load_part(const float* from, int count) {
    V value = {};
    for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
}
inline void store_part(float* to, V value, int count) {
    for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
}
inline V spread(float value) { return V{value, value, value, value}; }
#endif

inline V load_upto(const float* from, int count) { return count >= LANES ? load(from) : load_part(from, count); }

// Folded batch norm, residual and ReLU of one vector of channels at one place.
inline void finish(const Conv& c, int64_t place, int channel, int count, V raw, V scale, V shift) {
    V value = raw * scale + shift;
    const int64_t at = place * c.outputs + channel;
    if (c.residual) value += load_upto(c.residual + at, count);
    if (c.relu) value = value < V{} ? V{} : value;  // a NaN stays one, as in torch
    if (count >= LANES) store(c.output + at, value);
    else store_part(c.output + at, value, count);
}

inline V scale_of(const Conv& c, int channel, int count) {
    return c.scale ? load_upto(c.scale + channel, count) : spread(1.0f);
}
inline V shift_of(const Conv& c, int channel, int count) { return c.shift ? load_upto(c.shift + channel, count) : V{}; }

inline int64_t padded(const Conv& c) { return (c.outputs + RAW_STEP - 1) / RAW_STEP * RAW_STEP; }

// Where the first tap of an output place lies in the input.
inline const float* first_tap(const Conv& c, int32_t place) {
    int64_t centre = place;
    if (c.stride == 2) {
        const int64_t y = place / c.output_width, x = place % c.output_width;  // counted from 1
        centre = (2 * y - 1) * c.input_width + 2 * x - 1;
    }
    return c.input + (c.kernel == 3 ? centre - c.input_width - 1 : centre) * c.inputs;
}

// P places x B vectors of output channels in registers; the taps of a row are one contiguous read.
template <int P, int B>
void block(const Conv& c, const float* weight, int64_t first, int valid, int channel) {
    const float* at[P];
    for (int p = 0; p < P; ++p) at[p] = first_tap(c, c.active[first + (p < valid ? p : valid - 1)]);
    V sum[P][B] = {};
    const int row = c.kernel * c.inputs;
    const int64_t pitch = (int64_t)c.input_width * c.inputs;
    for (int r = 0; r < c.kernel; ++r) {
        for (int k = 0; k < row; ++k) {
            V w[B];
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) w[b] = load(weight + b * LANES);
            weight += B * LANES;
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) {
                const V x = spread(at[p][k]);
#pragma GCC unroll 8
                for (int b = 0; b < B; ++b) sum[p][b] += w[b] * x;
            }
        }
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) at[p] += pitch;
    }
    V scale[B], shift[B];
    int count[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
        const int left = c.outputs - channel - b * LANES;
        count[b] = left < LANES ? left : LANES;
        scale[b] = scale_of(c, channel + b * LANES, count[b]);
        shift[b] = shift_of(c, channel + b * LANES, count[b]);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
        if (p >= valid) break;
        const int32_t place = c.active[first + p], slot = c.slot[first + p];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
            if (slot >= 0) store(c.raw + slot * padded(c) + channel + b * LANES, sum[p][b]);
            finish(c, place, channel + b * LANES, count[b], sum[p][b], scale[b], shift[b]);
        }
    }
}

constexpr int CHUNK = 120;  // a multiple of every number of places that a block takes

inline void fetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / 4) __builtin_prefetch(from + i);
}

// Asks for what the next places read and write: short runs are over before the machine's own prefetcher sees them.
inline void ahead(const Conv& c, int64_t first, int64_t last) {
    const int64_t row = (int64_t)c.kernel * c.inputs, pitch = (int64_t)c.input_width * c.inputs;
    for (int64_t i = first; i < last && i < c.num_active; ++i) {
        const int32_t place = c.active[i];
        const bool runs_on = c.stride == 1 && place == c.active[i - 1] + 1;
        const int64_t known = runs_on ? row - c.inputs : 0;
        const float* tap = first_tap(c, place);
        for (int r = 0; r < c.kernel; ++r) fetch(tap + r * pitch + known, row - known);
        fetch(c.output + (int64_t)place * c.outputs, c.outputs);
        if (c.residual) fetch(c.residual + (int64_t)place * c.outputs, c.outputs);
    }
}

template <int P, int B>
void blocks(const Conv& c, const float* weight, int64_t first, int64_t last, int channel) {
    for (; first < last; first += P) {
        if (channel == 0) ahead(c, first + P, first + 2 * P);
        block<P, B>(c, weight, first, last - first < P ? (int)(last - first) : P, channel);
    }
}

void channels(const Conv& c, const float* weight, int64_t first, int64_t last, int channel, int vectors) {
    switch (vectors) {
        case 1: blocks<PLACES(1), 1>(c, weight, first, last, channel); break;
        case 2: blocks<PLACES(2), 2>(c, weight, first, last, channel); break;
#if MOST == 4
        case 4: blocks<PLACES(4), 4>(c, weight, first, last, channel); break;
#endif
        default: blocks<PLACES(3), 3>(c, weight, first, last, channel);
    }
}

inline bool by_block(const Conv& c) { return (int64_t)c.kernel * c.kernel * c.inputs * c.outputs > WEIGHTS_IN_CACHE; }

int64_t tasks(const Conv& c) {
    const int64_t chunks = (c.num_active + CHUNK - 1) / CHUNK;
    int64_t count = 1;
    for (int left = vectors_of(c.outputs, LANES); by_block(c) && left > MOST; left -= STEP) ++count;
    return chunks * count;
}

void active(const Job& job, int64_t task) {
    const Conv& c = job.conv;
    const int64_t chunks = (c.num_active + CHUNK - 1) / CHUNK, taps = (int64_t)c.kernel * c.kernel * c.inputs;
    const int64_t only = by_block(c) ? task / chunks : -1, first = (by_block(c) ? task % chunks : task) * CHUNK;
    const int64_t last = first + CHUNK < c.num_active ? first + CHUNK : c.num_active;
    const float* weight = c.weight;
    int channel = 0, number = 0;
    for (int left = vectors_of(c.outputs, LANES); left > 0; ++number) {
        const int vectors = next_block(left, MOST, STEP);
        if (only < 0 || only == number) channels(c, weight, first, last, channel, vectors);
        weight += taps * vectors * LANES;
        channel += vectors * LANES;
        left -= vectors;
    }
}

// B vectors of channels of one halo place: one pass over its neighbours, whose weights are summed on the way.
template <int B>
inline void interpolate(const Job& job, int64_t h, int channel) {
    const Conv& c = job.conv;
    const int nearest = c.square[c.start[h]] - 1, reach = job.reach[nearest];
    const int64_t step = padded(c), last = c.start[h + 1];
    V sum[B] = {};
    float all = 0;
    for (int64_t i = c.start[h]; i < last && c.square[i] <= reach; ++i) {  // the nearest come first
        const float weight = job.weight[nearest][c.square[i]];
        const float* from = c.raw + c.source[i] * step + channel;
        all += weight;
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[b] += load(from + b * LANES) * spread(weight);
    }
    const V part = spread(1 / all);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b, channel += LANES) {
        const int left = c.outputs - channel, count = left < LANES ? left : LANES;
        finish(c, c.halo[h], channel, count, sum[b] * part, scale_of(c, channel, count), shift_of(c, channel, count));
    }
}

constexpr int AHEAD = 8;  // halo places

void halo(const Job& job, int64_t task) {
    const Conv& c = job.conv;
    const int64_t first = task * HALO_CHUNK, end = first + HALO_CHUNK, last = end < c.num_halo ? end : c.num_halo;
    for (int64_t h = first; h < last; ++h) {
        if (h + AHEAD < c.num_halo) {
            const int64_t at = (int64_t)c.halo[h + AHEAD] * c.outputs;
            fetch(c.output + at, c.outputs);
            if (c.residual) fetch(c.residual + at, c.outputs);
        }
        for (int channel = 0, left; (left = (c.outputs - channel + LANES - 1) / LANES) > 0;) {
            const int vectors = left < 4 ? left : 4;
            if (vectors == 4) interpolate<4>(job, h, channel);
            else if (vectors == 3) interpolate<3>(job, h, channel);
            else if (vectors == 2) interpolate<2>(job, h, channel);
            else interpolate<1>(job, h, channel);
            channel += vectors * LANES;
        }
    }
}

}  // namespace

extern const Path PATH;
const Path PATH = {NAME, LANES, MOST, STEP, tasks, active, halo};

}  // namespace offramp
