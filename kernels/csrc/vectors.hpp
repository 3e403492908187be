// The registers of each instruction set, and wide.hpp in each of them.
#pragma once

#include <cstring>

#include "lanes.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define SIDECAR_X86 1
#include <immintrin.h>

// Functions between these two may use the named instructions, whatever the rest is compiled for.
#define SIDECAR_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SIDECAR_BEGIN(features) SIDECAR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SIDECAR_END SIDECAR_PRAGMA(clang attribute pop)
#else
#define SIDECAR_BEGIN(features) SIDECAR_PRAGMA(GCC push_options) SIDECAR_PRAGMA(GCC target(features))
#define SIDECAR_END SIDECAR_PRAGMA(GCC pop_options)
#endif

#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined
#endif

namespace sidecar {

SIDECAR_BEGIN("avx2,f16c,fma")
namespace avx2 {

struct Wide {
    using V = __m256i;
    static constexpr int rows = 1;

    static V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
    static void store(uint8_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
    static V table(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
    static V all32(int32_t v) { return _mm256_set1_epi32(v); }
    static V pair(const int16_t* w) {
        int32_t both;
        std::memcpy(&both, w, 4);
        return _mm256_set1_epi32(both);
    }
    static V add(V a, V b) { return _mm256_add_epi32(a, b); }
    static V madd(V a, V b) { return _mm256_madd_epi16(a, b); }
    static V shuffle(V a, V by) { return _mm256_shuffle_epi8(a, by); }
    static V shift(V a, __m128i by) { return _mm256_sra_epi32(a, by); }
    static V pack32(V a, V b) { return _mm256_packs_epi32(a, b); }
    static V pack16(V a, V b) { return _mm256_packus_epi16(a, b); }
    static V low8(V a, V b) { return _mm256_unpacklo_epi8(a, b); }
    static V high8(V a, V b) { return _mm256_unpackhi_epi8(a, b); }
    static V low32(V a, V b) { return _mm256_unpacklo_epi32(a, b); }
    static V high32(V a, V b) { return _mm256_unpackhi_epi32(a, b); }

    // The eight bytes of each lane's lower half are one row's, those of its upper half another's.
    static void store_rows(V a, int, uint8_t* first, uint8_t* second) {
        const V rows = _mm256_permute4x64_epi64(a, 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(rows));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(rows, 1));
    }

    // Two lanes of a row: 32 bytes from `a` on if near, else 16 from `a` on and 16 from `b` on.
    template <bool near>
    static V fetch(const uint8_t* const* in, size_t a, size_t b) {
        if (near) return load(in[0] + a);
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[0] + a));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[0] + b)), 1);
    }
};

#include "wide.hpp"

}  // namespace avx2
SIDECAR_END

#ifdef SIDECAR_INSTEAD_OF_AVX512
#include SIDECAR_INSTEAD_OF_AVX512  // a test's
#else
SIDECAR_BEGIN("avx2,f16c,fma,avx512f,avx512bw,avx512vl")
namespace avx512 {

struct Wide {
    using V = __m512i;
    static constexpr int rows = 2;

    static V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store(uint8_t* p, V v) { _mm512_storeu_si512(p, v); }
    static V table(const void* p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
    static V all32(int32_t v) { return _mm512_set1_epi32(v); }
    static V pair(const int16_t* w) {
        int32_t both;
        std::memcpy(&both, w, 4);
        return _mm512_set1_epi32(both);
    }
    static V add(V a, V b) { return _mm512_add_epi32(a, b); }
    static V madd(V a, V b) { return _mm512_madd_epi16(a, b); }
    static V shuffle(V a, V by) { return _mm512_shuffle_epi8(a, by); }
    static V shift(V a, __m128i by) { return _mm512_sra_epi32(a, by); }
    static V pack32(V a, V b) { return _mm512_packs_epi32(a, b); }
    static V pack16(V a, V b) { return _mm512_packus_epi16(a, b); }
    static V low8(V a, V b) { return _mm512_unpacklo_epi8(a, b); }
    static V high8(V a, V b) { return _mm512_unpackhi_epi8(a, b); }
    static V low32(V a, V b) { return _mm512_unpacklo_epi32(a, b); }
    static V high32(V a, V b) { return _mm512_unpackhi_epi32(a, b); }
    static void store_rows(V a, int half, uint8_t* first, uint8_t* second) {
        avx2::Wide::store_rows(half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a), 0, first, second);
    }

    template <bool near>
    static V fetch(const uint8_t* const* in, size_t a, size_t b) {
        const __m256i first = avx2::Wide::fetch<near>(in, a, b), second = avx2::Wide::fetch<near>(in + 1, a, b);
        return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
};

#include "wide.hpp"

}  // namespace avx512
SIDECAR_END
#endif

}  // namespace sidecar

#pragma GCC diagnostic pop
#endif
