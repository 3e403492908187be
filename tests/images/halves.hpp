// Registers of 64 bytes made of two of 32, in the place of AVX-512's, so that wide.hpp runs at that width on any machine with AVX2.
//
// Rule: each operation is done on both halves, as AVX-512 defines it: none crosses a lane of 16 bytes. What this leaves unproven are the
// one-line wrappers in vectors.hpp; choice.hpp tries them where they first run.
#pragma once

SIDECAR_BEGIN("avx2,f16c,fma")
namespace avx512 {

struct Wide {
    using W = avx2::Wide;
    struct V {
        __m256i a, b;
    };
    static constexpr int rows = 2;

    static V load(const uint8_t* p) { return {W::load(p), W::load(p + 32)}; }
    static void store(uint8_t* p, V v) { W::store(p, v.a), W::store(p + 32, v.b); }
    static V table(const void* p) { return {W::table(p), W::table(p)}; }
    static V all32(int32_t v) { return {W::all32(v), W::all32(v)}; }
    static V pair(const int16_t* w) { return {W::pair(w), W::pair(w)}; }
    static V add(V x, V y) { return {W::add(x.a, y.a), W::add(x.b, y.b)}; }
    static V madd(V x, V y) { return {W::madd(x.a, y.a), W::madd(x.b, y.b)}; }
    static V shuffle(V x, V y) { return {W::shuffle(x.a, y.a), W::shuffle(x.b, y.b)}; }
    static V shift(V x, __m128i by) { return {W::shift(x.a, by), W::shift(x.b, by)}; }
    static V pack32(V x, V y) { return {W::pack32(x.a, y.a), W::pack32(x.b, y.b)}; }
    static V pack16(V x, V y) { return {W::pack16(x.a, y.a), W::pack16(x.b, y.b)}; }
    static V low8(V x, V y) { return {W::low8(x.a, y.a), W::low8(x.b, y.b)}; }
    static V high8(V x, V y) { return {W::high8(x.a, y.a), W::high8(x.b, y.b)}; }
    static V low32(V x, V y) { return {W::low32(x.a, y.a), W::low32(x.b, y.b)}; }
    static V high32(V x, V y) { return {W::high32(x.a, y.a), W::high32(x.b, y.b)}; }
    static void store_rows(V x, int half, uint8_t* first, uint8_t* second) { W::store_rows(half ? x.b : x.a, 0, first, second); }
    template <bool near>
    static V fetch(const uint8_t* const* in, size_t a, size_t b) {
        return {W::fetch<near>(in, a, b), W::fetch<near>(in + 1, a, b)};
    }
};

#include "wide.hpp"

}  // namespace avx512
SIDECAR_END
