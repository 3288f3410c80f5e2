// The kernel under ASan and UBSan, with every buffer of exactly the size that the interface asks for, against loops
// that know nothing of vectors: `make sanitize`. Prints how many convolutions agreed; a fault or a difference ends it.
#include <stdio.h>
#include <stdlib.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../src/offramp/_kernel/kernel.hpp"

extern "C" {
const char* offramp_isa(int);
void offramp_parallel(void*);
void offramp_places(const uint8_t*, int32_t, int32_t, int32_t*, int32_t*, int32_t*, int64_t*);
void offramp_neighbours(int32_t, int32_t*, const int32_t*, int64_t, const int32_t*, int64_t, int32_t*, int32_t*,
                        int32_t*, uint8_t*, int64_t*);
int64_t offramp_packed_floats(int, int32_t, int32_t, int32_t);
void offramp_pack(int, const float*, int32_t, int32_t, int32_t, float*);
void offramp_conv(const offramp::Conv*);
}

namespace {

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

void one(int isa, int inputs, int outputs, int kernel, int stride, int height, int width, int kind) {
    const int tall = stride == 1 ? height : 2 * height - below(2), wide = stride == 1 ? width : 2 * width - below(2);
    std::vector<uint8_t> mask((size_t)height * width);
    const int part = 1 + below(99);
    for (uint8_t& m : mask) m = kind == 1 || (kind == 2 && below(100) < part);
    if (kind == 3) mask[below((int)mask.size())] = 1;
    for (int i = 0; kind == 4 && i < height * width; ++i)
        mask[i] = i / width == 0 || i / width == height - 1 || i % width == 0 || i % width == width - 1;
    std::vector<int32_t> map((size_t)(height + 6) * (width + 6)), active(mask.size()), halo(mask.size());
    int64_t counts[2];
    offramp_places(mask.data(), height, width, map.data(), active.data(), halo.data(), counts);
    active = std::vector<int32_t>(active.begin(), active.begin() + counts[0]);
    halo = std::vector<int32_t>(halo.begin(), halo.begin() + counts[1]);
    std::vector<int32_t> slot(active.size()), start(halo.size() + 1), source(48 * halo.size());
    std::vector<uint8_t> square(48 * halo.size());
    offramp_neighbours(width, map.data(), active.data(), counts[0], halo.data(), counts[1], slot.data(), start.data(),
                       source.data(), square.data(), counts);
    source = std::vector<int32_t>(source.begin(), source.begin() + counts[0]);
    square = std::vector<uint8_t>(square.begin(), square.begin() + counts[0]);

    const int step = kernel * kernel * inputs;
    const std::vector<float> weight = numbers((size_t)outputs * step);
    const std::vector<float> scale = numbers(outputs), shift = numbers(outputs);
    std::vector<float> packed((size_t)offramp_packed_floats(isa, inputs, outputs, kernel));
    offramp_pack(isa, weight.data(), inputs, outputs, kernel, packed.data());
    std::vector<float> in((size_t)(tall + 2) * (wide + 2) * inputs);
    for (int y = 1; y <= tall; ++y)
        for (int i = inputs; i < (wide + 1) * inputs; ++i) in[(size_t)y * (wide + 2) * inputs + i] = number();
    const std::vector<float> residual = numbers((size_t)(height + 2) * (width + 2) * outputs);
    std::vector<float> out(residual.size(), 77.0f), raw((size_t)counts[1] * ((outputs + 15) / 16 * 16));
    const bool plain = below(2), relu = below(2);
    const offramp::Conv conv{
        in.data(), out.data(), packed.data(), plain ? nullptr : scale.data(), plain ? nullptr : shift.data(),
        plain ? nullptr : residual.data(), raw.data(), active.data(), slot.data(), halo.data(), start.data(),
        source.data(), square.data(), (int64_t)active.size(), (int64_t)halo.size(), wide + 2, width + 2, inputs,
        outputs, kernel, stride, relu, isa, 1 + below(3), 0.8f, below(2) ? 0.0f : 1.5e-8f};
    offramp_conv(&conv);

    const auto inside = [&](int y, int x) { return y >= 0 && y < height && x >= 0 && x < width; };
    const auto on = [&](int y, int x) { return inside(y, x) && mask[(size_t)y * width + x]; };
    std::vector<double> plainly((size_t)height * width * outputs);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int o = 0; on(y, x) && o < outputs; ++o)
                for (int i = 0; i < step; ++i) {
                    const int tap = i % (kernel * kernel), channel = i / (kernel * kernel), edge = kernel / 2;
                    const int ty = y * stride + tap / kernel + 1 - edge, tx = x * stride + tap % kernel + 1 - edge;
                    plainly[((size_t)y * width + x) * outputs + o] +=
                        (double)weight[(size_t)o * step + i] * in[((size_t)ty * (wide + 2) + tx) * inputs + channel];
                }
    for (int y = -1; y <= height; ++y)
        for (int x = -1; x <= width; ++x) {
            bool touches = false;
            for (int dy = -1; dy <= 1; ++dy)
                for (int dx = -1; dx <= 1; ++dx) touches |= on(y + dy, x + dx);
            for (int o = 0; o < outputs; ++o) {
                const size_t at = ((size_t)(y + 1) * (width + 2) + x + 1) * outputs + o;
                if (!inside(y, x) || !touches) {
                    if (out[at] != 77.0f) differ("a place that is not to be written");
                    continue;
                }
                double value = 0, all = 0;
                for (int dy = -3; dy <= 3; ++dy)
                    for (int dx = -3; dx <= 3; ++dx) {
                        if (on(y, x) ? dy || dx : !on(y + dy, x + dx)) continue;
                        const double w = std::exp(-0.8 * 0.8 * (dy * dy + dx * dx));
                        value += w * plainly[((size_t)(y + dy) * width + x + dx) * outputs + o];
                        all += w;
                    }
                value /= all;
                if (!plain) value = value * scale[o] + shift[o] + residual[at];
                if (relu && value < 0) value = 0;
                if (!(std::fabs(value - out[at]) < 1e-4)) differ("a value");
            }
        }
}

}  // namespace

int main() {
    offramp_parallel(reinterpret_cast<void*>(in_threads));
    const int channels[] = {1, 2, 3, 16, 18, 36, 48, 64, 96, 130}, count = 10;
    int done = 0;
    for (int isa = 2; isa >= 0; --isa)
        for (int i = 0; offramp_isa(isa) && i < 260; ++i, ++done)
            one(isa, channels[below(count)], channels[below(count)], below(2) ? 3 : 1, 1 + below(2), 1 + below(9),
                1 + below(20), i % 6);
    for (int isa = 2; isa >= 0; --isa)  // more weights than stay in the cache
        if (offramp_isa(isa)) one(isa, 180, 181, 3, 1, 9, 17, 2), ++done;
    printf("%d convolutions agree, no sanitizer spoke\n", done);
}
