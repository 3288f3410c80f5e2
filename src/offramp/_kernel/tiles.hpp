// Dense products by tiles: 32 places x 32 channels stand in four tile registers of 16 rows of 64 bytes; two more hold
// what is multiplied, and two the end of a run that does not fill 16 units. See conv.hpp.
//
// A tile of places is read where they lie if 16 are adjacent in a row, else from a copy; one of weights is 16 units of
// a block as it is packed, one a row. No tile reads what lies behind a run.

// What ldtilecfg reads.
struct Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

#if OFFRAMP_EMULATE_TILES
// The instructions in plain C++, for machines that have none: shapes that they would not take are traps.
struct Tile {
    int rows, bytes;
    uint8_t row[16][64];
};
thread_local Tile emulated[8];

inline void must(bool holds) {
    if (!holds) __builtin_trap();
}

inline void emulate_shapes(const Shapes& shapes) {
    must(shapes.palette == 1 && !shapes.start);
    for (const uint8_t byte : shapes.reserved) must(!byte);
    for (int t = 0; t < 16; ++t) {
        must(shapes.rows[t] <= 16 && shapes.bytes[t] <= 64 && !shapes.rows[t] == !shapes.bytes[t]);
        must(t < 8 || !shapes.rows[t]);
        if (t < 8) emulated[t] = {shapes.rows[t], shapes.bytes[t], {}};
    }
}

inline void emulate_release() {
    for (Tile& tile : emulated) tile = {};
}

inline void emulate_zero(Tile& tile) {
    must(tile.rows);
    __builtin_memset(tile.row, 0, sizeof tile.row);
}

inline void emulate_load(Tile& tile, const void* from, int64_t stride) {
    emulate_zero(tile);
    for (int i = 0; i < tile.rows; ++i)
        __builtin_memcpy(tile.row[i], static_cast<const char*>(from) + i * stride, (size_t)tile.bytes);
}

inline void emulate_store(const Tile& tile, void* to, int64_t stride) {
    must(tile.rows);
    for (int i = 0; i < tile.rows; ++i)
        __builtin_memcpy(static_cast<char*>(to) + i * stride, tile.row[i], (size_t)tile.bytes);
}

inline float flushed(float value) { return __builtin_fabsf(value) < 0x1p-126f ? __builtin_copysignf(0, value) : value; }

// One of the two values of bfloat16 of each 32 bits.
inline float half_of(const uint8_t* units, int unit, int half) {
    uint16_t bits;
    __builtin_memcpy(&bits, units + 4 * unit + 2 * half, 2);
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return flushed(value);
}

// The even values and the odd ones are summed apart, each product fused with its sum; both sums, then what was there.
inline void emulate_product(Tile& sum, const Tile& a, const Tile& b) {
    must(sum.rows && sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == 4 * b.rows && a.bytes % 4 == 0);
    for (int m = 0; m < sum.rows; ++m)
        for (int n = 0; n < sum.bytes / 4; ++n) {
            float halves[2] = {}, before;
            for (int k = 0; k < b.rows; ++k)
                for (int h = 0; h < 2; ++h)
                    halves[h] = flushed(__builtin_fmaf(half_of(a.row[m], k, h), half_of(b.row[k], n, h), halves[h]));
            __builtin_memcpy(&before, sum.row[m] + 4 * n, 4);
            const float after = flushed(flushed(before) + flushed(halves[0] + halves[1]));
            __builtin_memcpy(sum.row[m] + 4 * n, &after, 4);
        }
}

#define TILE_SHAPES(shapes) emulate_shapes(shapes)
#define TILE_RELEASE() emulate_release()
#define TILE_ZERO(t) emulate_zero(emulated[t])
#define TILE_LOAD(t, from, stride) emulate_load(emulated[t], from, stride)
#define TILE_STORE(t, to, stride) emulate_store(emulated[t], to, stride)
#define TILE_PRODUCT(t, a, b) emulate_product(emulated[t], emulated[a], emulated[b])
#else
// Compilers' own headers do not say that these two read memory: stores may pass neither.
inline void written() { __asm__ volatile("" ::: "memory"); }
#define TILE_SHAPES(shapes) (written(), _tile_loadconfig(&(shapes)), written())
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) do { written(); _tile_loadd(t, from, stride); written(); } while (0)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_PRODUCT(t, a, b) _tile_dpbf16ps(t, a, b)
#endif

constexpr int STRIP = 16;        // places of a tile, and units of a run
constexpr int DEPTH = STRIP * PAIR;

// A thread's tile registers for the time of one task; after it they hold nothing that a thread switch would carry.
class Tiles {
public:
    explicit Tiles(const Conv& c) {
        alignas(64) Shapes shapes = {};
        shapes.palette = 1;
        for (int t = 0; t < 6; ++t) shapes.rows[t] = 16, shapes.bytes[t] = 64;
        if (const int rest = vectors_of(c.run, PAIR) % STRIP) {
            shapes.rows[6] = 16, shapes.bytes[6] = (uint16_t)(4 * rest);
            shapes.rows[7] = (uint8_t)rest, shapes.bytes[7] = 64;
        }
        TILE_SHAPES(shapes);
    }
    ~Tiles() { TILE_RELEASE(); }
    Tiles(const Tiles&) = delete;
};

struct Strip {
    const Real* tap[STRIP];
    bool adjacent;
};

inline Strip strip_of(const Conv& c, const uint32_t* places, int valid, int input) {
    Strip strip;
    for (int p = 0; p < STRIP; ++p) strip.tap[p] = first_tap(c, places[p < valid ? p : valid - 1]) + input;
    strip.adjacent = valid == STRIP && places[STRIP - 1] - places[0] == STRIP - 1;
    return strip;
}

struct Rows {
    const Real* at;
    int64_t bytes;               // from row to row
};

// `count` values of each place of a strip; `copy` takes them where they do not lie in rows of one distance, or where
// the last of them shares its unit with one that is not theirs.
inline Rows rows_of(const Conv& c, const Strip& strip, int64_t jump, int count, Real (&copy)[STRIP][DEPTH]) {
    if (strip.adjacent && count % PAIR == 0)
        return {strip.tap[0] + jump, c.stride[1] * c.source.step * (int64_t)sizeof(Real)};
    for (int p = 0; p < STRIP; ++p) store(reinterpret_cast<float*>(copy[p]), load_run(strip.tap[p] + jump, count));
    return {copy[0], sizeof copy[0]};
}

// The strips' rows x the next units of the block, B vectors of channels, through the tiles A and W.
#define PRODUCTS(A, W)                                                 \
    TILE_LOAD(W, weight, B * 64);                                      \
    TILE_LOAD(A, rows[0].at, rows[0].bytes);                           \
    TILE_PRODUCT(0, A, W);                                             \
    if (B == 2) {                                                      \
        TILE_LOAD(W, weight + LANES, B * 64);                          \
        TILE_PRODUCT(1, A, W);                                         \
    }                                                                  \
    if (two) {                                                         \
        TILE_LOAD(A, rows[1].at, rows[1].bytes);                       \
        if (B == 2) {                                                  \
            TILE_PRODUCT(3, A, W);                                     \
            TILE_LOAD(W, weight, B * 64);                              \
        }                                                              \
        TILE_PRODUCT(2, A, W);                                         \
    }

// P places, two strips, x B vectors of output channels.
template <int P, int B>
void block(const Conv& c, const Chunk& chunk, const Block& of, int64_t from, int valid) {
    static_assert(P == 2 * STRIP && B <= 2, "four tiles of sums");
    const bool two = valid > STRIP;
    const uint32_t* places = chunk.places + from;
    const Strip strips[] = {strip_of(c, places, (int)least(STRIP, valid), of.input),
                            strip_of(c, places + two * STRIP, two ? valid - STRIP : 1, of.input)};
    alignas(64) Real copies[2][STRIP][DEPTH];
    alignas(64) float sums[P][2 * LANES];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    const float* weight = of.weight;
    for (int r = 0; r < c.runs; ++r)
        for (int k = 0; k < c.run; k += DEPTH) {
            const int count = (int)least(DEPTH, c.run - k), units = vectors_of(count, PAIR);
            Rows rows[2] = {rows_of(c, strips[0], c.jump[r] + k, count, copies[0])};
            if (two) rows[1] = rows_of(c, strips[1], c.jump[r] + k, count, copies[1]);
            if (units == STRIP) {
                PRODUCTS(4, 5)
            } else {
                PRODUCTS(6, 7)
            }
            weight += units * B * LANES;
        }
    TILE_STORE(0, sums[0], sizeof sums[0]);
    if (B == 2) TILE_STORE(1, sums[0] + LANES, sizeof sums[0]);
    if (two) {
        TILE_STORE(2, sums[STRIP], sizeof sums[0]);
        if (B == 2) TILE_STORE(3, sums[STRIP] + LANES, sizeof sums[0]);
    }
    V scale[B], shift[B], sum[B];
    finish_by(c, of, scale, shift);
    for (int p = 0; p < valid; ++p) {
        for (int b = 0; b < B; ++b) sum[b] = load(sums[p] + b * LANES);
        finish_all<B>(c, places[p], raw_of(chunk, from + p), of.first, of.left, sum, scale, shift);
    }
}
