// How bfloat16 is read and made; float16.h is for the other numbers of 16 bits.

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
