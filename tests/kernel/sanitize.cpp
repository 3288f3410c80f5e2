// The kernel under ASan and UBSan, with every buffer of exactly the size that the interface asks for, against loops
// that know nothing of vectors: `make sanitize`. Prints how many operations agreed; a fault or a difference ends it.
//
// Each round draws one mask and one operation of each kind over it; the operations run in one call, on threads.
#include <stdio.h>
#include <stdlib.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../src/offramp/_kernel/kernel.hpp"

extern "C" {
const char* offramp_isa(int);
int offramp_proves(int);
void offramp_parallel(void*);
int offramp_pair(int);
int64_t offramp_packed_units(int, int32_t, int32_t, int32_t, int32_t);
void offramp_pack(int, const float*, int32_t, int32_t, int32_t, int32_t, uint32_t*);
int offramp_settle(offramp::Plan*, const uint8_t*, int32_t, int32_t);
int64_t offramp_run(offramp::Plan*, int64_t, int64_t, int32_t, const int32_t*, int64_t);
void offramp_read_active(int, const offramp::Level*, const offramp::Plane*, int64_t, void*, int64_t, int64_t, int64_t,
                         int);
int offramp_enlarge(int, const offramp::Enlarging*, int32_t);
void offramp_judge(int, const offramp::Judging*, int32_t);
void offramp_release(offramp::Plan*);
}

namespace {

using namespace offramp;

std::mt19937 draws(0);
int below(int n) { return (int)(draws() % (unsigned)n); }
float number() { return std::uniform_real_distribution<float>(-1, 1)(draws); }
std::vector<float> numbers(size_t n) {
    std::vector<float> out(n);
    for (float& v : out) v = number();
    return out;
}

// What GOMP_parallel does, on threads of our own.
void in_threads(void (*work)(void*), void* given, unsigned count, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; ++i) others.emplace_back(work, given);
    work(given);
    for (std::thread& other : others) other.join();
}

void differ(const char* what) {
    fprintf(stderr, "differs: %s\n", what);
    exit(1);
}

// Cut off: what bfloat16 resolves.
float cut(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0xffff0000;
    memcpy(&value, &bits, 4);
    return value;
}

struct Map {
    int height, width, channels, frame, bytes;
    std::vector<uint8_t> data;

    // pair: 1 for float, 2 for bfloat16
    Map(int h, int w, int c, int f, bool filled, int pair)
        : height(h), width(w), channels(c), frame(f), bytes(4 / pair) {
        data.assign((size_t)(((h + 2 * f) * row() + f * c) * bytes), 0);
        for (int y = 0; y < h; ++y)
            for (int i = 0; i < w * c; ++i) {
                const float value = filled ? number() : 77.0f;
                uint8_t four[4];
                memcpy(four, &value, 4);
                memcpy(data.data() + (origin() + y * row() + i) * bytes, four + 4 - bytes, (size_t)bytes);
            }
    }
    int64_t row() const { return (int64_t)(width + frame) * channels; }
    int64_t origin() const { return frame * row() + frame * channels; }
    Plane view(int first) { return {data.data() + (origin() + first) * bytes, row(), channels}; }
    double at(int y, int x, int c) const {
        if (y < 0 || y >= height || x < 0 || x >= width) return 0;
        uint8_t four[4] = {};
        memcpy(four + 4 - bytes, data.data() + (origin() + y * row() + (int64_t)x * channels + c) * bytes, (size_t)bytes);
        float value;
        memcpy(&value, four, 4);
        return value;
    }
};

struct Ops {
    int height, width;
    const std::vector<uint8_t>& mask;
    std::vector<uint8_t> stands;
    double within;               // of 1 and of a value
    bool inside(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
    bool on(int y, int x) const { return inside(y, x) && mask[(size_t)(y * width + x)]; }

    // Every place of `out`, channels from `first` on: `said` where it must stand, 77 elsewhere.
    template <class Said>
    void compare(const Map& out, int first, int count, const char* what, Said said) const {
        for (int y = 0; y < height; ++y)
            for (int x = 0; x < width; ++x)
                for (int c = 0; c < out.channels; ++c) {
                    const double found = out.at(y, x, c);
                    const bool ours = c >= first && c < first + count && stands[(size_t)(y * width + x)];
                    if (!ours && found != 77.0) differ("a place or channel that is not to be written");
                    const double known = ours ? said(y, x, c - first) : 0;
                    if (ours && !(std::fabs(known - found) < within * (1 + std::fabs(known)))) differ(what);
                }
    }
};

std::vector<uint8_t> some_mask(int height, int width, int kind) {
    std::vector<uint8_t> mask((size_t)(height * width));
    const int part = 1 + below(99);
    for (uint8_t& m : mask) m = kind == 1 || (kind == 2 && below(100) < part);
    if (kind == 3) mask[(size_t)below(height * width)] = 1;
    for (int i = 0; kind == 4 && i < height * width; ++i)
        mask[(size_t)i] = i / width == 0 || i / width == height - 1 || i % width == 0 || i % width == width - 1;
    return mask;
}

// As torch's bilinear resize without aligned corners.
struct Table {
    std::vector<int32_t> first, second;
    std::vector<float> part;
    Table(int from, int to) {
        for (int i = 0; i < to; ++i) {
            const float at = std::fmax(0.0f, ((float)i + 0.5f) * ((float)from / (float)to) - 0.5f);
            const int a = std::min((int)at, from - 1);
            first.push_back(a), second.push_back(std::min(a + 1, from - 1)), part.push_back(at - (float)a);
        }
    }
    Axis axis() const { return {first.data(), second.data(), part.data()}; }
};

int round_of(int isa, int kind, bool large) {
    const int pair = offramp_pair(isa);
    const int height = 1 + below(9), width = 1 + below(20), depthwise = !large && below(2);
    const int groups = large ? 1 : 1 + below(depthwise ? 40 : 2), sizes[] = {1, 3, 16, 18, 40, 65};
    const int inputs = large ? 180 : depthwise ? 1 : sizes[below(6)];
    const int outputs = large ? 177 : depthwise ? 1 : sizes[below(6)];
    const int channels = groups * inputs, made = groups * outputs;
    const int kernel = large ? 3 : 1 + 2 * below(3), stride = 1 + below(2), dilation = 1 + below(2), edge = dilation * (kernel / 2);
    const int tall = stride == 1 ? height : 2 * height - below(2), wide = stride == 1 ? width : 2 * width - below(2);
    const std::vector<uint8_t> mask = some_mask(height, width, kind);

    Level level{};
    level.height = height, level.width = width;
    // A region: what a 3x3 window reads at the active places.
    Read read{};
    read.region = -1;
    read.window = {{3, 3}, {1, 1}, {1, 1}, {1, 1}};
    Region region{};
    region.level = &level, region.reads = &read, region.num_reads = 1, region.interpolates = 1;

    Map in(tall, wide, channels + 3, std::max(edge, 1), true, pair), residual(height, width, made, 1, true, pair);
    Map out(height, width, made + 2, 1, false, pair), summed(height, width, made + 1, 1, false, pair);
    Map coarse(1 + below(5), 1 + below(6), made, 1, true, pair), pooled(height, width, channels, 1, false, pair);
    const int taps = kernel * kernel;
    std::vector<float> weight = numbers((size_t)(made * inputs * taps));
    if (pair == 2) for (float& w : weight) w = cut(w);
    const std::vector<float> scale = numbers((size_t)made);
    const std::vector<float> shift = numbers((size_t)made), bare = numbers((size_t)made);
    std::vector<uint32_t> packed;
    std::vector<int64_t> jump;
    for (int i = 0; i < taps; ++i)
        jump.push_back((i / kernel) * dilation * in.row() + (i % kernel) * dilation * in.channels);
    if (groups > 1 && depthwise) {
        const size_t row = (size_t)((made + RAW_STEP - 1) / RAW_STEP * RAW_STEP);
        packed.assign(row * (size_t)taps, 0);
        for (int c = 0; c < made; ++c)
            for (int t = 0; t < taps; ++t) memcpy(&packed[(size_t)t * row + (size_t)c], &weight[(size_t)(c * taps + t)], 4);
    } else {
        const size_t size = (size_t)offramp_packed_units(isa, inputs, outputs, taps, inputs);
        packed.assign(size * (size_t)groups, 0);
        for (int g = 0; g < groups; ++g)
            offramp_pack(isa, weight.data() + g * outputs * inputs * taps, inputs, outputs, taps, inputs,
                         packed.data() + size * (size_t)g);
    }
    const bool plain = below(2), relu = below(2);
    Conv conv{};
    conv.source = in.view(2), conv.out = out.view(1);
    if (!plain) conv.residual = residual.view(0);
    conv.weight = reinterpret_cast<const float*>(packed.data()), conv.scale = scale.data(), conv.shift = shift.data(), conv.bare = bare.data();
    conv.jump = jump.data(), conv.runs = taps, conv.run = inputs, conv.inputs = inputs, conv.outputs = outputs;
    conv.groups = groups, conv.relu = relu, conv.reach = SQUARES - 1;
    for (int i = 0; i < 2; ++i) conv.stride[i] = stride, conv.padding[i] = edge;
    for (int i = 0; i < SQUARES; ++i) conv.falloff[i] = (float)std::exp(-0.64 * i);

    const Table rows(coarse.height, height), columns(coarse.width, width);
    const Term terms[] = {{out.view(1), {}, {}}, {coarse.view(0), rows.axis(), columns.axis()}};
    const Sum sum{summed.view(1), terms, scale.data(), plain ? nullptr : shift.data(), 2, made, relu, 0};
    Pool pool{in.view(1), pooled.view(0), {{3, 3}, {stride, stride}, {1, 1}, {1, 1}}, tall, wide, channels, below(2),
              below(2), 0};
    const int32_t needs[] = {0, 1}, made_by = groups > 1 && depthwise ? DEPTHWISE : CONV;
    const int cut = kind == 1 ? below(height + 1) : height;  // in two bands where nothing is interpolated
    Op ops[] = {{made_by, 0, {0, cut}, &conv, &region, nullptr, 0},
                {made_by, 0, {cut, height}, &conv, &region, nullptr, 0},
                {SUM, -1, {0, height}, &sum, &region, needs, 2},
                {POOL, -1, {0, cut}, &pool, &region, nullptr, 0},
                {POOL, -1, {cut, height}, &pool, &region, nullptr, 0}};
    List<float> raw{};
    std::vector<Phase> phases(10);
    Plan plan{};
    plan.levels = &level, plan.regions = &region, plan.ops = ops, plan.num_levels = plan.num_regions = 1;
    plan.num_ops = 5, plan.num_raws = 1, plan.raws = &raw, plan.phases = phases.data(), plan.isa = isa;
    plan.excess = SQUARES - 1;
    if (!offramp_settle(&plan, mask.data(), height, width)) differ("memory");
    const int32_t stop = 1;
    const int64_t nothing = cut == 0 || cut == height ? 2 : 0;  // bands without a place
    if (offramp_run(&plan, 0, 5, 2, &stop, 0) != nothing && level.active.count) differ("a call that was to stop");
    if (offramp_run(&plan, 0, 5, 1 + below(3), nullptr, 0) != 5) differ("a call that was not to stop");

    Ops all{height, width, mask, std::vector<uint8_t>(mask.size()), 1e-4};
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int i = 0; i < 9; ++i) all.stands[(size_t)(y * width + x)] |= all.on(y + i / 3 - 1, x + i % 3 - 1);
    std::vector<double> plainly((size_t)(height * width * made));
    for (int i = 0; i < height * width * made; ++i)
        for (int k = 0; k < inputs * taps; ++k) {
            const int o = i % made, x = i / made % width, y = i / made / width, t = k % taps;
            plainly[(size_t)i] += (double)weight[(size_t)(o * inputs * taps + k)] *
                                  in.at(y * stride - edge + t / kernel * dilation,
                                        x * stride - edge + t % kernel * dilation, 2 + o / outputs * inputs + k / taps);
        }
    double largest = 0;
    for (const double value : plainly) largest = std::fmax(largest, std::fabs(value));
    if (pair == 2) all.within = (1 + largest) / 256;
    const auto said = [&](int y, int x, int o) {
        double value = 0, weights = 0;
        for (int dy = -3; dy <= 3; ++dy)
            for (int dx = -3; dx <= 3; ++dx) {
                if (all.on(y, x) ? dy || dx : !all.on(y + dy, x + dx)) continue;
                const double w = std::exp(-0.64 * (dy * dy + dx * dx));
                value += w * plainly[(size_t)(((y + dy) * width + x + dx) * made + o)];
                weights += w;
            }
        value = value / weights * scale[(size_t)o] + shift[(size_t)o] + (plain ? 0 : residual.at(y, x, o));
        return relu && value < 0 ? 0 : value;
    };
    all.compare(out, 1, made, "a convolution", said);
    all.compare(summed, 1, made, "a sum", [&](int y, int x, int o) {
        const auto side = [&](int row, double part) {
            const double a = coarse.at(row, columns.first[(size_t)x], o), b = coarse.at(row, columns.second[(size_t)x], o);
            return part * (a + (b - a) * columns.part[(size_t)x]);
        };
        double value = out.at(y, x, 1 + o) + side(rows.first[(size_t)y], 1 - rows.part[(size_t)y]) +
                       side(rows.second[(size_t)y], rows.part[(size_t)y]);
        value = value * scale[(size_t)o] + (plain ? 0 : shift[(size_t)o]);
        return relu && value < 0 ? 0 : value;
    });
    all.compare(pooled, 0, channels, "a pool", [&](int y, int x, int c) {
        double total = 0, largest = -1e9;
        int seen = 0, counted = 0;
        for (int i = 0; i < 9; ++i) {
            const int there = y * stride - 1 + i / 3, beside = x * stride - 1 + i % 3;
            counted += there < tall + 1 && beside < wide + 1;
            if (there < 0 || there >= tall || beside < 0 || beside >= wide) continue;
            const double value = in.at(there, beside, 1 + c);
            total += value, largest = std::max(largest, value), ++seen;
        }
        return pool.mean ? total / (pool.counts_padding ? counted : seen) : largest;
    });
    std::vector<float> active((size_t)(made * height * width), 5.0f);
    const Plane from = out.view(1);
    offramp_read_active(isa, &level, &from, made, active.data(), height * width, width, 1, 1);
    for (int i = 0; i < made * height * width; ++i) {
        const int x = i % width, y = i / width % height;
        if (active[(size_t)i] != (all.on(y, x) ? (float)out.at(y, x, 1 + i / width / height) : 5.0f)) differ("active");
    }
    offramp_release(&plan);
    return 3;
}

// A map of floats resized, and which of its places are sure.
int maps_of(int isa, int kind) {
    const int height = 1 + below(9), width = 1 + below(20), sizes[] = {1, 2, 8, 19, 35}, channels = sizes[below(5)];
    const int tall = 1 + below(40), wide = 1 + below(40), count = height * width;
    const std::vector<float> map = numbers((size_t)(count * channels));
    std::vector<float> larger((size_t)(tall * wide * channels));
    const Table rows(height, tall), columns(width, wide);
    const Enlarging e{map.data(), larger.data(), rows.axis(), columns.axis(), width, channels, tall, wide};
    if (!offramp_enlarge(isa, &e, 1 + below(3))) differ("memory");
    const auto at = [&](int y, int x, int c) { return (double)map[(size_t)((y * width + x) * channels + c)]; };
    for (int i = 0; i < tall * wide * channels; ++i) {
        const size_t y = (size_t)(i / channels / wide), x = (size_t)(i / channels % wide);
        const double low = rows.part[y], far = columns.part[x];
        const auto row = [&](int from) {
            return (1 - far) * at(from, columns.first[x], i % channels) + far * at(from, columns.second[x], i % channels);
        };
        const double known = (1 - low) * row(rows.first[y]) + low * row(rows.second[y]);
        if (!(std::fabs(larger[(size_t)i] - known) < 1e-5)) differ("a resized map");
    }
    const std::vector<uint8_t> within = some_mask(height, width, kind);
    std::vector<uint8_t> found((size_t)count, 9);
    const Judging j{map.data(), kind == 5 ? nullptr : within.data(), found.data(), count, channels, 0.3f, 1e-5f};
    offramp_judge(isa, &j, 1 + below(3));
    for (int i = 0; i < count; ++i) {
        double largest = -2, all = 0;
        for (int c = 0; c < channels; ++c) largest = std::fmax(largest, at(0, i, c));
        for (int c = 0; c < channels; ++c) all += std::exp(at(0, i, c) - largest);
        const bool looked = kind == 5 || within[(size_t)i];
        const int known = !looked || 1 / all > 0.3 ? 0 : 1;
        const bool near = looked && std::fabs(1 / all - 0.3) < 2e-5;
        if (found[(size_t)i] != known && !(near && found[(size_t)i] == 2)) differ("what is sure");
    }
    return 2;
}

}  // namespace

int main() {
    offramp_parallel(reinterpret_cast<void*>(in_threads));
    int done = 0;
    for (int isa = 0; isa < 5; ++isa)
        if (offramp_isa(isa) && !offramp_proves(isa)) differ("a trial");
    for (int isa = 4; isa >= 0; --isa)
        for (int i = 0; offramp_isa(isa) && i < 260; ++i) done += round_of(isa, i % 6, false) + maps_of(isa, i % 6);
    for (int isa = 4; isa >= 0; --isa)  // more weights than stay in the cache
        if (offramp_isa(isa)) done += round_of(isa, 2, true);
    printf("%d operations agree, no sanitizer spoke\n", done);
}
