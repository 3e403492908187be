// A baseline JPEG to its quantised coefficients: the entropy decoder alone. Reads hostile bytes.
//
// Only what libjpeg-turbo decodes without a warning is accepted, and of that only what jpeg.py's arithmetic covers: one interleaved
// Huffman scan of 8-bit grey or YCbCr with full luma, complete to its end marker. Anything else is handed back by `false`: another
// decoder then decides what it is. So a stream gets the coefficients that libjpeg-turbo gives it, or none.
//
// Every read is checked against the end of the data, every write against the layout, whose size the caller gives memory for.
#pragma once

#include <cstdint>
#include <cstring>

namespace sidecar::jpeg {

constexpr int MAX_SIDE = 65500;  // libjpeg's JPEG_MAX_DIMENSION
constexpr int MAX_MCU_BLOCKS = 10;
constexpr int BLOCK = 64;
constexpr uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

struct Component {
    int id = 0, h = 1, v = 1, table = 0;
    int dc = 0, ac = 0;
    int64_t wide = 0, high = 0;  // blocks, whole MCUs
    int64_t first = 0;           // coefficients before it
    uint16_t quant[64] = {};     // in natural order
};

struct Layout {
    int width = 0, height = 0, count = 0;
    int64_t across = 0, down = 0;  // MCUs
    Component components[3];
    int64_t coefficients = 0;
};

// A Huffman table: codes of up to LOOK bits by one look, longer ones by the largest code of each length.
struct Huffman {
    static constexpr int LOOK = 9;
    bool known = false;
    bool is_dc = false;        // its symbols are sizes, 0..15
    uint16_t look[1 << LOOK];  // length << 8 | symbol; 0 if longer or none
    int32_t largest[18];       // of each length, left-aligned to 16 bits, plus one; of none: 0
    int32_t offset[17];
    uint8_t symbols[256];

    // `counts` of lengths 1..16, `total` symbols. False for more codes than there are.
    bool build(const uint8_t* counts, const uint8_t* values, int total) {
        std::memset(look, 0, sizeof look);
        std::memset(symbols, 0, sizeof symbols);
        std::memcpy(symbols, values, static_cast<size_t>(total));
        is_dc = true;
        for (int i = 0; i < total; ++i) is_dc = is_dc && values[i] < 16;
        int32_t code = 0, at = 0;
        for (int length = 1; length <= 16; ++length, code <<= 1) {
            offset[length] = at - code;
            for (int i = 0; i < counts[length - 1]; ++i, ++at, ++code) {
                if (code >= (1 << length) - 1) return false;  // a code of ones only is reserved, as libjpeg demands
                if (length > LOOK) continue;
                const int free = LOOK - length;
                for (int low = 0; low < 1 << free; ++low)
                    look[code << free | low] = static_cast<uint16_t>(length << 8 | symbols[at]);
            }
            largest[length] = counts[length - 1] ? code << (16 - length) : 0;
        }
        return known = true;
    }
};

class Bits {
public:
    Bits(const uint8_t* at, const uint8_t* end) : at_(at), end_(end) {}

    // At least `count` (at most 16) bits, or false.
    bool need(int count) {
        if (count_ < count) fill();
        return count_ >= count;
    }

    uint32_t take(int count) {
        count_ -= count;
        return static_cast<uint32_t>(bits_ >> count_) & ((1u << count) - 1);
    }

    // The next symbol, or -1.
    int symbol(const Huffman& table) {
        if (count_ < 16) fill();
        const uint32_t next = count_ >= 16 ? static_cast<uint32_t>(bits_ >> (count_ - 16)) & 0xFFFF
                                           : static_cast<uint32_t>(bits_ << (16 - count_)) & 0xFFFF;
        if (const uint16_t found = table.look[next >> (16 - Huffman::LOOK)]) {
            count_ -= found >> 8;
            return count_ < 0 ? -1 : found & 0xFF;
        }
        for (int length = Huffman::LOOK + 1; length <= 16; ++length)
            if (static_cast<int32_t>(next) < table.largest[length]) {
                count_ -= length;
                const int32_t at = static_cast<int32_t>(next >> (16 - length)) + table.offset[length];
                return count_ < 0 || at < 0 || at > 255 ? -1 : table.symbols[at];
            }
        return -1;
    }

    // A number of `size` (1..15) bits, as JPEG extends it. False at the end.
    bool number(int size, int& value) {
        if (!need(size)) return false;
        const int bits = static_cast<int>(take(size));
        value = bits < 1 << (size - 1) ? bits - (1 << size) + 1 : bits;
        return true;
    }

    // Drop what is left of a byte; the next byte must begin this marker, maybe behind fill bytes.
    bool marker(uint8_t wanted) {
        fill();
        if (count_ >= 8) return false;
        count_ = 0;
        bits_ = 0;
        if (at_ >= end_ || *at_ != 0xFF) return false;
        while (at_ < end_ && *at_ == 0xFF) ++at_;
        return at_ < end_ && *at_++ == wanted;
    }

private:
    // Bytes up to a marker or the end.
    void fill() {
        while (count_ <= 48) {
            if (at_ >= end_) return;
            const uint8_t byte = *at_;
            if (byte == 0xFF) {
                if (end_ - at_ < 2 || at_[1] != 0) return;
                ++at_;
            }
            ++at_;
            bits_ = bits_ << 8 | byte;
            count_ += 8;
        }
    }

    const uint8_t* at_;
    const uint8_t* end_;
    uint64_t bits_ = 0;
    int count_ = 0;
};

class File {
public:
    File(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

    Layout layout;

    // Everything up to the scan. False: not for this decoder.
    bool read_head() {
        if (end_ - at_ < 2 || at_[0] != 0xFF || at_[1] != 0xD8) return false;
        at_ += 2;
        for (;;) {
            if (end_ - at_ < 4 || *at_ != 0xFF) return false;
            while (at_ < end_ && *at_ == 0xFF) ++at_;
            if (end_ - at_ < 3) return false;
            const uint8_t marker = *at_++;
            const int length = at_[0] << 8 | at_[1];
            if (length < 2 || end_ - at_ < length) return false;
            const uint8_t* body = at_ + 2;
            const int size = length - 2;
            at_ += length;
            if (marker == 0xDA) return scan(body, size) && place();
            if (!segment(marker, body, size)) return false;
        }
    }

    // All coefficients, blocks of 64 in natural order, into `out` of layout.coefficients. False: damaged, or not for this decoder.
    bool decode(int16_t* out) const {
        Bits bits(at_, end_);
        int before[3] = {};
        int64_t left = interval_ ? interval_ : -1;
        uint8_t restart = 0xD0;
        for (int64_t y = 0; y < layout.down; ++y)
            for (int64_t x = 0; x < layout.across; ++x) {
                if (left == 0) {
                    if (!bits.marker(restart)) return false;
                    restart = static_cast<uint8_t>(0xD0 | ((restart + 1) & 7));
                    before[0] = before[1] = before[2] = 0;
                    left = interval_;
                }
                if (left > 0) --left;
                for (int c = 0; c < layout.count; ++c) {
                    const Component& part = layout.components[c];
                    const int h = layout.count == 1 ? 1 : part.h, v = layout.count == 1 ? 1 : part.v;
                    for (int by = 0; by < v; ++by)
                        for (int bx = 0; bx < h; ++bx) {
                            const int64_t block = (y * v + by) * part.wide + x * h + bx;
                            if (!decode_block(bits, part, before[c], out + part.first + block * BLOCK)) return false;
                        }
                }
            }
        return bits.marker(0xD9);
    }

private:
    bool decode_block(Bits& bits, const Component& part, int& before, int16_t* out) const {
        std::memset(out, 0, BLOCK * sizeof *out);
        const int size = bits.symbol(dc_[part.dc]);
        int value = 0;
        if (size < 0 || size > 15 || (size && !bits.number(size, value))) return false;
        before += value;
        if (before < -32768 || before > 32767) return false;
        out[0] = static_cast<int16_t>(before);
        const Huffman& table = ac_[part.ac];
        for (int k = 1; k < BLOCK; ++k) {
            const int symbol = bits.symbol(table);
            if (symbol < 0) return false;
            const int run = symbol >> 4, length = symbol & 15;
            if (!length) {
                if (!run) break;
                if (run != 15) return false;  // libjpeg takes it for the end of the block, others do not
                k += 15;
                if (k >= BLOCK) return false;
                continue;
            }
            k += run;
            if (k >= BLOCK || !bits.number(length, value)) return false;
            out[NATURAL[k]] = static_cast<int16_t>(value);
        }
        return true;
    }

    bool segment(uint8_t marker, const uint8_t* body, int size) {
        if (marker == 0xC0 || marker == 0xC1) return frame(body, size);
        if (marker == 0xC4) return huffman_tables(body, size);
        if (marker == 0xDB) return quant_tables(body, size);
        if (marker == 0xDD) return size == 2 ? (interval_ = body[0] << 8 | body[1], true) : false;
        if (marker == 0xE0 && size >= 14 && !std::memcmp(body, "JFIF", 5)) {
            jfif_ = true;
            return body[5] == 1;  // libjpeg warns of other versions
        }
        if (marker == 0xEE && size >= 12 && !std::memcmp(body, "Adobe", 5)) {
            transform_ = body[11];
            return true;
        }
        return (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
    }

    bool frame(const uint8_t* body, int size) {
        if (layout.count || size < 6 || body[0] != 8) return false;
        layout.height = body[1] << 8 | body[2];
        layout.width = body[3] << 8 | body[4];
        const int count = body[5];
        if ((count != 1 && count != 3) || size != 6 + 3 * count) return false;
        if (layout.width < 1 || layout.height < 1 || layout.width > MAX_SIDE || layout.height > MAX_SIDE) return false;
        for (int i = 0; i < count; ++i) {
            Component& part = layout.components[i];
            const uint8_t* at = body + 6 + 3 * i;
            part.id = at[0];
            part.h = at[1] >> 4;
            part.v = at[1] & 15;
            part.table = at[2];
            if (part.h < 1 || part.h > 4 || part.v < 1 || part.v > 4 || part.table > 3) return false;
            for (int j = 0; j < i; ++j)
                if (layout.components[j].id == part.id) return false;
        }
        layout.count = count;
        return true;
    }

    bool huffman_tables(const uint8_t* body, int size) {
        while (size > 0) {
            if (size < 17) return false;
            const int type = body[0] >> 4, number = body[0] & 15;
            int total = 0;
            for (int i = 1; i <= 16; ++i) total += body[i];
            if (type > 1 || number > 3 || total > 256 || size < 17 + total) return false;
            if (!(type ? ac_ : dc_)[number].build(body + 1, body + 17, total)) return false;
            body += 17 + total;
            size -= 17 + total;
        }
        return true;
    }

    bool quant_tables(const uint8_t* body, int size) {
        while (size > 0) {
            const int wide = body[0] >> 4, number = body[0] & 15, bytes = 1 + BLOCK * (wide ? 2 : 1);
            if (wide > 1 || number > 3 || size < bytes) return false;
            for (int i = 0; i < BLOCK; ++i)
                quant_[number][NATURAL[i]] = static_cast<uint16_t>(wide ? body[1 + 2 * i] << 8 | body[2 + 2 * i] : body[1 + i]);
            has_quant_[number] = true;
            body += bytes;
            size -= bytes;
        }
        return true;
    }

    bool scan(const uint8_t* body, int size) {
        if (!layout.count || size != 4 + 2 * layout.count || body[0] != layout.count) return false;
        for (int i = 0; i < layout.count; ++i) {
            Component& part = layout.components[i];
            const int tables = body[2 + 2 * i];
            part.dc = tables >> 4;
            part.ac = tables & 15;
            if (body[1 + 2 * i] != part.id || part.dc > 3 || part.ac > 3) return false;
            if (!dc_[part.dc].known || !dc_[part.dc].is_dc || !ac_[part.ac].known || !has_quant_[part.table]) return false;
            std::memcpy(part.quant, quant_[part.table], sizeof part.quant);
        }
        const uint8_t* rest = body + 1 + 2 * layout.count;
        return rest[0] == 0 && rest[1] == 63 && rest[2] == 0;
    }

    // libjpeg's rule for three components of no stated colour space.
    bool is_rgb() const {
        if (jfif_) return false;
        if (transform_ >= 0) return transform_ != 1;  // 0 is RGB; libjpeg warns of others
        const Component* c = layout.components;
        return c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B';
    }

    bool place() {
        Component* c = layout.components;
        if (layout.count == 1) {
            c->h = c->v = 1;
            layout.across = (layout.width + 7) / 8;
            layout.down = (layout.height + 7) / 8;
        } else {
            int blocks = 0;
            for (int i = 0; i < 3; ++i) {
                if (c[0].h % c[i].h || c[0].v % c[i].v) return false;  // luma is full, chroma a whole fraction of it
                blocks += c[i].h * c[i].v;
            }
            if (blocks > MAX_MCU_BLOCKS || is_rgb()) return false;
            layout.across = (layout.width + 8 * c->h - 1) / (8 * c->h);
            layout.down = (layout.height + 8 * c->v - 1) / (8 * c->v);
        }
        for (int i = 0; i < layout.count; ++i) {
            c[i].wide = layout.across * c[i].h;
            c[i].high = layout.down * c[i].v;
            c[i].first = layout.coefficients;
            layout.coefficients += c[i].wide * c[i].high * BLOCK;
        }
        return true;
    }

    const uint8_t* at_;
    const uint8_t* end_;
    Huffman dc_[4], ac_[4];
    uint16_t quant_[4][64] = {};
    bool has_quant_[4] = {};
    bool jfif_ = false;
    int transform_ = -1;
    int interval_ = 0;
};

}  // namespace sidecar::jpeg
