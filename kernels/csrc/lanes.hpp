// The horizontal pass's tables for registers of 32 bytes: which source bytes each lane of 16 takes, and with what
// weights.
//
// Rules: four neighbouring output bytes share a lane. One shuffle spreads their 16 source bytes into pairs of taps; it
// fits all pairs, because all windows of a lane advance by two pixels. A slot is two lanes: output bytes 0-3 and 8-11,
// or 4-7 and 12-15, of every 16. At scales of 1 to 2 their source bytes are 16 apart, so one load of 32 bytes fetches
// both.
#pragma once

#include "axis.hpp"

namespace sidecar {

struct Lanes {
    struct Run {
        int begin, end;  // slots, in twos
        bool near;       // whether both lanes of each are 16 bytes apart
    };

    int steps = 0;                 // pairs of taps
    std::vector<int32_t> at;       // slots x 2: byte offset of each lane in the source row
    std::vector<int8_t> spread;    // slots x 32
    std::vector<int16_t> weights;  // slots x steps x 16
    std::vector<Run> runs;
    bool fit = true;  // false if the scale is so large that the pixels of a lane are too far apart

    int slots() const { return static_cast<int>(at.size()) / 2; }

    explicit Lanes(const Axis& x) : steps((x.taps + 1) / 2) {
        const int groups = (3 * x.target + 3) / 4, slots = (groups + 3) / 4 * 2;
        at.assign(2 * static_cast<size_t>(slots), 0);
        spread.assign(32 * static_cast<size_t>(slots), -128);
        weights.assign(16 * static_cast<size_t>(slots) * steps, 0);
        for (int slot = 0; slot < slots; ++slot) {
            const int low = slot / 2 * 4 + slot % 2, high = low + 2;
            place(x, slot, low, high);
            for (int k = 0; k < 4; ++k) {
                put(x, slot, 0, k, 4 * low + k);
                put(x, slot, 1, k, 4 * high + k);
            }
            if (slot % 2 == 0) continue;
            const bool near = apart(slot - 1) == 16 && apart(slot) == 16;
            if (runs.empty() || runs.back().near != near) runs.push_back({slot - 1, slot, near});
            runs.back().end = slot + 1;
        }
    }

  private:
    static int start(const Axis& x, int value) { return 3 * x.first[value / 3] + value % 3; }

    int apart(int slot) const { return at[2 * static_cast<size_t>(slot) + 1] - at[2 * static_cast<size_t>(slot)]; }

    struct Reach {
        int from, to;  // where a lane may begin
    };

    static Reach reach(const Axis& x, int group) {
        const int values = 3 * x.target, from = 4 * group, to = std::min(from + 4, values);
        if (from >= values) return {0, -1};
        Reach r{0, start(x, from)};
        for (int value = from; value < to; ++value) {
            r.from = std::max(r.from, start(x, value) - 12);
            r.to = std::min(r.to, start(x, value));
        }
        return r;
    }

    // Where both lanes of a slot begin: 16 bytes apart if possible.
    void place(const Axis& x, int slot, int low, int high) {
        const Reach a = reach(x, low), b = reach(x, high);
        int32_t* to = &at[2 * static_cast<size_t>(slot)];
        if (a.to < 0) return;  // past the end of the row
        const int from = std::max(a.from, b.from - 16), last = std::min(a.to, b.to - 16);
        to[0] = from <= last ? last : a.to;
        to[1] = from <= last ? last + 16 : std::max(b.to, 0);
    }

    void put(const Axis& x, int slot, int lane, int k, int value) {
        if (value >= 3 * x.target) return;
        const int near = start(x, value) - at[2 * static_cast<size_t>(slot) + lane];
        if (near + 3 > 15) {
            fit = false;
            return;
        }
        int8_t* mask = &spread[32 * static_cast<size_t>(slot) + 16 * lane + 4 * k];
        mask[0] = static_cast<int8_t>(near);
        mask[2] = static_cast<int8_t>(near + 3);
        for (int j = 0; j < x.taps; ++j)
            weights[(static_cast<size_t>(slot) * steps + j / 2) * 16 + 8 * lane + 2 * k + j % 2] =
                x.weights[static_cast<size_t>(value / 3) * x.taps + j];
    }
};

}  // namespace sidecar
