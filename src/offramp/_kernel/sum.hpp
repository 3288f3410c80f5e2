// Sums of maps of several sizes, and pooling, at all places of a region. See body.hpp.

inline int64_t places_of(const Op& op) { return active_of(op).count + halo_of(op).count; }

inline uint32_t place_of(const Op& op, int64_t number) {
    const Slice active = active_of(op);
    if (number < active.count) return op.region->level->active.at[active.first + number];
    return op.region->halo.at[halo_of(op).first + number - active.count];
}

// Calls one(channel, count) for each B vectors, and then for single ones; count: of the last vector's channels.
template <class Whole, class Part>
inline void by_vectors(int channels, Whole whole, Part part) {
    int channel = 0;
    for (; channel + 4 * LANES <= channels; channel += 4 * LANES) whole(channel);
    for (; channel < channels; channel += LANES) part(channel, (int)least(LANES, channels - channel));
}

// What one term adds to B vectors, of whose channels `count` are there.
template <int B>
inline void add_term(const Term& term, uint32_t place, int channel, int count, V* sum) {
    if (!term.rows.first) {
        const Real* from = at(term.source, place) + channel;
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[b] += load_upto(from + b * LANES, count);
        return;
    }
    const int64_t y = row_of(place), x = column_of(place);
    const Plane& source = term.source;
    const Real* origin = static_cast<const Real*>(source.at) + channel;
    const Real* above = origin + term.rows.first[y] * source.row;
    const int64_t left = term.columns.first[x] * source.step;
    if (!term.rows.part) {
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[b] += load_upto(above + left + b * LANES, count);
        return;
    }
    const Real* below = origin + term.rows.second[y] * source.row;
    const int64_t right = term.columns.second[x] * source.step;
    const float down = term.rows.part[y], across = term.columns.part[x];
    const V low = spread(down), high = spread(1 - down), far = spread(across), near = spread(1 - across);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
        const int64_t l = left + b * LANES, r = right + b * LANES;
        sum[b] += high * (near * load_upto(above + l, count) + far * load_upto(above + r, count)) +
                  low * (near * load_upto(below + l, count) + far * load_upto(below + r, count));
    }
}

template <int B>
inline void sum_at(const Sum& s, uint32_t place, int channel, int count) {
    V sum[B] = {};
    for (int t = 0; t < s.count; ++t) add_term<B>(s.terms[t], place, channel, count, sum);
    Real* out = at(s.out, place) + channel;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b, channel += LANES) {
        if (s.scale) sum[b] *= load_upto(s.scale + channel, count);
        if (s.shift) sum[b] += load_upto(s.shift + channel, count);
        store_upto(out + b * LANES, s.relu ? relu(sum[b]) : sum[b], count);
    }
}

void add_up(const Op& op, int64_t task) {
    const Sum& s = *static_cast<const Sum*>(op.body);
    const int64_t last = least((task + 1) * CHUNK, places_of(op));
    for (int64_t i = task * CHUNK; i < last; ++i) {
        const uint32_t place = place_of(op, i);
        by_vectors(s.channels, [&](int channel) { sum_at<4>(s, place, channel, LANES); },
                   [&](int channel, int count) { sum_at<1>(s, place, channel, count); });
    }
}

template <int B>
inline void pool_at(const Pool& p, uint32_t place, int channel, int count) {
    const Window& w = p.window;
    const int64_t top = row_of(place) * w.stride[0] - w.padding[0];
    const int64_t left = column_of(place) * w.stride[1] - w.padding[1];
    const Real* origin = static_cast<const Real*>(p.source.at) + channel;
    V all[B] = {};
    int seen = 0, counted = 0;
    for (int i = 0; i < w.kernel[0]; ++i)
        for (int j = 0; j < w.kernel[1]; ++j) {
            const int64_t y = top + i * w.dilation[0], x = left + j * w.dilation[1];
            counted += y < p.height + w.padding[0] && x < p.width + w.padding[1];  // as torch does at ragged ends
            if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
            const Real* from = origin + y * p.source.row + x * p.source.step;
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) {
                const V value = load_upto(from + b * LANES, count);
                if (!seen) all[b] = value;
                else if (p.mean) all[b] += value;
                else all[b] = (value > all[b]) | (value != value) ? value : all[b];  // a NaN stays: nothing is above it
            }
            ++seen;
        }
    const V over = spread((float)(p.counts_padding ? counted : seen));
    Real* out = at(p.out, place) + channel;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) store_upto(out + b * LANES, p.mean ? all[b] / over : all[b], count);
}

void pool(const Op& op, int64_t task) {
    const Pool& p = *static_cast<const Pool*>(op.body);
    const int64_t last = least((task + 1) * CHUNK, places_of(op));
    for (int64_t i = task * CHUNK; i < last; ++i) {
        const uint32_t place = place_of(op, i);
        by_vectors(p.channels, [&](int channel) { pool_at<4>(p, place, channel, LANES); },
                   [&](int channel, int count) { pool_at<1>(p, place, channel, count); });
    }
}

// One row of the larger map. between: room for a row of the smaller one, which is blended of two before its places are.
void enlarge(const Enlarging& e, int64_t y, float* between) {
    const int64_t count = e.width * e.channels;
    const float *above = e.from + e.rows.first[y] * count, *below = e.from + e.rows.second[y] * count;
    const V low = spread(e.rows.part[y]), high = spread(1 - e.rows.part[y]);
    for (int64_t i = 0; i < count; i += LANES) {
        const int some = (int)least(LANES, count - i);
        store_upto(between + i, high * load_upto(above + i, some) + low * load_upto(below + i, some), some);
    }
    float* to = e.to + y * e.width_to * e.channels;
    for (int64_t x = 0; x < e.width_to; ++x, to += e.channels) {
        const float *left = between + e.columns.first[x] * e.channels, *right = between + e.columns.second[x] * e.channels;
        const V far = spread(e.columns.part[x]), near = spread(1 - e.columns.part[x]);
        for (int64_t c = 0; c < e.channels; c += LANES) {
            const int some = (int)least(LANES, e.channels - c);
            store_upto(to + c, near * load_upto(left + c, some) + far * load_upto(right + c, some), some);
        }
    }
}
