// How floating-point numbers of 16 bits are read and made.

#include <stdint.h>
#include <string.h>

static inline float from_bfloat16(uint16_t x) { return __builtin_bit_cast(float, (uint32_t)x << 16); }

static inline uint16_t upper_half(float x) { return (uint16_t)(__builtin_bit_cast(uint32_t, x) >> 16); }

// To the nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7FC0);
}

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
