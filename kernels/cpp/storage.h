// How bfloat16 is read and made; float16.h is for the other numbers of 16 bits.

#include <stdint.h>
#include <string.h>

static inline float from_bfloat16(uint16_t x) { return __builtin_bit_cast(float, (uint32_t)x << 16); }

static inline uint16_t upper_half(float x) { return (uint16_t)(__builtin_bit_cast(uint32_t, x) >> 16); }

// The bits of the nearest number, ties to even, in the upper half. A NaN must be one that a bfloat16 has, too, as those
// are that arithmetic makes, of such and of numbers: another could become Inf or 0. No rule makes one of bits.
static inline int32_t rounded_bfloat16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return (int32_t)(bits + 0x7FFF + ((bits >> 16) & 1));
}

// The same number; NaN as a bfloat16 has it.
template <class T> static inline T with_short_nan(T x) { return x == x ? x : (T)__builtin_nanf(""); }

static inline uint16_t to_bfloat16(float x) { return (uint16_t)((uint32_t)rounded_bfloat16(with_short_nan(x)) >> 16); }

// Pairs in a row: the lower halves of N / 2 integers, and then the upper ones. No element moves to another place in a
// vector, which takes as long as all the arithmetic of a step.
template <int N> static inline void from_bfloat16_pairs(const uint16_t *from, float *to) {
#pragma omp simd
    for (int i = 0; i < N / 2; ++i) {
        uint32_t pair;
        memcpy(&pair, from + 2 * i, 4);
        to[i] = __builtin_bit_cast(float, pair << 16);
        to[i + N / 2] = __builtin_bit_cast(float, pair & 0xFFFF0000u);
    }
}

template <int N> static inline void to_bfloat16_pairs(const int32_t *from, uint16_t *to) {
#pragma omp simd
    for (int i = 0; i < N / 2; ++i) {
        const uint32_t pair = (uint32_t)from[i] >> 16 | ((uint32_t)from[i + N / 2] & 0xFFFF0000u);
        memcpy(to + 2 * i, &pair, 4);
    }
}
