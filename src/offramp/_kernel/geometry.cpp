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
    if (to == 2 * from) return place >> 1;
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

void add_row(uint8_t* to, const uint8_t* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] |= from[i];
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

// Places of a map that are read when it is resized to the places `read`.
void through_resize(const Read& r, const Level& from, const uint8_t* read, const Level& to, uint8_t* all,
                    uint8_t* rows) {
    memset(rows, 0, (size_t)((int64_t)to.height * from.width));
    const bool twice = r.rows.part != nullptr;
    for (int64_t y = 0; y < from.height; ++y) {
        const uint8_t* row = read + y * from.width;
        add_row(rows + (int64_t)r.rows.first[y] * from.width, row, from.width);
        if (twice) add_row(rows + (int64_t)r.rows.second[y] * from.width, row, from.width);
    }
    for (int64_t y = 0; y < to.height; ++y) {
        const uint8_t* row = rows + y * from.width;
        uint8_t* into = all + y * to.width;
        for (int64_t x = 0; x < from.width; ++x) into[r.columns.first[x]] |= row[x];
        for (int64_t x = 0; twice && x < from.width; ++x) into[r.columns.second[x]] |= row[x];
    }
}

bool activate(Level& level, const uint8_t* mask, int32_t height, int32_t width) {
    const int64_t size = (int64_t)level.height * level.width;
    if (!room(level.on, size) || !room(level.wanted, size) || !room(level.active, size + 1)) return false;
    for (int64_t y = 0; y < level.height; ++y) {
        const uint8_t* row = mask + nearest(y, height, level.height) * width;
        uint8_t* to = level.on.at + y * level.width;
        if (width == level.width)
            for (int64_t x = 0; x < width; ++x) to[x] = row[x] != 0;
        else
            for (int64_t x = 0; x < level.width; ++x) to[x] = row[nearest(x, width, level.width)] != 0;
    }
    list(level.on.at, level.height, level.width, level.active);
    memset(level.wanted.at, 0, (size_t)size);
    return true;
}

bool reach(Plan& plan, Region& region) {
    const Level& level = *region.level;
    const int64_t size = (int64_t)level.height * level.width;
    if (!room(region.all, size) || !room(region.halo, size + 1)) return false;
    memcpy(region.all.at, level.on.at, (size_t)size);
    for (int32_t i = 0; i < region.num_reads; ++i) {
        const Read& read = region.reads[i];
        const Level& from = plan.levels[read.level];
        if (!room(plan.scratch, (int64_t)level.height * from.width)) return false;
        const uint8_t* there = read.region < 0 ? from.on.at : plan.regions[read.region].all.at;
        (read.resized ? through_resize : through_window)(read, from, there, level, region.all.at, plan.scratch.at);
    }
    int64_t count = 0;
    each(region.all.at, level.height, level.width, [&](uint32_t place, uint8_t here) {
        region.halo.at[count] = place;
        count += here & !level.on.at[row_of(place) * level.width + column_of(place)];
    });
    region.halo.count = count;
    if (region.interpolates) add_row(level.wanted.at, region.all.at, size);
    return true;
}

// What each place that is interpolated for some region is a mean of.
bool neighbours(Level& level, int32_t reach) {
    Offset window[SQUARES * SQUARES];
    const int around = offsets(window);
    const int64_t wide = level.width + 2 * WINDOW, size = wide * (level.height + 2 * WINDOW);
    if (!room(level.number, size)) return false;
    const auto number_of = [&](uint32_t place) {
        return level.number.at + (row_of(place) + WINDOW) * wide + column_of(place) + WINDOW;
    };
    for (int64_t i = 0; i < size; ++i) level.number.at[i] = -1;
    for (int64_t i = 0; i < level.active.count; ++i) *number_of(level.active.at[i]) = (int32_t)i;
    int64_t wanted = 0;
    for (int64_t i = 0; i < (int64_t)level.height * level.width; ++i) wanted += level.wanted.at[i] & !level.on.at[i];
    if (!room(level.start, wanted + 1) || !room(level.source, around * wanted + 1) ||
        !room(level.excess, around * wanted + 1)) return false;
    int64_t steps[SQUARES * SQUARES];
    for (int i = 0; i < around; ++i) steps[i] = window[i].dy * wide + window[i].dx;
    int32_t pairs = 0, h = 0;
    each(level.wanted.at, level.height, level.width, [&](uint32_t place, uint8_t here) {
        int32_t* at = number_of(place);
        if (!here || *at >= 0) return;
        level.start.at[h] = pairs;
        int closest = SQUARES;
        for (int i = 0; i < around && window[i].square <= closest + reach; ++i) {
            const int32_t there = at[steps[i]];
            const int square = window[i].square;
            closest = there >= 0 && square < closest ? square : closest;
            level.source.at[pairs] = there;
            level.excess.at[pairs] = (uint8_t)(square - closest);
            pairs += there >= 0;
        }
        *at = -2 - h++;  // as negative as what is not active
    });
    level.start.at[h] = pairs;
    level.start.count = wanted;
    return true;
}

bool save(Region& region) {
    const Level& level = *region.level;
    if (!room(region.from, region.halo.count) || !room(region.saves, level.active.count)) return false;
    if (level.active.count) memset(region.saves.at, 0, (size_t)level.active.count);
    const int64_t wide = level.width + 2 * WINDOW;
    for (int64_t h = 0; h < region.halo.count; ++h) {
        const uint32_t place = region.halo.at[h];
        const int32_t number = -2 - level.number.at[(row_of(place) + WINDOW) * wide + column_of(place) + WINDOW];
        region.from.at[h] = number;
        for (int32_t i = level.start.at[number]; i < level.start.at[number + 1]; ++i)
            region.saves.at[level.source.at[i]] = 1;
    }
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
    for (int64_t i = 0; i < plan.num_regions; ++i)
        if (plan.regions[i].interpolates && !save(plan.regions[i])) return false;
    for (int64_t i = 0; i < plan.num_ops; ++i) {
        const Op& op = plan.ops[i];
        if (op.kind != CONV && op.kind != DEPTHWISE) continue;
        const int64_t rows = op.region->halo.count ? op.region->level->active.count : 0;
        if (!room(plan.raws[op.raw], rows * raw_row(*static_cast<const Conv*>(op.body)))) return false;
    }
    return true;
}

}  // namespace offramp
