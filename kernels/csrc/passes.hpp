// The two passes of the resize on rows of RGB bytes: the plain form, which is the definition. The forms in registers
// (wide.hpp) give the same bits.
//
// Rules: rows have SLACK readable and writable bytes after their end; sums are int32 and cannot overflow, because the
// weights of a position sum to 2^bits <= 2^22 and their absolute values to less than twice that.
#pragma once

#include "vectors.hpp"

namespace sidecar {

constexpr int SLACK = 64;

inline uint8_t clamp_byte(int32_t v) { return static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v); }

// --- horizontal: one row of `x.source` pixels to `x.target` pixels ---

inline void across_plain(const Axis& x, const uint8_t* in, uint8_t* out) {
    const int32_t half = 1 << (x.bits - 1);
    for (int i = 0; i < x.target; ++i, out += 3) {
        const int16_t* w = &x.weights[static_cast<size_t>(i) * x.taps];
        const uint8_t* p = in + 3 * static_cast<size_t>(x.first[i]);
        int32_t r = half, g = half, b = half;
        const int n = std::min(x.taps, x.source - x.first[i]);
        for (int j = 0; j < n; ++j, p += 3) {
            r += w[j] * p[0];
            g += w[j] * p[1];
            b += w[j] * p[2];
        }
        out[0] = clamp_byte(r >> x.bits);
        out[1] = clamp_byte(g >> x.bits);
        out[2] = clamp_byte(b >> x.bits);
    }
}

// --- vertical: the weighted sum of `n` rows of `bytes` bytes ---

inline void down_plain(const uint8_t* const* rows, const int16_t* w, int n, int bits, size_t bytes, uint8_t* out) {
    const int32_t half = 1 << (bits - 1);
    for (size_t i = 0; i < bytes; ++i) {
        int32_t sum = half;
        for (int j = 0; j < n; ++j) sum += w[j] * rows[j][i];
        out[i] = clamp_byte(sum >> bits);
    }
}

#ifdef SIDECAR_X86

#define SIDECAR_AVX2 __attribute__((target("avx2,f16c,fma")))

// For large scales: one pixel a register, four taps at a time, two in each lane as pairs (R0 R1)(G0 G1)(B0 B1)(0 0).
SIDECAR_AVX2 inline void across_far_avx2(const Axis& x, const uint8_t* const* in, uint8_t* const* out) {
    const char Z = -128;
    const __m256i spread = _mm256_setr_epi8(0, Z, 3, Z, 1, Z, 4, Z, 2, Z, 5, Z, Z, Z, Z, Z,  //
                                            6, Z, 9, Z, 7, Z, 10, Z, 8, Z, 11, Z, Z, Z, Z, Z);
    const __m256i half = _mm256_castsi128_si256(_mm_set1_epi32(1 << (x.bits - 1)));
    const __m256i start = _mm256_inserti128_si256(half, _mm_setzero_si128(), 1);
    const __m128i shift = _mm_cvtsi32_si128(x.bits);
    const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (int i = 0; i < x.target; ++i) {
        const int16_t* w = &x.weights[static_cast<size_t>(i) * x.taps];
        const size_t at = 3 * static_cast<size_t>(x.first[i]);
        __m256i sum[4] = {start, start, start, start};
        for (int j = 0; j < x.taps; j += 4) {
            int64_t four;
            std::memcpy(&four, w + j, 8);
            const __m256i weights = _mm256_permutevar8x32_epi32(_mm256_set1_epi64x(four), low);
            for (int r = 0; r < 4; ++r) {
                const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[r] + at + 3 * j));
                const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, weights));
            }
        }
        __m128i s[4];
        for (int r = 0; r < 4; ++r)
            s[r] = _mm_sra_epi32(_mm_add_epi32(_mm256_castsi256_si128(sum[r]), _mm256_extracti128_si256(sum[r], 1)), shift);
        alignas(16) int32_t pixel[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(pixel), _mm_packus_epi16(_mm_packs_epi32(s[0], s[1]), _mm_packs_epi32(s[2], s[3])));
        for (int r = 0; r < 4; ++r) std::memcpy(out[r] + 3 * static_cast<size_t>(i), &pixel[r], 4);  // the 4th byte is overwritten next
    }
}

#endif

}  // namespace sidecar
