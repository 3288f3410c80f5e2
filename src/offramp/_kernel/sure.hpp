// Which places are sure of a class: the largest probability of their logits reaches a threshold. See body.hpp.

alignas(64) const float FIRST[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));

// For x <= 0, to a few units in the last place; a NaN stays one.
inline V exponential(V x) {
    const V shift = spread(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    x = x < spread(-87.0f) ? spread(-87.0f) : x;
    const V turns = (x * spread(1.44269504f) + shift) - shift;
    const V rest = (x - turns * spread(0.693359375f)) - turns * spread(-2.12194440e-4f);
    V sum = spread(1.9875691500e-4f);
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float factor : factors) sum = sum * rest + spread(factor);
    const V value = sum * rest * rest + rest + spread(1);
    return value * (V)((__builtin_convertvector(turns, Whole) + 127) << 23);
}

// Of each place `within`: 1 where it is not sure, 0 where it is, 2 where `slack` does not let us say; 0 elsewhere.
void judge(const Judging& j, int64_t first, int64_t last) {
    for (int64_t place = first; place < last; ++place) {
        if (j.within && !j.within[place]) {
            j.out[place] = 0;
            continue;
        }
        const float* at = j.logits + place * j.channels;
        const int left = (int)(j.channels % LANES);
        const int64_t whole = j.channels - left;
        const V nothing = spread(-1e30f), ending = load(FIRST) < spread((float)left) ? load_upto(at + whole, left) : nothing;
        V most = ending, sum = {};
        for (int64_t c = 0; c < whole; c += LANES) most = load(at + c) > most ? load(at + c) : most;
        const V largest = spread(largest_of(most));
        for (int64_t c = 0; c < whole; c += LANES) sum += exponential(load(at + c) - largest);
        if (left) sum += exponential(ending - largest);
        const float above = 1 / total(sum) - j.threshold;
        j.out[place] = above > j.slack ? 0 : above < -j.slack ? 1 : 2;
    }
}
