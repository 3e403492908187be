// The compiled kernel over many sizes, for a build with -fsanitize=address,undefined: `make sanitize`.
//
// Every image and every result lies in memory of exactly its size, so that one byte read or written past it is found. Each case is
// also done by the other forms of the kernel, and their results must be the same. Arguments: seconds, seed.
//
// The AVX-512 form runs on any machine with AVX2, over the registers of halves.hpp.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "choice.hpp"
#include "tiles.hpp"

using namespace sidecar;

namespace {

std::mt19937 dice;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(dice); }

// Small sides are drawn often, because there windows are longer than images.
int side() { return pick(0, 2) == 0 ? pick(1, 9) : pick(0, 3) ? pick(1, 120) : pick(1, 1500); }

std::vector<Level> forms() {
    if (best_by_name() == Level::PLAIN) return {};
    return {Level::AVX2, Level::AVX512};
}

// A form that gives other bits is not used, and is named.
void refusals() {
    const auto only = [](Level good) { return choose(Level::AVX512, [=](Level level) { return level == good; }); };
    if (only(Level::AVX512).level != Level::AVX512 || *only(Level::AVX512).refused) std::abort();
    if (only(Level::AVX2).level != Level::AVX2 || std::strcmp(only(Level::AVX2).refused, "avx512")) std::abort();
    if (only(Level::PLAIN).level != Level::PLAIN || std::strcmp(only(Level::PLAIN).refused, "avx2")) std::abort();
    for (Level level : forms())
        if (!agrees(level)) std::abort();
}

template <class T>
std::unique_ptr<T[]> exactly(size_t count) {
    return std::unique_ptr<T[]>(new T[count]());
}

template <class T>
void same(const T* a, const T* b, size_t count, const char* what, int h, int w, int new_h, int new_w) {
    if (std::memcmp(a, b, count * sizeof(T)) == 0) return;
    std::fprintf(stderr, "%s: the two forms differ for %d x %d to %d x %d\n", what, w, h, new_w, new_h);
    std::abort();
}

void whole(const uint8_t* image, int h, int w, int new_h, int new_w, int resample) {
    const size_t bytes = 3ull * new_h * new_w;
    const Plan plan(h, w, new_h, new_w, resample);
    auto plain = exactly<uint8_t>(bytes);
    resize(plan, image, plain.get(), Level::PLAIN);
    for (Level level : forms()) {
        auto fast = exactly<uint8_t>(bytes);
        resize(plan, image, fast.get(), level);
        same(plain.get(), fast.get(), bytes, "resize", h, w, new_h, new_w);
    }
}

template <class E>
void cut(const uint8_t* image, int h, int w, int resample) {
    const int sizes[] = {1, 2, 7, 8, 14, 16, 17, 28};
    const int p = sizes[pick(0, 7)], merge = pick(1, 3), temporal = pick(1, 3), step = p * merge;
    const int new_h = step * pick(1, std::max(1, 120 / step)), new_w = step * pick(1, std::max(1, 200 / step));
    const size_t count = 3ull * new_h * new_w * temporal, area = 3ull * h * w;
    // one picture, or the frames of a step of a video
    const int frames = pick(0, 1) ? temporal : 1;
    auto images = exactly<uint8_t>(area * frames);
    for (int f = 0; f < frames; ++f)
        for (size_t i = 0; i < area; ++i) images[f * area + i] = static_cast<uint8_t>(image[i] + 31 * f);
    const Plan plan(h, w, new_h, new_w, resample);
    Values values;
    values.normalise = pick(0, 1);
    values.factor = 1.0f / 255;
    for (int c = 0; c < 3; ++c) values.mean[c] = 120.0f + c, values.deviation[c] = 60.0f + c;
    // an odd place, too: the form that writes past the caches wants an aligned one
    const size_t shift = pick(0, 1);
    auto plain = exactly<typename E::Type>(count);
    patches<E>(plan, images.get(), frames, p, merge, temporal, values, plain.get(), Level::PLAIN);
    for (Level level : forms()) {
        auto fast = exactly<typename E::Type>(count + shift);
        patches<E>(plan, images.get(), frames, p, merge, temporal, values, fast.get() + shift, level);
        same(plain.get(), fast.get() + shift, count, "patches", h, w, new_h, new_w);
    }
}

template <class E>
void tiled(const uint8_t* image, int h, int w, int resample) {
    const int tile_h = pick(1, 40), tile_w = pick(1, 60);
    Canvas canvas{tile_h * pick(1, 4), tile_w * pick(1, 4), 0, 0, tile_h, tile_w};
    const int new_h = pick(1, canvas.height), new_w = pick(1, canvas.width);
    canvas.top = pick(0, canvas.height - new_h), canvas.left = pick(0, canvas.width - new_w);
    const size_t count = 3ull * canvas.height * canvas.width;
    const Plan plan(h, w, new_h, new_w, resample);
    Values values;
    values.normalise = pick(0, 1);
    values.factor = 1.0f / 255;
    for (int c = 0; c < 3; ++c) values.mean[c] = 120.0f + c, values.deviation[c] = 60.0f + c;
    auto plain = exactly<typename E::Type>(count);
    tiles<E>(plan, image, canvas, values, plain.get(), Level::PLAIN);
    for (Level level : forms()) {
        auto fast = exactly<typename E::Type>(count);
        tiles<E>(plan, image, canvas, values, fast.get(), level);
        same(plain.get(), fast.get(), count, "tiles", h, w, new_h, new_w);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
    dice.seed(argc > 2 ? std::atoi(argv[2]) : 1);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    refusals();
    long cases = 0;
    for (; std::chrono::steady_clock::now() < end; ++cases) {
        int h = side(), w = side(), new_h = side(), new_w = side();
        if (pick(0, 9) == 0) h = 1;
        if (pick(0, 9) == 0) w = 1;
        if (pick(0, 99) == 0) h = pick(1, 3), w = pick(30'000, 65'500), new_h = pick(1, 40), new_w = pick(1, 300);
        if (pick(0, 9) == 0) new_h = h;
        if (pick(0, 9) == 0) new_w = w;
        const size_t bytes = 3ull * h * w;
        auto image = exactly<uint8_t>(bytes);
        for (size_t i = 0; i < bytes; ++i) image[i] = static_cast<uint8_t>(dice());
        const int resample = pick(1, 3);
        whole(image.get(), h, w, new_h, new_w, resample);
        const int type = pick(0, 3);
        if (type == 0) cut<U8>(image.get(), h, w, resample);
        if (type == 1) cut<F32>(image.get(), h, w, resample);
        if (type == 2) cut<BF16>(image.get(), h, w, resample);
        pick(0, 1) ? tiled<U8>(image.get(), h, w, resample) : tiled<F32>(image.get(), h, w, resample);
        if (type == 3) cut<F16>(image.get(), h, w, resample);
    }
    std::printf("%ld images of random sizes, %s: no read or write out of bounds, no difference\n", cases,
                forms().empty() ? "the plain form alone" : "the plain form, AVX2 and that of AVX-512");
}
