// The two passes of the resize on rows of RGB bytes, and the layout of patches. Each has a plain form, which is the definition,
// and an AVX2 form with the same bits; `fastest()` picks one at run time.
//
// Rules: rows have SLACK readable and writable bytes behind their end; sums are int32 and cannot overflow, because the weights
// of a position sum to 2^bits <= 2^22 and their absolute values to less than twice that.
#pragma once

#include <cstring>

#include "axis.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define SIDECAR_X86 1
#include <immintrin.h>
#endif

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

#define SIDECAR_AVX2 __attribute__((target("avx2,f16c")))

// Four neighbouring output bytes share a lane: from where its 16 source bytes are loaded, how they are spread into pairs of taps,
// and the weights of each pair. The spread is the same for all pairs, because all windows of a lane move on by two pixels.
struct Lanes {
    int steps = 0;                 // pairs of taps
    std::vector<int32_t> at;       // byte offset of each lane in the source row
    std::vector<int8_t> spread;    // lanes x 16
    std::vector<int16_t> weights;  // pairs of lanes x steps x 16
    bool fit = true;               // false where the scale is so large that the pixels of a lane lie too far apart

    explicit Lanes(const Axis& x) : steps((x.taps + 1) / 2) {
        const int values = 3 * x.target, lanes = (values + 7) / 8 * 2;
        at.assign(lanes, 0);
        spread.assign(static_cast<size_t>(lanes) * 16, -128);
        weights.assign(static_cast<size_t>(lanes) * steps * 8, 0);
        for (int lane = 0; lane < lanes; ++lane) {
            const int from = 4 * lane;
            if (from >= values) {
                at[lane] = at[lane - 1];
                continue;
            }
            const int to = std::min(from + 4, values);
            at[lane] = start(x, from);
            for (int value = from + 1; value < to; ++value) at[lane] = std::min(at[lane], start(x, value));
            for (int value = from; value < to; ++value) put(x, lane, value - from, value);
        }
    }

  private:
    static int start(const Axis& x, int value) { return 3 * x.first[value / 3] + value % 3; }

    void put(const Axis& x, int lane, int k, int value) {
        const int pixel = value / 3, near = start(x, value) - at[lane];
        if (near + 3 > 15) {
            fit = false;
            return;
        }
        int8_t* mask = &spread[static_cast<size_t>(lane) * 16 + 4 * k];
        mask[0] = static_cast<int8_t>(near);
        mask[2] = static_cast<int8_t>(near + 3);
        for (int j = 0; j < x.taps; ++j)
            weights[((static_cast<size_t>(lane / 2) * steps + j / 2) * 2 + lane % 2) * 8 + 2 * k + j % 2] =
                x.weights[static_cast<size_t>(pixel) * x.taps + j];
    }
};

#define SIDECAR_TWO(row) \
    _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + a))), \
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b)), 1)

// Four rows share the loading of masks and weights.
SIDECAR_AVX2 inline void across_avx2(const Axis& x, const Lanes& lanes, const uint8_t* const* in, uint8_t* const* out) {
    const __m256i half = _mm256_set1_epi32(1 << (x.bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(x.bits);
    const int16_t* w = lanes.weights.data();
    const uint8_t *in0 = in[0], *in1 = in[1], *in2 = in[2], *in3 = in[3];
    const size_t pairs = lanes.at.size() / 2;
    for (size_t i = 0; i < pairs; ++i) {
        size_t a = lanes.at[2 * i], b = lanes.at[2 * i + 1];
        const __m256i spread = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&lanes.spread[32 * i]));
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int j = 0; j < lanes.steps; ++j, a += 6, b += 6, w += 16) {
            const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_shuffle_epi8(SIDECAR_TWO(in0), spread), weights));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_shuffle_epi8(SIDECAR_TWO(in1), spread), weights));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_shuffle_epi8(SIDECAR_TWO(in2), spread), weights));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_shuffle_epi8(SIDECAR_TWO(in3), spread), weights));
        }
        const __m256i p01 = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
        const __m256i p23 = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
        const __m256i all = _mm256_packus_epi16(p01, p23);
        const __m128i low = _mm256_castsi256_si128(all), high = _mm256_extracti128_si256(all, 1);
        const __m128i r01 = _mm_unpacklo_epi32(low, high), r23 = _mm_unpackhi_epi32(low, high);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out[0] + 8 * i), r01);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out[1] + 8 * i), _mm_unpackhi_epi64(r01, r01));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out[2] + 8 * i), r23);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out[3] + 8 * i), _mm_unpackhi_epi64(r23, r23));
    }
}

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

SIDECAR_AVX2 inline void down_avx2(const uint8_t* const* rows, const int16_t* w, int n, int bits, size_t bytes, uint8_t* out) {
    const __m256i half = _mm256_set1_epi32(1 << (bits - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(bits);
    for (size_t i = 0; i < bytes; i += 32) {
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int j = 0; j < n; j += 2) {
            const bool pair = j + 1 < n;
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j] + i));
            const __m256i b = pair ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j + 1] + i)) : zero;
            const uint32_t second = pair ? static_cast<uint16_t>(w[j + 1]) : 0;
            const int32_t both = static_cast<int32_t>(second << 16 | static_cast<uint16_t>(w[j]));
            const __m256i weights = _mm256_set1_epi32(both);
            const __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), weights));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), weights));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), weights));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), weights));
        }
        const __m256i p0 = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
        const __m256i p1 = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_packus_epi16(p0, p1));
    }
}

#endif

}  // namespace sidecar
