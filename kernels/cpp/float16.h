// How float16 is read and made. A file of its own, as to read the header of the processor's functions takes longer than
// to compile all the rest of a step.

#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline float from_float16(uint16_t x) {
    const uint32_t exponent = x & 0x7C00, sign = (uint32_t)(x & 0x8000) << 16;
    const uint32_t wide = ((uint32_t)(x & 0x7FFF) << 13) + (exponent == 0x7C00 ? 224u << 23 : 112u << 23);
    const float small = (float)(int32_t)(x & 0x3FF) * 0x1p-24f;
    const uint32_t bits = exponent ? wide : __builtin_bit_cast(uint32_t, small);
    return __builtin_bit_cast(float, bits | sign);
}

// Below 2^-14 the steps are those of float32 between 0.5 and 1, so that adding 0.5 rounds.
static inline uint16_t to_float16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), size = bits & 0x7FFFFFFF;
    const float magnitude = __builtin_bit_cast(float, size);
    const uint32_t small = __builtin_bit_cast(uint32_t, magnitude + 0.5f) - 0x3F000000;
    const uint32_t wide = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
    const uint32_t finite = magnitude < 0x1p-14f ? small : magnitude < 65520.0f ? wide : 0x7C00;
    return (uint16_t)((magnitude == magnitude ? finite : 0x7E00) | (bits >> 31 << 15));
}

// Elements in a row. GCC 12 makes no vectors of the processor's own conversions, and without them they take as long as
// all the rest of a step.
template <int N> static inline void from_float16(const uint16_t *from, float *to) {
#if defined(__AVX512F__)
    if (N % 16 == 0) {
        for (int i = 0; i < N; i += 16)
            _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
        return;
    }
#elif defined(__F16C__)
    if (N % 8 == 0) {
        for (int i = 0; i < N; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
        return;
    }
#endif
#pragma omp simd
    for (int i = 0; i < N; ++i) to[i] = from_float16(from[i]);
}

template <int N> static inline void to_float16(const float *from, uint16_t *to) {
#if defined(__AVX512F__)
    if (N % 16 == 0) {
        for (int i = 0; i < N; i += 16)
            _mm256_storeu_si256((__m256i *)(to + i),
                                _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#elif defined(__F16C__)
    if (N % 8 == 0) {
        for (int i = 0; i < N; i += 8)
            _mm_storeu_si128((__m128i *)(to + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
#pragma omp simd
    for (int i = 0; i < N; ++i) to[i] = to_float16(from[i]);
}

// For the norm: an element, and elements as they are best read one by one.
struct Float16 { uint16_t bits; };
static inline double read(const Float16 *x) { return from_float16(x->bits); }
template <int N> struct Row { float x[N]; };
template <int N> static inline Row<N> in_a_row(const Float16 *x) {
    Row<N> row;
    from_float16<N>(&x->bits, row.x);
    return row;
}
