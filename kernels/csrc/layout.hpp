// Rows of RGB bytes -> patches in the order of Qwen2-VL's processor: (grid_h/m, grid_w/m, m, m, channel, temporal, p,
// p).
//
// Rules: a value is (x - mean) / std in float32, or x * factor: the processor's own operations in its own order, so
// that it rounds alike. bfloat16 and float16 are that value rounded to nearest even. A patch is laid out as bytes and
// converted to floats on its way out.
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

inline uint16_t to_f16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
    if (size < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &size, 4);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f)));
    }
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
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
struct F16 {
    using Type = uint16_t;
    static uint16_t make(const Values& v, int c, uint8_t x) { return to_f16(v.of(c, x)); }
};

// One patch whose first pixel is `at` bytes into each of the `p` rows, by the table (channel, byte) -> value. The rows of
// the next frame begin `next` further on; 0: there is one frame.
template <class T>
void patch_plain(const uint8_t* const* rows, size_t next, size_t at, int p, int temporal, const T* table, T* out) {
    for (int c = 0; c < 3; ++c)
        for (int t = 0; t < temporal; ++t)
            for (int y = 0; y < p; ++y)
                for (int x = 0; x < p; ++x) *out++ = table[c * 256 + rows[t * next + y][at + 3 * x + c]];
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

// One patch as bytes, `copies` times, for 8 <= p <= 16: rows are stored as 16 bytes in order, and the next overwrites the
// excess of the last. Its channels are `channel` bytes apart.
SIDECAR_AVX2 inline void patch_avx2(const uint8_t* const* rows, size_t at, int p, int copies, size_t channel, uint8_t* out) {
    const size_t area = static_cast<size_t>(p) * p;
    __m128i plane[3];
    for (int y = 0; y < p - 1; ++y, out += p) {
        planes_avx2(rows[y] + at, plane);
        for (int c = 0; c < 3; ++c)
            for (int t = 0; t < copies; ++t) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * channel + t * area), plane[c]);
    }
    planes_avx2(rows[p - 1] + at, plane);
    for (int c = 0; c < 3; ++c) {  // nothing follows the last row: its first eight bytes and its last eight, which may overlap
        alignas(16) uint8_t row[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(row), plane[c]);
        for (int t = 0; t < copies; ++t) {
            std::memcpy(out + c * channel + t * area, row, 8);
            std::memcpy(out + c * channel + t * area + p - 8, row + p - 8, 8);
        }
    }
}

// Writes whole registers of `count` bytes around the caches to `*out` and advances it. Returns how many bytes are left.
SIDECAR_AVX2 inline size_t stream_avx2(uint8_t* bytes, size_t count, uint8_t** out) {
    size_t i = 0;
    for (; i + 32 <= count; i += 32, *out += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(*out), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i)));
    std::memmove(bytes, bytes + i, count - i);
    return count - i;
}

// Converts eight bytes to eight floats. A multiplication by the reciprocal and one correcting step replace the division
// if they give the same bits for each of the 256 bytes; that takes a third of the time.
struct Eight {
    enum How { MULTIPLY, DIVIDE, CORRECT } how = MULTIPLY;
    float mean = 0, by = 1, reciprocal = 1;  // no registers: code that is not compiled for them would misalign them
};

SIDECAR_AVX2 inline __m256 eight_avx2(const Eight& e, Eight::How how, const uint8_t* in) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    const __m256 by = _mm256_set1_ps(e.by), reciprocal = _mm256_set1_ps(e.reciprocal);
    if (how == Eight::MULTIPLY) return _mm256_mul_ps(x, by);
    const __m256 above = _mm256_sub_ps(x, _mm256_set1_ps(e.mean));
    if (how == Eight::DIVIDE) return _mm256_div_ps(above, by);
    const __m256 near = _mm256_mul_ps(above, reciprocal);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(near, by, above), reciprocal, near);
}

SIDECAR_AVX2 inline Eight eight_of(const Values& v, int channel) {
    if (!v.normalise) return {Eight::MULTIPLY, 0, v.factor, 1};
    Eight e{Eight::CORRECT, v.mean[channel], v.deviation[channel], 1.0f / v.deviation[channel]};
    for (int first = 0; first < 256; first += 8) {
        uint8_t bytes[8];
        for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(first + i);
        const __m256i quick = _mm256_castps_si256(eight_avx2(e, Eight::CORRECT, bytes));
        const __m256i right = _mm256_castps_si256(eight_avx2(e, Eight::DIVIDE, bytes));
        if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(quick, right)) != -1) e.how = Eight::DIVIDE;
    }
    return e;
}

// Stores eight values; `past` writes around the caches, to an aligned address.
template <bool past>
SIDECAR_AVX2 inline void put_avx2(F32, __m256 value, float* out) {
    past ? _mm256_stream_ps(out, value) : _mm256_storeu_ps(out, value);
}

template <bool past>
SIDECAR_AVX2 inline void put_avx2(BF16, __m256 value, uint16_t* out) {
    const __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
    auto* to = reinterpret_cast<__m128i*>(out);
    past ? _mm_stream_si128(to, packed) : _mm_storeu_si128(to, packed);
}

template <bool past>
SIDECAR_AVX2 inline void put_avx2(F16, __m256 value, uint16_t* out) {
    const __m128i packed = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    auto* to = reinterpret_cast<__m128i*>(out);
    past ? _mm_stream_si128(to, packed) : _mm_storeu_si128(to, packed);
}

// `count` >= 8 bytes to floats, `copies` times one after the other. `past` takes only multiples of 8.
template <class E, bool past, Eight::How how>
SIDECAR_AVX2 inline void floats_run(const uint8_t* in, const Eight e, size_t count, int copies, typename E::Type* out) {
    for (size_t i = 0; i + 8 <= count; i += 8) {
        const __m256 value = eight_avx2(e, how, in + i);
        for (int t = 0; t < copies; ++t) put_avx2<past>(E{}, value, out + t * count + i);
    }
    if (count % 8 == 0) return;
    const __m256 value = eight_avx2(e, how, in + count - 8);
    for (int t = 0; t < copies; ++t) put_avx2<false>(E{}, value, out + t * count + count - 8);
}

template <class E, bool past>
SIDECAR_AVX2 inline void floats_avx2(const uint8_t* in, const Eight& e, size_t count, int copies, typename E::Type* out) {
    if (e.how == Eight::CORRECT) return floats_run<E, past, Eight::CORRECT>(in, e, count, copies, out);
    if (e.how == Eight::DIVIDE) return floats_run<E, past, Eight::DIVIDE>(in, e, count, copies, out);
    floats_run<E, past, Eight::MULTIPLY>(in, e, count, copies, out);
}

#endif

}  // namespace sidecar
