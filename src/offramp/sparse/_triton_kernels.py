# mypy: ignore-errors
"""Kernels in Triton's language, for :mod:`offramp.sparse.triton`; imported only where Triton is there.

Maps are matrices of H W rows of C channels, ``step`` values from one row to the next. How many places a list has is
read from the device's memory, so that no launch waits for the host: programs share the tiles out among themselves, and
where a list is empty they end at once.
"""

import triton
import triton.language as tl

_FAR = tl.constexpr(99)  # beyond any squared distance within a 7x7 window
_NOTHING = tl.constexpr(2.0**-26)  # weights, relative to the nearest one's, that float32 does not resolve

# ---- where ---------------------------------------------------------------------------------------------------------


@triton.jit
def _append(chosen, at, places, count):
    """Places that are chosen go to the end of a list, in their order within a program's."""
    number = tl.cumsum(chosen, 0)
    start = tl.atomic_add(count, tl.sum(chosen, 0))
    tl.store(places + start + number - 1, at, mask=chosen > 0)


@triton.jit
def settle(mask, width, sizes, near, marks, lists, counts, B: tl.constexpr):
    """Grid (blocks, levels). sizes: by level its first mark, height, width, and where ``near`` has the row and column
    of the mask for each of its own."""
    level = tl.program_id(1)
    first, tall, wide = tl.load(sizes + level * 5), tl.load(sizes + level * 5 + 1), tl.load(sizes + level * 5 + 2)
    rows, columns = tl.load(sizes + level * 5 + 3), tl.load(sizes + level * 5 + 4)
    at = tl.program_id(0) * B + tl.arange(0, B)
    here = at < tall * wide
    y = tl.load(near + rows + at // wide, mask=here, other=0)
    x = tl.load(near + columns + at % wide, mask=here, other=0)
    active = tl.load(mask + y * width + x, mask=here, other=0).to(tl.int32)
    tl.store(marks + first + at, active.to(tl.uint8), mask=here)
    _append(active, at, lists + first, counts + level)


@triton.jit
def reach(jobs, axes, marks, B: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (blocks, jobs): marks what is read from the places that are marked; see ``_job`` for a job's columns."""
    job = jobs + tl.program_id(1) * COLUMNS
    active, region, tall, wide = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    goal, height, width, resizes = tl.load(job + 4), tl.load(job + 5), tl.load(job + 6), tl.load(job + 7)
    at = tl.program_id(0) * B + tl.arange(0, B)
    here = at < tall * wide
    asked = tl.load(marks + active + at, mask=here, other=0) + tl.load(marks + region + at, mask=here, other=0)
    here = here & (asked > 0)
    y, x, one = at // wide, at % wide, tl.full((B,), 1, tl.uint8)
    if resizes > 0:
        for down in range(2):
            row = tl.load(axes + tl.load(job + 8 + down) + y, mask=here, other=0)
            for right in range(2):
                column = tl.load(axes + tl.load(job + 10 + right) + x, mask=here, other=0)
                tl.store(marks + goal + row * width + column, one, mask=here)
    else:
        y = y * tl.load(job + 10) - tl.load(job + 12)
        x = x * tl.load(job + 11) - tl.load(job + 13)
        for i in range(tl.load(job + 8)):
            row = y + i * tl.load(job + 14)
            for j in range(tl.load(job + 9)):
                column = x + j * tl.load(job + 15)
                inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                tl.store(marks + goal + row * width + column, one, mask=inside)


@triton.jit
def halo(regions, marks, lists, counts, B: tl.constexpr):
    """Grid (blocks, regions): lists where a region stands beside active places. regions: the count's number, the first
    mark, that of the level, and the level's size."""
    region = regions + tl.program_id(1) * 4
    number, first, active, size = tl.load(region), tl.load(region + 1), tl.load(region + 2), tl.load(region + 3)
    at = tl.program_id(0) * B + tl.arange(0, B)
    here = at < size
    beside = tl.load(marks + first + at, mask=here, other=0) > tl.load(marks + active + at, mask=here, other=0)
    _append(beside.to(tl.int32), at, lists + first, counts + number)


# ---- operations ----------------------------------------------------------------------------------------------------


@triton.jit
def _finish(value, at, channel, keep, residual, residual_step, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    if RESIDUAL:
        value += tl.load(residual + at[:, None] * residual_step + channel[None, :], mask=keep, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # what is not a number stays
    return value


@triton.jit
def convolve(
    source, source_step, out, out_step, raw, residual, residual_step, weight, scale, shift, places, count,
    height, width, wide, stride_y, stride_x, pad_y, pad_x, by_y, by_x,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr, ACROSS: tl.constexpr,
    RAW: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):
    """At active places: P of them x N outputs of a group, summed over taps and inputs, K of these at a time.

    INPUTS, OUTPUTS: of a group. ACROSS: taps of a row. weight: (groups, taps, INPUTS, OUTPUTS).
    """
    many = tl.load(count)
    blocks: tl.constexpr = (OUTPUTS + N - 1) // N
    for tile in range(tl.program_id(0), tl.cdiv(many, P) * blocks * GROUPS, tl.num_programs(0)):
        group = tile // blocks % GROUPS
        i = tile // (blocks * GROUPS) * P + tl.arange(0, P)
        here = i < many
        at = tl.load(places + i, mask=here, other=0)
        y, x = at // wide * stride_y - pad_y, at % wide * stride_x - pad_x
        n = tile % blocks * N + tl.arange(0, N)
        total = tl.zeros((P, N), tl.float32)
        for start in range(0, TAPS * INPUTS, K):
            k = start + tl.arange(0, K)
            if INPUTS % K == 0:  # one tap
                tap = start // INPUTS
                row, column = (y + tap // ACROSS * by_y)[:, None], (x + tap % ACROSS * by_x)[:, None]
                channel = start % INPUTS + tl.arange(0, K)
            else:
                tap = k // INPUTS
                row = y[:, None] + (tap // ACROSS * by_y)[None, :]
                column = x[:, None] + (tap % ACROSS * by_x)[None, :]
                channel = k % INPUTS
            inside = here[:, None] & (k < TAPS * INPUTS)[None, :]
            inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            rows = tl.load(source + (row * width + column) * source_step + (group * INPUTS + channel)[None, :],
                           mask=inside, other=0.0)
            columns = tl.load(weight + (group * (TAPS * INPUTS) + k)[:, None] * OUTPUTS + n[None, :],
                              mask=(k < TAPS * INPUTS)[:, None] & (n < OUTPUTS)[None, :], other=0.0)
            total = tl.dot(rows, columns, total, input_precision=PRECISION)
        keep, channel = here[:, None] & (n < OUTPUTS)[None, :], group * OUTPUTS + n
        if RAW:
            tl.store(raw + at[:, None] * (OUTPUTS * GROUPS) + channel[None, :], total, mask=keep)
        value = total * tl.load(scale + channel, mask=n < OUTPUTS, other=0.0)[None, :]
        value += tl.load(shift + channel, mask=n < OUTPUTS, other=0.0)[None, :]
        value = _finish(value, at, channel, keep, residual, residual_step, RESIDUAL, RELU)
        tl.store(out + at[:, None] * out_step + channel[None, :], value, mask=keep)


@triton.jit
def depthwise(
    source, source_step, out, out_step, raw, residual, residual_step, weight, scale, shift, places, count,
    height, width, wide, stride_y, stride_x, pad_y, pad_x, by_y, by_x,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, ACROSS: tl.constexpr,
    RAW: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):
    """As ``convolve``, of one input and one output a group. weight: (taps, CHANNELS)."""
    many = tl.load(count)
    blocks: tl.constexpr = (CHANNELS + N - 1) // N
    for tile in range(tl.program_id(0), tl.cdiv(many, P) * blocks, tl.num_programs(0)):
        i, channel = tile // blocks * P + tl.arange(0, P), tile % blocks * N + tl.arange(0, N)
        here, known = i < many, channel < CHANNELS
        at = tl.load(places + i, mask=here, other=0)
        y, x = at // wide * stride_y - pad_y, at % wide * stride_x - pad_x
        total = tl.zeros((P, N), tl.float32)
        for tap in range(TAPS):
            row, column = y + tap // ACROSS * by_y, x + tap % ACROSS * by_x
            inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            rows = tl.load(source + (row * width + column)[:, None] * source_step + channel[None, :],
                           mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            total += rows * tl.load(weight + tap * CHANNELS + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        keep = here[:, None] & known[None, :]
        if RAW:
            tl.store(raw + at[:, None] * CHANNELS + channel[None, :], total, mask=keep)
        value = total * tl.load(scale + channel, mask=known, other=0.0)[None, :]
        value += tl.load(shift + channel, mask=known, other=0.0)[None, :]
        value = _finish(value, at, channel, keep, residual, residual_step, RESIDUAL, RELU)
        tl.store(out + at[:, None] * out_step + channel[None, :], value, mask=keep)


@triton.jit
def fill(
    raw, out, out_step, residual, residual_step, scale, shift, bare, places, count, marks, height, width, sharp,
    CHANNELS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):
    """Beside active places: the mean of the raw ones that are active in the 7x7 window; weights exp(-sharp d^2)."""
    many = tl.load(count)
    blocks: tl.constexpr = (CHANNELS + N - 1) // N
    for tile in range(tl.program_id(0), tl.cdiv(many, P) * blocks, tl.num_programs(0)):
        i, channel = tile // blocks * P + tl.arange(0, P), tile % blocks * N + tl.arange(0, N)
        here, known = i < many, channel < CHANNELS
        at = tl.load(places + i, mask=here, other=0)
        y, x = at // width, at % width
        nearest = tl.full((P,), _FAR, tl.int32)
        for tap in range(49):
            down, right = tap // 7 - 3, tap % 7 - 3
            inside = here & (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
            active = tl.load(marks + at + down * width + right, mask=inside, other=0) > 0
            nearest = tl.where(active, tl.minimum(nearest, down * down + right * right), nearest)
        total, weights = tl.zeros((P, N), tl.float32), tl.zeros((P,), tl.float32)
        for tap in range(49):
            down, right = tap // 7 - 3, tap % 7 - 3
            inside = here & (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
            active = tl.load(marks + at + down * width + right, mask=inside, other=0) > 0
            excess = tl.maximum(down * down + right * right - nearest, 0)
            weight = tl.where(active, tl.exp(-sharp * excess), 0.0)
            counts = weight >= _NOTHING
            rows = tl.load(raw + (at + down * width + right)[:, None] * CHANNELS + channel[None, :],
                           mask=counts[:, None] & known[None, :], other=0.0).to(tl.float32)
            total += tl.where(counts, weight, 0.0)[:, None] * rows
            weights += tl.where(counts, weight, 0.0)
        found = nearest < _FAR
        value = total / tl.where(found, weights, 1.0)[:, None]
        value = value * tl.load(scale + channel, mask=known, other=0.0)[None, :]
        value += tl.load(shift + channel, mask=known, other=0.0)[None, :]
        value = tl.where(found[:, None], value, tl.load(bare + channel, mask=known, other=0.0)[None, :])
        keep = here[:, None] & known[None, :]
        value = _finish(value, at, channel, keep, residual, residual_step, RESIDUAL, RELU)
        tl.store(out + at[:, None] * out_step + channel[None, :], value, mask=keep)


@triton.jit
def _standing(i, active, actives, beside, many):
    """The places of a region: the active ones, then those beside them."""
    at = tl.load(active + i, mask=i < actives, other=0)
    return at + tl.load(beside + i - actives, mask=(i >= actives) & (i < many), other=0)


@triton.jit
def add(
    terms, axes, parts, out, out_step, scale, shift, active, active_count, beside, beside_count, wide,
    HOWS: tl.constexpr, CHANNELS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, RELU: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):
    """terms: each a matrix, its step and width, and where ``axes`` and ``parts`` have what a resize reads: first rows,
    second rows, first columns, second columns. HOWS: of each, 0 as it is, 1 nearest, 2 bilinear."""
    actives = tl.load(active_count)
    many = actives + tl.load(beside_count)
    blocks: tl.constexpr = (CHANNELS + N - 1) // N
    for tile in range(tl.program_id(0), tl.cdiv(many, P) * blocks, tl.num_programs(0)):
        i, channel = tile // blocks * P + tl.arange(0, P), tile % blocks * N + tl.arange(0, N)
        here, known = i < many, channel < CHANNELS
        at = _standing(i, active, actives, beside, many)
        y, x, keep = at // wide, at % wide, here[:, None] & known[None, :]
        value = tl.zeros((P, N), tl.float32)
        for t in tl.static_range(len(HOWS)):
            source, step, width = terms[t][0], terms[t][1], terms[t][2]
            if HOWS[t] == 0:
                value += tl.load(source + at[:, None] * step + channel[None, :], mask=keep, other=0.0).to(tl.float32)
            else:
                top = tl.load(axes + terms[t][3] + y, mask=here, other=0) * width
                left = tl.load(axes + terms[t][5] + x, mask=here, other=0)
                here_left = tl.load(source + (top + left)[:, None] * step + channel[None, :], mask=keep,
                                    other=0.0).to(tl.float32)
                if HOWS[t] == 1:
                    value += here_left
                else:
                    bottom = tl.load(axes + terms[t][4] + y, mask=here, other=0) * width
                    right = tl.load(axes + terms[t][6] + x, mask=here, other=0)
                    down = tl.load(parts + terms[t][3] + y, mask=here, other=0.0)[:, None]
                    across = tl.load(parts + terms[t][5] + x, mask=here, other=0.0)[:, None]
                    here_right = tl.load(source + (top + right)[:, None] * step + channel[None, :], mask=keep,
                                         other=0.0).to(tl.float32)
                    below_left = tl.load(source + (bottom + left)[:, None] * step + channel[None, :], mask=keep,
                                         other=0.0).to(tl.float32)
                    below_right = tl.load(source + (bottom + right)[:, None] * step + channel[None, :], mask=keep,
                                          other=0.0).to(tl.float32)
                    above = here_left * (1 - across) + here_right * across
                    value += above * (1 - down) + (below_left * (1 - across) + below_right * across) * down
        if SCALE:
            value = value * tl.load(scale + channel, mask=known, other=0.0)[None, :]
        if SHIFT:
            value += tl.load(shift + channel, mask=known, other=0.0)[None, :]
        if RELU:
            value = tl.where(value < 0, 0.0, value)
        tl.store(out + at[:, None] * out_step + channel[None, :], value, mask=keep)


@triton.jit
def pool(
    source, source_step, out, out_step, active, active_count, beside, beside_count,
    height, width, wide, stride_y, stride_x, pad_y, pad_x, by_y, by_x,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, ACROSS: tl.constexpr, MEAN: tl.constexpr, PADDED: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):
    """PADDED: a mean counts its padding, but no place beyond that."""
    actives = tl.load(active_count)
    many = actives + tl.load(beside_count)
    blocks: tl.constexpr = (CHANNELS + N - 1) // N
    for tile in range(tl.program_id(0), tl.cdiv(many, P) * blocks, tl.num_programs(0)):
        i, channel = tile // blocks * P + tl.arange(0, P), tile % blocks * N + tl.arange(0, N)
        here, known = i < many, channel < CHANNELS
        at = _standing(i, active, actives, beside, many)
        y, x = at // wide * stride_y - pad_y, at % wide * stride_x - pad_x
        value = tl.full((P, N), 0.0 if MEAN else float("-inf"), tl.float32)
        size = tl.zeros((P,), tl.int32)
        for tap in range(TAPS):
            row, column = y + tap // ACROSS * by_y, x + tap % ACROSS * by_x
            inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            rows = tl.load(source + (row * width + column)[:, None] * source_step + channel[None, :],
                           mask=inside[:, None] & known[None, :], other=0.0 if MEAN else float("-inf")).to(tl.float32)
            if MEAN:
                value += rows
                if PADDED:
                    size += ((row < height + pad_y) & (column < width + pad_x)).to(tl.int32)
                else:
                    size += inside.to(tl.int32)
            else:
                value = tl.maximum(value, rows, propagate_nan=tl.PropagateNan.ALL)
        if MEAN:
            value = value / tl.maximum(size, 1).to(tl.float32)[:, None]
        tl.store(out + at[:, None] * out_step + channel[None, :], value, mask=here[:, None] & known[None, :])
