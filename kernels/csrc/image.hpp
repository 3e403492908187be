// A whole image: rows are resized across as they are needed, kept in a ring, summed down, and laid out at once, so that what
// is between the passes never leaves the cache.
#pragma once

#include "layout.hpp"

namespace sidecar {

enum class Level { PLAIN, AVX2 };

inline Level fastest() {
#ifdef SIDECAR_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Level::AVX2;
#endif
    return Level::PLAIN;
}

// The tables of one (source size, target size, resample).
struct Plan {
    Axis x, y;
#ifdef SIDECAR_X86
    Lanes lanes;
#endif
    Plan(int h, int w, int new_h, int new_w, int resample)
        : x(w, new_w, resample, 4), y(h, new_h, resample, 1)
#ifdef SIDECAR_X86
          , lanes(Axis(w, new_w, resample, 2))
#endif
    {}
};

// Gives the rows of the resized image one after the other, from 0 on.
class Rows {
  public:
    Rows(const Plan& plan, const uint8_t* image, Level level)
        : plan_(plan), image_(image), level_(level), kept_(plan.y.taps + 4), width_(3 * static_cast<size_t>(plan.x.target) + SLACK),
          ring_(kept_ * width_), last_(3 * static_cast<size_t>(std::max(plan.x.source, plan.x.taps)) + SLACK) {}

    // Writes row `i`; rows must be asked for in order. `out` has SLACK bytes behind its end.
    void next(int i, uint8_t* out) {
        const Axis& y = plan_.y;
        const int first = y.same() ? i : y.first[i], n = y.same() ? 1 : std::min(y.taps, y.source - first);
        while (made_ < first + n) make();
        const size_t bytes = 3 * static_cast<size_t>(plan_.x.target);
        if (y.same()) {
            std::memcpy(out, row(first), bytes);
            return;
        }
        pointers_.resize(n);
        for (int j = 0; j < n; ++j) pointers_[j] = row(first + j);
        const int16_t* w = &y.weights[static_cast<size_t>(i) * y.taps];
#ifdef SIDECAR_X86
        if (level_ == Level::AVX2) return down_avx2(pointers_.data(), w, n, y.bits, bytes, out);
#endif
        down_plain(pointers_.data(), w, n, y.bits, bytes, out);
    }

  private:
    uint8_t* row(int i) { return &ring_[(i % kept_) * width_]; }

    const uint8_t* source(int i) {
        const size_t bytes = 3 * static_cast<size_t>(plan_.x.source);
        const uint8_t* at = image_ + i * bytes;
        if (i + 1 < plan_.y.source && plan_.x.source >= plan_.x.taps + 2) return at;
        std::memcpy(last_.data(), at, bytes);  // a vector load would read behind the end of the image
        return last_.data();
    }

    void make() {
        const Axis& x = plan_.x;
        const int left = plan_.y.source - made_;
        const int rows = left > 4 && x.source >= x.taps + 2 ? 4 : 1;  // else a vector load would read behind the end of the image
        if (x.same()) {
            std::memcpy(row(made_), image_ + 3 * static_cast<size_t>(made_) * x.source, 3 * static_cast<size_t>(x.source));
            ++made_;
            return;
        }
#ifdef SIDECAR_X86
        if (level_ == Level::AVX2) {
            const uint8_t* in[4];
            uint8_t* out[4];
            for (int r = 0; r < 4; ++r) {
                in[r] = r < rows ? source(made_ + r) : in[0];
                out[r] = row(made_ + (r < rows ? r : 0));
            }
            plan_.lanes.fit ? across_avx2(x, plan_.lanes, in, out) : across_far_avx2(x, in, out);
            made_ += rows;
            return;
        }
#endif
        across_plain(x, source(made_), row(made_));
        ++made_;
    }

    const Plan& plan_;
    const uint8_t* image_;
    Level level_;
    int made_ = 0;  // rows resized across so far
    int kept_;
    size_t width_;
    std::vector<uint8_t> ring_, last_;
    std::vector<const uint8_t*> pointers_;
};

// `out`: height x width x 3.
inline void resize(const Plan& plan, const uint8_t* image, uint8_t* out, Level level) {
    const size_t bytes = 3 * static_cast<size_t>(plan.x.target);
    std::vector<uint8_t> row(bytes + SLACK);
    Rows rows(plan, image, level);
    for (int i = 0; i < plan.y.target; ++i) {
        rows.next(i, row.data());
        std::memcpy(out + i * bytes, row.data(), bytes);
    }
}

// `out`: (height / p * width / p) x (3 * temporal * p * p).
template <class E>
void patches(const Plan& plan, const uint8_t* image, int p, int merge, int temporal, const Values& values,
             typename E::Type* out, Level level) {
    const int grid_h = plan.y.target / p, grid_w = plan.x.target / p;
    const size_t width = 3 * static_cast<size_t>(plan.x.target) + SLACK, size = 3ull * temporal * p * p;
    std::vector<uint8_t> block(width * p);
    std::vector<uint8_t*> rows(p);
    for (int y = 0; y < p; ++y) rows[y] = &block[width * y];
    std::vector<typename E::Type> table(3 * 256);
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) table[c * 256 + v] = E::make(values, c, static_cast<uint8_t>(v));
#ifdef SIDECAR_X86
    using T = typename E::Type;
    alignas(32) T scratch[3 * 2 * 16 * 16];
    const size_t whole = size * sizeof(T);
    const bool fast = level == Level::AVX2 && p >= 8 && p <= 16;
    const bool streams = fast && size <= sizeof scratch / sizeof(T) && whole % 32 == 0 && reinterpret_cast<uintptr_t>(out) % 32 == 0;
#endif
    Rows source(plan, image, level);
    for (int gy = 0; gy < grid_h; ++gy) {
        for (int y = 0; y < p; ++y) source.next(gy * p + y, rows[y]);
        for (int gx = 0; gx < grid_w; ++gx) {
            const size_t index = (static_cast<size_t>(gy / merge) * (grid_w / merge) + gx / merge) * merge * merge +
                                 (gy % merge) * merge + gx % merge;
            const size_t at = 3 * static_cast<size_t>(gx) * p;
            typename E::Type* to = out + index * size;
#ifdef SIDECAR_X86
            if (fast) {
                patch_avx2(rows.data(), at, p, temporal, values, streams ? scratch : to);
                if (streams) stream_avx2(scratch, to, whole);
                continue;
            }
#endif
            patch_plain(rows.data(), at, p, temporal, table.data(), to);
        }
    }
#ifdef SIDECAR_X86
    if (streams) _mm_sfence();
#endif
}

}  // namespace sidecar
