// The entropy decoder of JPEGs over random and damaged files, for a build with -fsanitize=address,undefined: `make sanitize`.
//
// File and coefficients lie in memory of exactly their size, so that one byte read or written past them is found. Heads are sound at
// first, in every sampling, with code tables in which nearly all bits mean something; then bytes are changed, dropped and put in.
// Arguments: seconds, seed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "jpeg_coefficients.hpp"

namespace {

using Bytes = std::vector<uint8_t>;
std::mt19937 dice;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(dice); }

void segment(Bytes& to, uint8_t marker, const Bytes& body) {
    const int length = static_cast<int>(body.size()) + 2;
    for (int byte : {0xFF, static_cast<int>(marker), length >> 8, length & 255}) to.push_back(static_cast<uint8_t>(byte));
    to.insert(to.end(), body.begin(), body.end());
}

// 15 codes of 4 bits, or 255 of 8, each meaning itself; or as many of each length as chance gives, which may be too many.
Bytes code_table(int type, int number, bool regular) {
    Bytes body{static_cast<uint8_t>(type << 4 | number)};
    Bytes counts(16);
    if (regular) {
        counts[type ? 7 : 3] = static_cast<uint8_t>(type ? 255 : 15);
    } else {
        for (auto& count : counts) count = static_cast<uint8_t>(pick(0, 3) ? pick(0, 3) : 0);
    }
    body.insert(body.end(), counts.begin(), counts.end());
    int total = 0;
    for (int count : counts) total += count;
    for (int i = 0; i < total; ++i) body.push_back(static_cast<uint8_t>(type ? (regular ? i : pick(0, 255)) : i & 15));
    return body;
}

struct Writer {
    Bytes& to;
    unsigned bits = 0;
    int count = 0;
    void put(int value, int size) {
        for (int i = size - 1; i >= 0; --i) {
            bits = bits << 1 | (static_cast<unsigned>(value) >> i & 1);
            if (++count % 8) continue;
            to.push_back(static_cast<uint8_t>(bits & 255));
            if ((bits & 255) == 255) to.push_back(0);
        }
    }
    void number(int code_bits, int symbol, int size) {
        put(symbol, code_bits);
        put(pick(0, (1 << size) - 1), size);
    }
};

// Sound blocks of small numbers.
void blocks(Bytes& made, int count) {
    Writer to{made};
    for (; count > 0; --count) {
        const int size = pick(0, 3);
        to.number(4, size, size);
        int at = 1;
        for (int left = pick(0, 12); left > 0; --left) {
            const int run = pick(0, 9), bits = pick(1, 6);
            if (at + run + 1 > 63) break;
            at += run + 1;
            to.number(8, run << 4 | bits, bits);
        }
        to.put(0, 8);
    }
    while (to.count % 8) to.put(1, 1);
}

Bytes file() {
    const bool regular = pick(0, 4) != 0, sound = regular && pick(0, 1);
    Bytes made{0xFF, 0xD8};
    for (int number = 0; number < 2; ++number) {
        Bytes quant{static_cast<uint8_t>(number)};
        for (int i = 0; i < 64; ++i) quant.push_back(static_cast<uint8_t>(pick(0, 255)));
        segment(made, 0xDB, quant);
        for (int type = 0; type < 2; ++type) segment(made, 0xC4, code_table(type, number, regular));
    }
    const int count = pick(0, 2) ? 3 : 1, width = pick(1, 70), height = pick(1, 70);
    if (!sound && pick(0, 1)) segment(made, 0xDD, {0, static_cast<uint8_t>(pick(0, 4))});
    Bytes frame{8, 0, static_cast<uint8_t>(height), 0, static_cast<uint8_t>(width), static_cast<uint8_t>(count)};
    Bytes scan{static_cast<uint8_t>(count)};
    const int h = 1 << pick(0, 2), v = 1 << pick(0, 1);
    for (int i = 0; i < count; ++i) {
        const int factors = i ? (sound || pick(0, 9) ? 0x11 : pick(0, 255)) : h << 4 | v;
        for (int byte : {i + 1, factors, i > 0 ? 1 : 0}) frame.push_back(static_cast<uint8_t>(byte));
        for (int byte : {i + 1, i > 0 ? 0x11 : 0}) scan.push_back(static_cast<uint8_t>(byte));
    }
    segment(made, pick(0, 9) ? 0xC0 : 0xC1, frame);
    for (int byte : {0, 63, 0}) scan.push_back(static_cast<uint8_t>(byte));
    segment(made, 0xDA, scan);
    const int across = count == 1 ? 1 : h, down = count == 1 ? 1 : v;
    const int units = (width + 8 * across - 1) / (8 * across) * ((height + 8 * down - 1) / (8 * down));
    if (sound) blocks(made, units * (across * down + count - 1));
    for (int i = sound ? 0 : pick(0, 4000); i > 0; --i) {
        const int byte = pick(0, 255);
        made.push_back(static_cast<uint8_t>(byte));
        if (byte == 0xFF) made.push_back(static_cast<uint8_t>(pick(0, 20) ? 0 : 0xD0 + pick(0, 9)));
    }
    made.push_back(0xFF);
    made.push_back(0xD9);
    return made;
}

void damage(Bytes& data) {
    for (int i = pick(0, 6); i > 0 && !data.empty(); --i) {
        const auto at = data.begin() + pick(0, static_cast<int>(data.size()) - 1);
        const int what = pick(0, 4);
        if (what == 0) data.erase(at, pick(0, 3) ? at + 1 : data.end());
        else if (what == 1) data.insert(at, static_cast<uint8_t>(pick(0, 1) ? 0xFF : pick(0, 255)));
        else *at = static_cast<uint8_t>(pick(0, 1) ? pick(0, 255) : pick(0, 1) * 255);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
    dice.seed(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : std::random_device{}());
    const auto start = std::chrono::steady_clock::now();
    long files = 0, heads = 0, whole = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        Bytes data = file();
        if (pick(0, 3)) damage(data);
        auto exact = std::make_unique<uint8_t[]>(data.size());
        std::memcpy(exact.get(), data.data(), data.size());
        sidecar::jpeg::File opened(exact.get(), data.size());
        ++files;
        // a damaged size may ask for gigabytes: the caller bounds it, as here
        if (!opened.read_head() || opened.layout.coefficients > 1 << 24) continue;
        ++heads;
        auto out = std::make_unique<int16_t[]>(static_cast<size_t>(opened.layout.coefficients));
        whole += opened.decode(out.get());
    }
    std::printf("jpeg: %ld files, %ld heads read, %ld decoded\n", files, heads, whole);
    return heads && whole ? 0 : 1;
}
