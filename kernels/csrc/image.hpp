// A whole image: rows are resized across as needed, kept in a ring, summed down and laid out at once, so that the data
// between the passes never leaves the cache.
#pragma once

#include <type_traits>

#include "layout.hpp"

namespace sidecar {

enum class Level { PLAIN, AVX2, AVX512 };

constexpr const char* NAMES[] = {"plain", "avx2", "avx512"};

// What this processor supports, by CPUID.
inline Level best_by_name() {
#ifdef SIDECAR_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("fma")) return Level::PLAIN;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? Level::AVX512 : Level::AVX2;
#endif
    return Level::PLAIN;
}

// The tables of one (source size, target size, resample).
struct Plan {
    Axis x, y;
    Lanes lanes;
    Plan(int h, int w, int new_h, int new_w, int resample)
        : x(w, new_w, resample, 4), y(h, new_h, resample, 2), lanes(Axis(w, new_w, resample, 2)) {}
};

// Makes the rows of the resized image in order, from 0 on.
class Rows {
  public:
    Rows(const Plan& plan, const uint8_t* image, Level level)
        : plan_(plan), image_(image), level_(level), kept_(plan.y.taps + AT_ONCE), width_(3 * static_cast<size_t>(plan.x.target) + SLACK),
          ring_(kept_ * width_), last_(3 * static_cast<size_t>(std::max(plan.x.source, plan.x.taps)) + SLACK), pointers_(plan.y.taps) {}

    // Writes row `i`; rows must be asked for in order. `out` has SLACK bytes after its end.
    void next(int i, uint8_t* out) {
        const Axis& y = plan_.y;
        const int first = y.same() ? i : y.first[i], n = y.same() ? 1 : std::min(y.taps, y.source - first);
        while (made_ < first + n) make();
        const size_t bytes = 3 * static_cast<size_t>(plan_.x.target);
        if (y.same()) {
            std::memcpy(out, row(first), bytes);
            return;
        }
        for (int j = 0; j < y.taps; ++j) pointers_[j] = row(first + (j < n ? j : 0));  // a missing row has weight 0
        const int16_t* w = &y.weights[static_cast<size_t>(i) * y.taps];
#ifdef SIDECAR_X86
        if (level_ == Level::AVX512) return avx512::down(pointers_.data(), w, y.taps / 2, y.bits, bytes, out);
        if (level_ == Level::AVX2) return avx2::down(pointers_.data(), w, y.taps / 2, y.bits, bytes, out);
#endif
        down_plain(pointers_.data(), w, n, y.bits, bytes, out);
    }

  private:
    static constexpr int AT_ONCE = 8;  // source rows resized across together

    uint8_t* row(int i) { return &ring_[(i % kept_) * width_]; }

    const uint8_t* source(int i) {
        const size_t bytes = 3 * static_cast<size_t>(plan_.x.source);
        const uint8_t* at = image_ + i * bytes;
        if (i + 1 < plan_.y.source && plan_.x.source >= plan_.x.taps + 2) return at;
        std::memcpy(last_.data(), at, bytes);  // a vector load would read past the end of the image
        return last_.data();
    }

    void make() {
        const Axis& x = plan_.x;
        if (x.same()) {
            std::memcpy(row(made_), image_ + 3 * static_cast<size_t>(made_) * x.source, 3 * static_cast<size_t>(x.source));
            ++made_;
            return;
        }
#ifdef SIDECAR_X86
        if (level_ != Level::PLAIN) return make_wide();
#endif
        across_plain(x, source(made_), row(made_));
        ++made_;
    }

#ifdef SIDECAR_X86
    void make_wide() {
        const Axis& x = plan_.x;
        const int left = plan_.y.source - made_, together = level_ == Level::AVX512 ? 8 : 4;
        const int rows = left > together && x.source >= x.taps + 2 ? together : 1;  // else a load would read past the end
        const uint8_t* in[AT_ONCE];
        uint8_t* out[AT_ONCE];
        for (int r = 0; r < together; ++r) {
            in[r] = r < rows ? source(made_ + r) : in[0];
            out[r] = row(made_ + (r < rows ? r : 0));
        }
        if (!plan_.lanes.fit) {
            for (int r = 0; r < together; r += 4) across_far_avx2(x, in + r, out + r);
        } else {
            level_ == Level::AVX512 ? avx512::across(x, plan_.lanes, in, out) : avx2::across(x, plan_.lanes, in, out);
        }
        made_ += rows;
    }
#endif

    const Plan& plan_;
    const uint8_t* image_;
    Level level_;
    int made_ = 0;  // rows resized across so far
    int kept_;
    size_t width_;
    std::vector<uint8_t> ring_, last_;
    std::vector<const uint8_t*> pointers_;
};

// `out`: height x width x 3. Each row's slack is overwritten by the next; only the last rows have none.
inline void resize(const Plan& plan, const uint8_t* image, uint8_t* out, Level level) {
    const size_t bytes = 3 * static_cast<size_t>(plan.x.target), all = bytes * plan.y.target;
    std::vector<uint8_t> row(bytes + SLACK);
    Rows rows(plan, image, level);
    for (int i = 0; i < plan.y.target; ++i) {
        const bool room = (i + 1) * bytes + SLACK <= all;
        rows.next(i, room ? out + i * bytes : row.data());
        if (!room) std::memcpy(out + i * bytes, row.data(), bytes);
    }
}

#ifndef SIDECAR_LARGE
#define SIDECAR_LARGE (8 << 20)
#endif
constexpr size_t LARGE = SIDECAR_LARGE;  // bytes: a larger result is written around the caches

#ifdef SIDECAR_X86
// Patches in registers, one after the other from `out` on: laid out as bytes in a buffer, then converted on the way
// out.
template <class E>
class Outlet {
  public:
    // The rows of the next of `frames` frames begin `next` further on than those of the last.
    Outlet(const Values& values, int p, int temporal, int frames, size_t next, size_t count, typename E::Type* out)
        : p_(p), temporal_(temporal), frames_(frames), copies_(temporal / frames), next_(next), size_(3ull * temporal * p * p), out_(out),
          bytes_(size_ + SLACK) {
        for (int c = 0; c < 3; ++c) eight_[c] = eight_of(values, c);
        const size_t area = static_cast<size_t>(p) * p;
        // Each value is made once and stored `copies_` times, unless only all copies together fill whole registers.
        if (sizeof(typename E::Type) == 4 && area % 8) copies_ = 1;
        const bool whole = std::is_same_v<E, U8> || area * temporal / copies_ % 8 == 0;
        past_ = whole && count * sizeof(typename E::Type) >= LARGE && reinterpret_cast<uintptr_t>(out) % 32 == 0;
    }

    void patch(const uint8_t* const* rows, size_t at) {
        if constexpr (std::is_same_v<E, U8>) {
            lay(rows, at, temporal_, past_ ? bytes_.data() + kept_ : out_);
            if (past_) kept_ = stream_avx2(bytes_.data(), kept_ + size_, &out_);
            else out_ += size_;
        } else {
            lay(rows, at, temporal_ / copies_, bytes_.data());
            const size_t n = size_ / 3 / copies_;
            for (int c = 0; c < 3; ++c, out_ += n * copies_) {
                const uint8_t* in = bytes_.data() + c * n;
                past_ ? floats_avx2<E, true>(in, eight_[c], n, copies_, out_) : floats_avx2<E, false>(in, eight_[c], n, copies_, out_);
            }
        }
    }

    void end() {
        if (kept_) std::memcpy(out_, bytes_.data(), kept_);
        if (past_) _mm_sfence();
    }

  private:
    // One patch as bytes, of `steps` frames or copies of one.
    void lay(const uint8_t* const* rows, size_t at, int steps, uint8_t* out) {
        const size_t area = static_cast<size_t>(p_) * p_;
        for (int f = 0; f < frames_; ++f) patch_avx2(rows + f * next_, at, p_, steps / frames_, area * steps, out + f * area);
    }

    int p_, temporal_, frames_, copies_;
    size_t next_, size_, kept_ = 0;
    typename E::Type* out_;
    std::vector<uint8_t> bytes_;
    Eight eight_[3];
    bool past_;
};
#endif

// `out`: (height / p * width / p) x (3 * temporal * p * p), in the order of merged blocks of merge x merge patches. `images`
// are `frames` pictures, one after the other: `temporal` frames of a video, or one picture that is repeated.
template <class E>
void patches(const Plan& plan, const uint8_t* images, int frames, int p, int merge, int temporal, const Values& values,
             typename E::Type* out, Level level) {
    const int blocks_h = plan.y.target / p / merge, blocks_w = plan.x.target / p / merge;
    const size_t width = 3 * static_cast<size_t>(plan.x.target) + SLACK, size = 3ull * temporal * p * p;
    const size_t high = static_cast<size_t>(p) * merge, area = 3ull * plan.y.source * plan.x.source;
    std::vector<uint8_t> block(width * high * frames);
    std::vector<uint8_t*> rows(high * frames);  // frame by frame
    for (size_t y = 0; y < rows.size(); ++y) rows[y] = &block[width * y];
    std::vector<Rows> sources;
    sources.reserve(frames);
    for (int f = 0; f < frames; ++f) sources.emplace_back(plan, images + f * area, level);
    const auto each = [&](auto&& make) {
        for (int i = 0; i < blocks_h; ++i) {
            for (size_t y = 0; y < rows.size(); ++y) sources[y / high].next(static_cast<int>(i * high + y % high), rows[y]);
            for (int j = 0; j < blocks_w; ++j)
                for (int y = 0; y < merge; ++y)
                    for (int x = 0; x < merge; ++x) make(&rows[static_cast<size_t>(y) * p], 3ull * (j * merge + x) * p);
        }
    };
#ifdef SIDECAR_X86
    if (level != Level::PLAIN && p >= 8 && p <= 16) {
        Outlet<E> outlet(values, p, temporal, frames, high, size * blocks_h * blocks_w * merge * merge, out);
        each([&](const uint8_t* const* from, size_t at) { outlet.patch(from, at); });
        return outlet.end();
    }
#endif
    std::vector<typename E::Type> table(3 * 256);
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) table[c * 256 + v] = E::make(values, c, static_cast<uint8_t>(v));
    each([&](const uint8_t* const* from, size_t at) {
        patch_plain(from, frames > 1 ? high : 0, at, p, temporal, table.data(), out);
        out += size;
    });
}

}  // namespace sidecar
