// The passes and the layout in registers, for every width. vectors.hpp includes this file once for each instruction
// set, in a separate namespace, after a `Wide` that defines one register. A test at one width therefore covers the
// other.
//
// Wide::rows rows share a register in the horizontal pass, 32 bytes of each.

// --- horizontal ---

// Four groups of output bytes of Wide::rows * 4 rows, which share the loading of masks and weights. Each lane of a
// result holds four bytes of every fourth register's row. steps_: 0 means `steps`.
template <bool near, int steps_>
inline Wide::V slot(const uint8_t* const* in, size_t a, size_t b, const int8_t* mask, const int16_t* w, int steps, Wide::V half, __m128i shift) {
    using V = Wide::V;
    constexpr int R = Wide::rows;
    const V spread = Wide::table(mask);
    V s0 = half, s1 = half, s2 = half, s3 = half;
    for (int j = 0; j < (steps_ ? steps_ : steps); ++j) {
        const V weights = Wide::table(w + 16 * j);
        s0 = Wide::add(s0, Wide::madd(Wide::shuffle(Wide::fetch<near>(in, a + 6 * j, b + 6 * j), spread), weights));
        s1 = Wide::add(s1, Wide::madd(Wide::shuffle(Wide::fetch<near>(in + R, a + 6 * j, b + 6 * j), spread), weights));
        s2 = Wide::add(s2, Wide::madd(Wide::shuffle(Wide::fetch<near>(in + 2 * R, a + 6 * j, b + 6 * j), spread), weights));
        s3 = Wide::add(s3, Wide::madd(Wide::shuffle(Wide::fetch<near>(in + 3 * R, a + 6 * j, b + 6 * j), spread), weights));
    }
    return Wide::pack16(Wide::pack32(Wide::shift(s0, shift), Wide::shift(s1, shift)), Wide::pack32(Wide::shift(s2, shift), Wide::shift(s3, shift)));
}

// Two slots at a time: 16 bytes of each row.
template <bool near, int steps_>
inline void across_run(const Axis& x, const Lanes& lanes, const Lanes::Run& run, const uint8_t* const* in_, uint8_t* const* out_) {
    constexpr int R = Wide::rows;
    const Wide::V half = Wide::all32(1 << (x.bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(x.bits);
    const int32_t* at = lanes.at.data();
    const int8_t* masks = lanes.spread.data();
    const int steps = steps_ ? steps_ : lanes.steps;
    const size_t end = run.end, stride = 16 * static_cast<size_t>(steps);
    const int16_t* w = lanes.weights.data() + stride * run.begin;
    const uint8_t* in[4 * R];  // copies: a store of bytes might change whatever else is pointed to
    uint8_t* out[4 * R];
    for (int r = 0; r < 4 * R; ++r) in[r] = in_[r], out[r] = out_[r];
    for (size_t i = run.begin; i < end; i += 2, w += 2 * stride) {
        const Wide::V a = slot<near, steps_>(in, at[2 * i], at[2 * i + 1], masks + 32 * i, w, steps, half, shift);
        const Wide::V b = slot<near, steps_>(in, at[2 * i + 2], at[2 * i + 3], masks + 32 * i + 32, w + stride, steps, half, shift);
        const Wide::V r01 = Wide::low32(a, b), r23 = Wide::high32(a, b);
        for (int r = 0; r < R; ++r) {
            Wide::store_rows(r01, r, out[r] + 8 * i, out[r + R] + 8 * i);
            Wide::store_rows(r23, r, out[r + 2 * R] + 8 * i, out[r + 3 * R] + 8 * i);
        }
    }
}

inline void across(const Axis& x, const Lanes& lanes, const uint8_t* const* in, uint8_t* const* out) {
    for (const Lanes::Run& run : lanes.runs) {
        if (!run.near) across_run<false, 0>(x, lanes, run, in, out);
        else if (lanes.steps == 2) across_run<true, 2>(x, lanes, run, in, out);
        else if (lanes.steps == 3) across_run<true, 3>(x, lanes, run, in, out);
        else if (lanes.steps == 4) across_run<true, 4>(x, lanes, run, in, out);
        else across_run<true, 0>(x, lanes, run, in, out);
    }
}

// --- vertical: the sum of `pairs` pairs of rows of `bytes` bytes ---

template <int pairs_>
inline void down_run(const uint8_t* const* rows_, const int16_t* w, int pairs_here, int bits, size_t bytes, uint8_t* out) {
    using V = Wide::V;
    constexpr int known = pairs_ ? pairs_ : 1;
    const V half = Wide::all32(1 << (bits - 1)), zero = Wide::all32(0);
    const __m128i shift = _mm_cvtsi32_si128(bits);
    const uint8_t* copies[2 * known];
    V weights_[known];
    for (int j = 0; j < pairs_; ++j) copies[2 * j] = rows_[2 * j], copies[2 * j + 1] = rows_[2 * j + 1], weights_[j] = Wide::pair(w + 2 * j);
    const uint8_t* const* rows = pairs_ ? copies : rows_;
    for (size_t i = 0; i < bytes; i += sizeof(V)) {
        V s0 = half, s1 = half, s2 = half, s3 = half;
        for (int j = 0; j < (pairs_ ? pairs_ : pairs_here); ++j) {
            const V a = Wide::load(rows[2 * j] + i), b = Wide::load(rows[2 * j + 1] + i);
            const V weights = pairs_ ? weights_[j % known] : Wide::pair(w + 2 * j);
            const V lo = Wide::low8(a, b), hi = Wide::high8(a, b);
            s0 = Wide::add(s0, Wide::madd(Wide::low8(lo, zero), weights));
            s1 = Wide::add(s1, Wide::madd(Wide::high8(lo, zero), weights));
            s2 = Wide::add(s2, Wide::madd(Wide::low8(hi, zero), weights));
            s3 = Wide::add(s3, Wide::madd(Wide::high8(hi, zero), weights));
        }
        const V p0 = Wide::pack32(Wide::shift(s0, shift), Wide::shift(s1, shift));
        const V p1 = Wide::pack32(Wide::shift(s2, shift), Wide::shift(s3, shift));
        Wide::store(out + i, Wide::pack16(p0, p1));
    }
}

inline void down(const uint8_t* const* rows, const int16_t* w, int pairs, int bits, size_t bytes, uint8_t* out) {
    if (pairs == 2) return down_run<2>(rows, w, pairs, bits, bytes, out);
    if (pairs == 3) return down_run<3>(rows, w, pairs, bits, bytes, out);
    if (pairs == 4) return down_run<4>(rows, w, pairs, bits, bytes, out);
    down_run<0>(rows, w, pairs, bits, bytes, out);
}
