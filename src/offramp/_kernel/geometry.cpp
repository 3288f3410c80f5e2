// What a mask says of every level and region of a program: active places, regions, halos, and what these are means of.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.hpp"

namespace offramp {

bool give_room(void** at, int64_t* room, int64_t count, int64_t size) {
    if (count <= *room) return true;
    free(*at);
    *at = malloc((size_t)(count * size));
    *room = *at ? count : 0;
    return *at != nullptr;
}

namespace {

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

// As torch's interpolate to a given size does by nearest.
int64_t nearest(int64_t place, int64_t from, int64_t to) {
    if (from == to) return place;
    return least((int64_t)floorf((float)place * ((float)from / (float)to)), from - 1);
}

// Calls one(place, x, y) where a map of booleans is true. A row's places are looked at eight at a time: most are alike.
template <class One>
void each(const uint8_t* map, int32_t height, int32_t width, One one) {
    for (int32_t y = 0; y < height; ++y, map += width) {
        const uint32_t row = (uint32_t)y << 16;
        int32_t x = 0;
        for (; x + 8 <= width; x += 8) {
            uint64_t eight;
            memcpy(&eight, map + x, 8);
            if (!eight) continue;
            for (int i = 0; i < 8; ++i) one(row | (uint32_t)(x + i), map[x + i]);
        }
        for (; x < width; ++x) one(row | (uint32_t)x, map[x]);
    }
}

// `places` are those where a map of booleans is true: written always and counted where true, for a branch would often be
// guessed wrong. It has room for all, and for one more.
void list(const uint8_t* map, int32_t height, int32_t width, List<uint32_t>& places) {
    int64_t count = 0;
    each(map, height, width, [&](uint32_t place, uint8_t here) {
        places.at[count] = place;
        count += here;
    });
    places.count = count;
}

// Where each row begins.
bool by_rows(const List<uint32_t>& places, int32_t height, List<int32_t>& rows) {
    if (!room(rows, height + 1)) return false;
    int64_t place = 0;
    for (int32_t y = 0; y <= height; ++y) {
        while (place < places.count && row_of(places.at[place]) < y) ++place;
        rows.at[y] = (int32_t)place;
    }
    return true;
}

// Bytes may lie over anything, so that a compiler keeps no pointer in a register beside them unless it is told to.
void add_row(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] |= from[i];
}

void without(uint8_t* to, const uint8_t* all, const uint8_t* __restrict some, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = all[i] & (some[i] ^ 1);
}

int64_t up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// Places of a map that a window reads from the places `read` of its output. rows: room for (height, from.width).
void through_window(const Read& r, const Level& from, const uint8_t* read, const Level& to, uint8_t* all,
                    uint8_t* rows) {
    const Window& w = r.window;
    memset(rows, 0, (size_t)((int64_t)to.height * from.width));
    for (int64_t y = 0; y < from.height; ++y)
        for (int i = 0; i < w.kernel[0]; ++i) {
            const int64_t there = y * w.stride[0] - w.padding[0] + (int64_t)i * w.dilation[0];
            if (there >= 0 && there < to.height) add_row(rows + there * from.width, read + y * from.width, from.width);
        }
    for (int64_t y = 0; y < to.height; ++y) {
        const uint8_t* row = rows + y * from.width;
        uint8_t* into = all + y * to.width;
        for (int j = 0; j < w.kernel[1]; ++j) {
            const int64_t shift = (int64_t)j * w.dilation[1] - w.padding[1], step = w.stride[1];
            const int64_t first = up(-shift, step), last = least(from.width, up(to.width - shift, step));
            if (step == 1 && first < last) add_row(into + first + shift, row + first, last - first);
            else for (int64_t x = first; x < last; ++x) into[x * step + shift] |= row[x];
        }
    }
}

// Places of a map that are read when it is resized to the places `read`. spans: room for 2 * to.width.
void through_resize(const Read& r, const Level& from, const uint8_t* read, const Level& to, uint8_t* all,
                    uint8_t* rows, int32_t* spans) {
    memset(rows, 0, (size_t)((int64_t)to.height * from.width));
    const bool twice = r.rows.part != nullptr;
    for (int64_t y = 0; y < from.height; ++y) {
        const uint8_t* row = read + y * from.width;
        add_row(rows + (int64_t)r.rows.first[y] * from.width, row, from.width);
        if (twice) add_row(rows + (int64_t)r.rows.second[y] * from.width, row, from.width);
    }
    // Those that read a column lie side by side: second is first or the next one, and both only grow.
    for (int32_t x = 0, first = 0, last = 0; x < to.width; ++x) {
        while (first < from.width && r.columns.second[first] < x) ++first;
        while (last < from.width && r.columns.first[last] <= x) ++last;
        spans[2 * x] = first;
        spans[2 * x + 1] = last;
    }
    for (int64_t y = 0; y < to.height; ++y) {
        const uint8_t* row = rows + y * from.width;
        uint8_t* into = all + y * to.width;
        for (int64_t x = 0; x < to.width; ++x) {
            uint8_t any = into[x];
            for (int32_t i = spans[2 * x]; i < spans[2 * x + 1]; ++i) any |= row[i];
            into[x] = any;
        }
    }
}

bool activate(Level& level, const uint8_t* mask, int32_t height, int32_t width) {
    const int64_t size = (int64_t)level.height * level.width;
    if (!room(level.on, size) || !room(level.wanted, size) || !room(level.active, size + 1) ||
        !room(level.halo, size + 1)) return false;
    const int64_t wide = level.width;
    for (int64_t y = 0; y < level.height; ++y) {
        const uint8_t* row = mask + nearest(y, height, level.height) * width;
        uint8_t* __restrict to = level.on.at + y * wide;
        if (width == wide) memcpy(to, row, (size_t)wide);
        else for (int64_t x = 0; x < wide; ++x) to[x] = row[nearest(x, width, wide)];
    }
    list(level.on.at, level.height, level.width, level.active);
    memset(level.wanted.at, 0, (size_t)size);
    return by_rows(level.active, level.height, level.rows);
}

bool reach(Plan& plan, Region& region) {
    const Level& level = *region.level;
    const int64_t size = (int64_t)level.height * level.width;
    if (!room(region.all, size) || !room(region.halo, size + 1)) return false;
    memcpy(region.all.at, level.on.at, (size_t)size);
    for (int32_t i = 0; i < region.num_reads; ++i) {
        const Read& read = region.reads[i];
        const Level& from = plan.levels[read.level];
        if (!room(plan.scratch, (int64_t)level.height * from.width) || !room(plan.spans, 2 * level.width)) return false;
        const uint8_t* there = read.region < 0 ? from.on.at : plan.regions[read.region].all.at;
        if (read.resized)
            through_resize(read, from, there, level, region.all.at, plan.scratch.at, plan.spans.at);
        else
            through_window(read, from, there, level, region.all.at, plan.scratch.at);
    }
    if (!room(plan.scratch, size)) return false;
    without(plan.scratch.at, region.all.at, level.on.at, size);
    list(plan.scratch.at, level.height, level.width, region.halo);
    if (region.interpolates) add_row(level.wanted.at, region.all.at, size);
    return by_rows(region.halo, level.height, region.rows);
}

// What each place that is interpolated for some region is a mean of.
bool neighbours(Level& level, int32_t reach) {
    Offset window[SQUARES * SQUARES];
    const int around = offsets(window);
    const int64_t wide = level.width + 2 * WINDOW, size = wide * (level.height + 2 * WINDOW);
    if (!room(level.number, size) || !room(level.saves, level.active.count + 1)) return false;
    memset(level.saves.at, 0, (size_t)level.active.count);
    for (int64_t i = 0; i < size; ++i) level.number.at[i] = -1;
    for (int64_t i = 0; i < level.active.count; ++i) number_at(level, level.active.at[i]) = (int32_t)i;
    without(level.wanted.at, level.wanted.at, level.on.at, (int64_t)level.height * level.width);
    list(level.wanted.at, level.height, level.width, level.halo);
    const int64_t wanted = level.halo.count, nobody = level.active.count;
    if (!room(level.start, wanted + 1) || !room(level.source, around * wanted + 1) ||
        !room(level.excess, around * wanted + 1)) return false;
    int64_t steps[SQUARES * SQUARES];
    for (int i = 0; i < around; ++i) steps[i] = window[i].dy * wide + window[i].dx;
    int32_t pairs = 0, *start = level.start.at, *source = level.source.at;
    uint8_t *__restrict excess = level.excess.at, *__restrict saves = level.saves.at;
    for (int64_t h = 0; h < wanted; ++h) {
        int32_t* at = &number_at(level, level.halo.at[h]);
        *at = -2 - (int32_t)h;  // as negative as what is not active
        start[h] = pairs;
        int closest = SQUARES;
        for (int i = 0; i < around && window[i].square <= closest + reach; ++i) {
            const int32_t there = at[steps[i]];
            const int square = window[i].square;
            closest = there >= 0 && square < closest ? square : closest;
            saves[there >= 0 ? there : nobody] = 1;
            source[pairs] = there;
            excess[pairs] = (uint8_t)(square - closest);
            pairs += there >= 0;
        }
    }
    start[wanted] = pairs;
    return true;
}

}  // namespace

// False where there is no memory.
bool settle(Plan& plan, const uint8_t* mask, int32_t height, int32_t width) {
    for (int64_t i = 0; i < plan.num_levels; ++i)
        if (!activate(plan.levels[i], mask, height, width)) return false;
    for (int64_t i = 0; i < plan.num_regions; ++i)
        if (!reach(plan, plan.regions[i])) return false;
    for (int64_t i = 0; i < plan.num_levels; ++i)
        if (!neighbours(plan.levels[i], plan.excess)) return false;
    for (int64_t i = 0; i < plan.num_ops; ++i) {
        const Op& op = plan.ops[i];
        if (op.raw >= 0 && op.region->halo.count &&
            !room(plan.raws[op.raw], op.region->level->active.count * raw_row(*static_cast<const Conv*>(op.body)))) return false;
    }
    return true;
}

}  // namespace offramp
