// A resized image on a canvas of zeros, cut into tiles of planes, (tile, channel, y, x): one row at a time, so that
// only one row of bytes is buffered, whatever the size of a tile.
#pragma once

#include "image.hpp"

namespace sidecar {

struct Canvas {
    int height, width, top, left;  // where the resized image is on it
    int tile_height, tile_width;   // divide height and width
};

// One row of RGB to one row per channel.
inline void planes_plain(const uint8_t* in, int width, uint8_t* const* plane) {
    for (int x = 0; x < width; ++x)
        for (int c = 0; c < 3; ++c) plane[c][x] = in[3 * x + c];
}

#ifdef SIDECAR_X86
// As above, 16 pixels at a time: reads and writes up to 15 pixels more.
SIDECAR_AVX2 inline void planes_wide(const uint8_t* in, int width, uint8_t* const* plane) {
    __m128i made[3];
    for (int x = 0; x < width; x += 16) {
        planes_avx2(in + 3 * static_cast<size_t>(x), made);
        for (int c = 0; c < 3; ++c) _mm_storeu_si128(reinterpret_cast<__m128i*>(plane[c] + x), made[c]);
    }
}
#endif

// `out`: (tiles, 3, tile_height, tile_width).
template <class E>
void tiles(const Plan& plan, const uint8_t* image, const Canvas& canvas, const Values& values, typename E::Type* out, Level level) {
    using T = typename E::Type;
    const size_t row = 3 * static_cast<size_t>(plan.x.target), wide = canvas.width + 16;
    std::vector<uint8_t> resized(row + SLACK), line(3 * wide + SLACK), channels(3 * wide);
    uint8_t* const plane[3] = {channels.data(), channels.data() + wide, channels.data() + 2 * wide};
    T table[3][256];
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) table[c][v] = E::make(values, c, static_cast<uint8_t>(v));
    const size_t width = canvas.tile_width, area = width * canvas.tile_height;
    const int columns = canvas.width / canvas.tile_width;
    bool vectors = false;
#ifdef SIDECAR_X86
    vectors = level != Level::PLAIN && width >= 8;
    Eight eight[3];
    if (vectors)
        for (int c = 0; c < 3; ++c) eight[c] = eight_of(values, c);
#endif
    Rows rows(plan, image, level);
    for (int y = 0; y < canvas.height; ++y) {
        if (y >= canvas.top && y < canvas.top + plan.y.target) {
            rows.next(y - canvas.top, resized.data());
            std::memcpy(line.data() + 3 * static_cast<size_t>(canvas.left), resized.data(), row);
        } else {
            std::fill(line.begin(), line.end(), 0);
        }
#ifdef SIDECAR_X86
        if (vectors)
            planes_wide(line.data(), canvas.width, plane);
        else
#endif
            planes_plain(line.data(), canvas.width, plane);
        T* to = out + static_cast<size_t>(y / canvas.tile_height) * columns * 3 * area + y % canvas.tile_height * width;
        for (int x = 0; x < columns; ++x)
            for (int c = 0; c < 3; ++c, to += area) {
                const uint8_t* in = plane[c] + x * width;
                if constexpr (std::is_same_v<E, U8>) {
                    std::memcpy(to, in, width);
                    continue;
                }
#ifdef SIDECAR_X86
                if constexpr (!std::is_same_v<E, U8>)
                    if (vectors) {
                        floats_avx2<E, false>(in, eight[c], width, 1, to);
                        continue;
                    }
#endif
                for (size_t i = 0; i < width; ++i) to[i] = table[c][in[i]];
            }
    }
}

}  // namespace sidecar
