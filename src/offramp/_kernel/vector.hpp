// Vectors of one instruction set: LANES floats. Maps hold Real; what is worked out of them is float.
typedef float V __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline V load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, V value) { *reinterpret_cast<Loose*>(to) = value; }

#if LANES == 16
inline __mmask16 leading(int count) { return (__mmask16)((1u << count) - 1); }
inline V load_part(const float* from, int count) { return (V)_mm512_maskz_loadu_ps(leading(count), from); }
inline void store_part(float* to, V value, int count) { _mm512_mask_storeu_ps(to, leading(count), (__m512)value); }
inline V spread(float value) { return (V)_mm512_set1_ps(value); }
inline float total(V value) { return _mm512_reduce_add_ps((__m512)value); }
inline float largest_of(V value) { return _mm512_reduce_max_ps((__m512)value); }
#elif LANES == 8
const int32_t LEADING[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i leading(int count) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(LEADING + 8 - count)); }
inline V load_part(const float* from, int count) { return (V)_mm256_maskload_ps(from, leading(count)); }
inline void store_part(float* to, V value, int count) { _mm256_maskstore_ps(to, leading(count), (__m256)value); }
inline V spread(float value) { return (V)_mm256_set1_ps(value); }
inline float total(V value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest_of(V value) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
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
inline float total(V value) { return (value[0] + value[1]) + (value[2] + value[3]); }
inline float largest_of(V value) {
    const float one = value[0] > value[1] ? value[0] : value[1], other = value[2] > value[3] ? value[2] : value[3];
    return one > other ? one : other;
}
#endif

#if BF16
typedef uint16_t Real;
constexpr int PAIR = 2;
inline V widened(__m256i half) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16); }
inline __m256i narrowed(V value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }  // to the nearest, ties to even
inline V load(const Real* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline V load_part(const Real* from, int count) { return widened(_mm256_maskz_loadu_epi16(leading(count), from)); }
inline void store(Real* to, V value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(value)); }
inline void store_part(Real* to, V value, int count) { _mm256_mask_storeu_epi16(to, leading(count), narrowed(value)); }
// The next values of a run as they are, zeros after `count`.
inline V load_run(const Real* from, int count) {
    const __mmask32 some = count < 32 ? (__mmask32)((1u << count) - 1) : ~(__mmask32)0;
    return (V)_mm512_maskz_loadu_epi16(some, from);
}
inline V spread_pair(const Real* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, sizeof pair);
    return (V)_mm512_set1_epi32(pair);
}
inline V spread_last(const Real* from) { return (V)_mm512_set1_epi32(*from); }
inline V add_product(V sum, V w, V x) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
#else
typedef float Real;
constexpr int PAIR = 1;
inline V spread_pair(const Real* from) { return spread(*from); }
inline V spread_last(const Real* from) { return spread(*from); }
inline V add_product(V sum, V w, V x) { return sum + w * x; }
#endif

template <class T>
inline V load_upto(const T* from, int count) {
    return count >= LANES ? load(from) : load_part(from, count);
}
template <class T>
inline void store_upto(T* to, V value, int count) {
    if (count >= LANES) store(to, value);
    else store_part(to, value, count);
}

inline Real* at(const Plane& plane, uint32_t place) {
    return static_cast<Real*>(plane.at) + row_of(place) * plane.row + column_of(place) * plane.step;
}

#if !BF16
inline V load_run(const Real* from, int count) { return load_upto(from, count); }
#endif

inline V relu(V value) { return value < V{} ? V{} : value; }  // a NaN stays one, as in torch

inline void fetch(const Real* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(Real)) __builtin_prefetch(from + i);
}
