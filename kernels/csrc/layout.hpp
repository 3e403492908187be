// Rows of RGB bytes -> patches in the order of Qwen2-VL's processor: (grid_h/m, grid_w/m, m, m, channel, temporal, p, p).
//
// Rules: a value is (x - mean) / std in float32, or x * factor, the processor's own operations in its own order, so that it rounds
// alike; bfloat16 and float16 are that value rounded to nearest even. Temporal copies are written as each value is made.
#pragma once

#include "passes.hpp"

namespace sidecar {

struct Values {
    bool normalise = false;  // else x * factor
    float mean[3] = {0, 0, 0}, deviation[3] = {1, 1, 1};
    float factor = 1;

    float of(int channel, uint8_t x) const {
        return normalise ? (static_cast<float>(x) - mean[channel]) / deviation[channel] : static_cast<float>(x) * factor;
    }
};

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct U8 {
    using Type = uint8_t;
    static uint8_t make(const Values&, int, uint8_t x) { return x; }
};
struct F32 {
    using Type = float;
    static float make(const Values& v, int c, uint8_t x) { return v.of(c, x); }
};
struct BF16 {
    using Type = uint16_t;
    static uint16_t make(const Values& v, int c, uint8_t x) { return to_bf16(v.of(c, x)); }
};

// One patch whose first pixel is `at` bytes into each of the `p` rows, by the table (channel, byte) -> value.
template <class T>
void patch_plain(const uint8_t* const* rows, size_t at, int p, int temporal, const T* table, T* out) {
    for (int c = 0; c < 3; ++c)
        for (int t = 0; t < temporal; ++t)
            for (int y = 0; y < p; ++y)
                for (int x = 0; x < p; ++x) *out++ = table[c * 256 + rows[y][at + 3 * x + c]];
}

#ifdef SIDECAR_X86

// 16 pixels (48 bytes) to one register a channel.
SIDECAR_AVX2 inline void planes_avx2(const uint8_t* in, __m128i* plane) {
    const char Z = -128;
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 32));
    const __m128i ra = _mm_setr_epi8(0, 3, 6, 9, 12, 15, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z);
    const __m128i rb = _mm_setr_epi8(Z, Z, Z, Z, Z, Z, 2, 5, 8, 11, 14, Z, Z, Z, Z, Z);
    const __m128i rc = _mm_setr_epi8(Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, 1, 4, 7, 10, 13);
    const __m128i ga = _mm_setr_epi8(1, 4, 7, 10, 13, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z);
    const __m128i gb = _mm_setr_epi8(Z, Z, Z, Z, Z, 0, 3, 6, 9, 12, 15, Z, Z, Z, Z, Z);
    const __m128i gc = _mm_setr_epi8(Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, 2, 5, 8, 11, 14);
    const __m128i ba = _mm_setr_epi8(2, 5, 8, 11, 14, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z);
    const __m128i bb = _mm_setr_epi8(Z, Z, Z, Z, Z, 1, 4, 7, 10, 13, Z, Z, Z, Z, Z, Z);
    const __m128i bc = _mm_setr_epi8(Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, 0, 3, 6, 9, 12, 15);
    plane[0] = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, ra), _mm_shuffle_epi8(b, rb)), _mm_shuffle_epi8(c, rc));
    plane[1] = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, ga), _mm_shuffle_epi8(b, gb)), _mm_shuffle_epi8(c, gc));
    plane[2] = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, ba), _mm_shuffle_epi8(b, bb)), _mm_shuffle_epi8(c, bc));
}

struct Vector {  // eight bytes -> eight values
    __m256 mean, deviation;
    bool normalise;
};

SIDECAR_AVX2 inline __m256 eight_avx2(const Vector& v, __m128i bytes) {
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    return v.normalise ? _mm256_div_ps(_mm256_sub_ps(x, v.mean), v.deviation) : _mm256_mul_ps(x, v.deviation);
}

SIDECAR_AVX2 inline void store_avx2(float* out, __m256 value) { _mm256_storeu_ps(out, value); }

SIDECAR_AVX2 inline void store_avx2(uint16_t* out, __m256 value) {
    const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

// As patch_plain, for 8 <= p <= 16: a row of a patch is its first eight values and its last eight, which may overlap.
template <class T>
SIDECAR_AVX2 inline void patch_avx2(const uint8_t* const* rows, size_t at, int p, int temporal, const Values& values, T* out) {
    alignas(16) uint8_t bytes[3][16][16];
    for (int y = 0; y < p; ++y) {
        __m128i plane[3];
        planes_avx2(rows[y] + at, plane);
        for (int c = 0; c < 3; ++c) _mm_store_si128(reinterpret_cast<__m128i*>(bytes[c][y]), plane[c]);
    }
    for (int c = 0; c < 3; ++c) {
        const float by = values.normalise ? values.deviation[c] : values.factor;
        const Vector v{_mm256_set1_ps(values.mean[c]), _mm256_set1_ps(by), values.normalise};
        for (int y = 0; y < p; ++y) {
            const uint8_t* in = bytes[c][y];
            const __m256 first = eight_avx2(v, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
            const __m256 last = eight_avx2(v, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + p - 8)));
            T* row = out + static_cast<size_t>(c) * temporal * p * p + static_cast<size_t>(y) * p;
            for (int t = 0; t < temporal; ++t, row += p * p) {
                store_avx2(row, first);
                store_avx2(row + p - 8, last);
            }
        }
    }
}

SIDECAR_AVX2 inline void patch_avx2(const uint8_t* const* rows, size_t at, int p, int temporal, const Values&, uint8_t* out) {
    alignas(16) uint8_t bytes[3][16][16];
    for (int y = 0; y < p; ++y) {
        __m128i plane[3];
        planes_avx2(rows[y] + at, plane);
        for (int c = 0; c < 3; ++c) _mm_store_si128(reinterpret_cast<__m128i*>(bytes[c][y]), plane[c]);
    }
    for (int c = 0; c < 3; ++c)
        for (int t = 0; t < temporal; ++t)
            for (int y = 0; y < p; ++y, out += p) {  // as above: its first eight bytes and its last eight
                std::memcpy(out, bytes[c][y], 8);
                std::memcpy(out + p - 8, bytes[c][y] + p - 8, 8);
            }
}

// Copies past the caches: the result is larger than they are, and nobody here reads it again.
SIDECAR_AVX2 inline void stream_avx2(const void* from, void* to, size_t bytes) {
    const auto* in = static_cast<const __m256i*>(from);
    auto* out = static_cast<__m256i*>(to);
    for (size_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(out + i, _mm256_load_si256(in + i));
}

#endif

}  // namespace sidecar
