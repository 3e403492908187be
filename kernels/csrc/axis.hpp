// Integer weights of one axis of the exact uint8 antialiased resize. Specification: kernels/reference.py, word for
// word.
//
// Compile with -ffp-contract=off: a fused multiply-add would round a weight differently.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace sidecar {

enum Resample { LANCZOS = 1, BILINEAR = 2, BICUBIC = 3 };  // PIL's numbers

inline double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= 3.14159265358979323846;
    return std::sin(x) / x;
}

inline double kernel(double x, int resample) {
    if (resample == LANCZOS) return x > -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
    x = std::fabs(x);
    if (resample == BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

// One axis: for each target position the first source position and `taps` weights, zeros if a window is shorter.
struct Axis {
    int source = 0, target = 0;
    int taps = 0;  // weights per target position: a multiple of `group`, at most the longest window rounded up
    int bits = 0;  // precision: weights are scaled by 2^bits
    std::vector<int32_t> first;
    std::vector<int16_t> weights;  // target x taps

    bool same() const { return source == target; }

    // `group`: taps are padded to a multiple of it. Windows near the end move back, so that they stay inside if
    // possible.
    Axis(int source_, int target_, int resample, int group) : source(source_), target(target_) {
        if (source < 1 || target < 1) throw std::invalid_argument("an axis without pixels");
        const double scale = static_cast<double>(source) / target, stretch = std::max(scale, 1.0);
        const double inverse = 1.0 / stretch, support = (resample == BILINEAR ? 1 : resample == BICUBIC ? 2 : 3) * stretch;
        const int longest = static_cast<int>(std::ceil(support)) * 2 + 1;
        std::vector<double> real(static_cast<size_t>(target) * longest);
        std::vector<int> counts(target);
        first.resize(target);
        double largest = 0.0;
        int most = 0;
        for (int i = 0; i < target; ++i) {
            const double center = scale * (i + 0.5);
            const int begin = std::max(static_cast<int>(center - support + 0.5), 0);
            const int count = std::min(static_cast<int>(center + support + 0.5), source) - begin;
            double* w = &real[static_cast<size_t>(i) * longest];
            double total = 0.0;
            for (int j = 0; j < count; ++j) total += w[j] = kernel((j + begin - center + 0.5) * inverse, resample);
            for (int j = 0; j < count; ++j) largest = std::max(largest, w[j] /= total);
            first[i] = begin;
            counts[i] = count;
            most = std::max(most, count);
        }
        while (bits < 22 && static_cast<int64_t>(0.5 + largest * static_cast<double>(1LL << (bits + 1))) < (1 << 15)) ++bits;
        taps = (most + group - 1) / group * group;
        weights.assign(static_cast<size_t>(target) * taps, 0);
        for (int i = 0; i < target; ++i) {
            const int back = std::clamp(first[i] + taps - source, 0, std::min(first[i], taps - counts[i]));
            first[i] -= back;
            for (int j = 0; j < counts[i]; ++j) {
                const double w = real[static_cast<size_t>(i) * longest + j] * static_cast<double>(1LL << bits);
                weights[static_cast<size_t>(i) * taps + back + j] = static_cast<int16_t>(w + (w < 0 ? -0.5 : 0.5));
            }
        }
    }
};

}  // namespace sidecar
