// The pieces of JSON: strings, numbers and literals, as Python's parser takes them.
//
// That parser is what most engines read with: NaN and Infinity are numbers, lone surrogates may stand in strings, raw or
// escaped, and an integer has at most 4,300 digits. Text is measured as it would be in UTF-8, a lone surrogate as "?".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sidecar::json {

using Byte = uint8_t;

constexpr size_t MAX_INTEGER_DIGITS = 4300;  // sys.get_int_max_str_digits()

struct Length {  // in UTF-8 and in characters
    uint64_t bytes = 0, chars = 0;
    void add(const Length& other) { bytes += other.bytes, chars += other.chars; }
    void add(uint64_t ascii) { bytes += ascii, chars += ascii; }
};

struct Text {
    const Byte *begin = nullptr, *end = nullptr;  // without the quotes
    Length length;
    uint64_t printed_extra = 0;  // what escapes add where the text is printed as JSON
    bool escaped = false;
};

inline bool is_space(Byte c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }
inline bool is_digit(Byte c) { return c >= '0' && c <= '9'; }
inline bool is_high(int c) { return c >= 0xD800 && c < 0xDC00; }
inline bool is_low(int c) { return c >= 0xDC00 && c < 0xE000; }

// Nonzero if one of eight bytes ends a run of plain ASCII: a quote, a backslash, a control character, or 0x80 and above.
inline uint64_t special(const Byte* p) {
    constexpr uint64_t ONES = 0x0101010101010101, TOP = 0x8080808080808080;
    uint64_t x;
    std::memcpy(&x, p, 8);
    return ((x - 0x20 * ONES) | ((x ^ ('"' * ONES)) - ONES) | ((x ^ ('\\' * ONES)) - ONES) | x) & TOP;
}

inline const Byte* skip_plain(const Byte* p, const Byte* end) {
    while (end - p >= 32 && !(special(p) | special(p + 8) | special(p + 16) | special(p + 24))) p += 32;
    for (; end - p >= 8; p += 8)
        if (const uint64_t found = special(p)) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
            return p + __builtin_ctzll(found) / 8;  // the lowest is exact; a borrow may mark others above it
#else
            break;
#endif
        }
    while (p < end && *p >= 0x20 && *p < 0x80 && *p != '"' && *p != '\\') ++p;
    return p;
}

// The number of four hexadecimal digits, or -1.
inline int hex4(const Byte* p, const Byte* end) {
    if (end - p < 4) return -1;
    int value = 0;
    for (int i = 0; i < 4; ++i) {
        const Byte c = p[i], low = c | 0x20;
        if (!is_digit(c) && (low < 'a' || low > 'f')) return -1;
        value = value << 4 | (is_digit(c) ? c - '0' : low - 'a' + 10);
    }
    return value;
}

// The bytes of the UTF-8 sequence at `p`, whose first byte is 0x80 or above; 0 if it is none. Surrogates are let pass.
inline int sequence(const Byte* p, const Byte* end) {
    const auto tail = [&](int i) { return (p[i] & 0xC0) == 0x80; };
    const Byte first = *p;
    if (first < 0xC2 || first > 0xF4) return 0;
    if (first < 0xE0) return end - p >= 2 && tail(1) ? 2 : 0;
    if (first < 0xF0) return end - p >= 3 && tail(1) && tail(2) && (first != 0xE0 || p[1] >= 0xA0) ? 3 : 0;
    if (end - p < 4 || !tail(1) || !tail(2) || !tail(3)) return 0;
    return (first != 0xF0 || p[1] >= 0x90) && (first != 0xF4 || p[1] < 0x90) ? 4 : 0;
}

// A character of a string that was checked, and the place after it.
struct Chars {
    const Byte *at, *end;

    bool more() const { return at < end; }

    int next() {
        if (*at != '\\') return plain();
        const Byte kind = at[1];
        at += 2;
        if (kind != 'u') {
            const char* found = std::strchr("b\bf\fn\nr\rt\t", kind);
            return found ? found[1] : kind;
        }
        const int code = hex4(at, end);
        at += 4;
        if (is_high(code) && end - at >= 6 && at[0] == '\\' && at[1] == 'u') {
            if (const int low = hex4(at + 2, end); is_low(low)) {
                at += 6;
                return 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
            }
        }
        return code;
    }

private:
    int plain() {
        if (*at < 0x80) return *at++;
        const int size = sequence(at, end);
        int code = *at & (0xFF >> (size + 1));
        for (int i = 1; i < size; ++i) code = code << 6 | (at[i] & 0x3F);
        at += size;
        return code;
    }
};

inline int utf8_size(int code) { return code < 0x80 || (code >= 0xD800 && code < 0xE000) ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4; }

// Writes a character, a lone surrogate as "?"; returns the place after it.
inline Byte* put_utf8(int code, Byte* out) {
    const int size = utf8_size(code);
    if (size == 1) {
        *out = code < 0x80 ? static_cast<Byte>(code) : '?';
        return out + 1;
    }
    for (int i = size - 1; i > 0; --i, code >>= 6) out[i] = static_cast<Byte>(0x80 | (code & 0x3F));
    *out = static_cast<Byte>((0xF00 >> size & 0xFF) | code);
    return out + size;
}

// What JSON's printed form of a character has beyond the character itself.
inline int printed_extra(int code) {
    if (code == '"' || code == '\\' || (code >= 8 && code <= 13 && code != 11)) return 1;
    return code < 0x20 ? 5 : 0;
}

// The inside of a string from `p` to its closing quote, or to `end` where it stops being one.
inline void read_inside(const Byte* p, const Byte* end, Text& text) {
    text = Text{};
    text.begin = p;
    for (;;) {
        const Byte* run = p;
        text.end = p = skip_plain(p, end);
        text.length.add(static_cast<uint64_t>(p - run));
        if (p == end || *p < 0x20 || *p == '"') return;
        for (; p < end && *p >= 0x80; ++text.length.chars) {
            const int size = sequence(p, end);
            if (!size) return;
            text.length.bytes += *p == 0xED && p[1] >= 0xA0 ? 1 : size;
            text.end = p += size;
        }
        for (; p < end && *p == '\\'; ++text.length.chars) {
            if (end - p < 2 || !p[1] || !std::strchr("\"\\/bfnrtu", p[1]) || (p[1] == 'u' && hex4(p + 2, end) < 0)) return;
            Chars chars{p, end};
            const int code = chars.next();
            text.escaped = true;
            text.length.bytes += utf8_size(code);
            text.printed_extra += printed_extra(code);
            text.end = p = chars.at;
        }
    }
}

// The string that opened before `p`; the place after its closing quote, or nullptr if there is no such string.
inline const Byte* read_string(const Byte* p, const Byte* end, Text& text) {
    read_inside(p, end, text);
    return text.end < end && *text.end == '"' ? text.end + 1 : nullptr;
}

// Whether a string could hold exactly these bytes.
inline bool is_string(const Byte* p, const Byte* end) {
    Text text;
    read_inside(p, end, text);
    return text.end == end;
}

// The text of a string in UTF-8: at most the string's own length. Returns the number of bytes.
inline size_t unescape(const Byte* p, const Byte* end, Byte* out) {
    Byte* to = out;
    for (Chars chars{p, end}; chars.more();) {
        const Byte* stop = skip_plain(chars.at, end);
        std::memcpy(to, chars.at, stop - chars.at);
        to += stop - chars.at;
        chars.at = stop;
        if (chars.more()) to = put_utf8(chars.next(), to);
    }
    return to - out;
}

struct Number {
    bool integer = true, zero = true;
};

// The number at `p`, the place after it, or nullptr.
inline const Byte* read_number(const Byte* p, const Byte* end, Number& number) {
    number = Number{};
    const auto digits = [&] {
        const Byte* from = p;
        for (; p < end && is_digit(*p); ++p) number.zero = number.zero && *p == '0';
        return p - from;
    };
    if (*p == '-') ++p;
    const Byte* whole = p;
    if (!digits() || (*whole == '0' && p - whole > 1)) return nullptr;
    const ptrdiff_t length = p - whole;
    if (p < end && *p == '.') {
        number.integer = false;
        ++p;
        if (!digits()) return nullptr;
    }
    if (p < end && (*p | 0x20) == 'e') {
        number.integer = false;
        const bool zero = number.zero;
        if (++p < end && (*p == '+' || *p == '-')) ++p;
        if (!digits()) return nullptr;
        number.zero = zero;
    }
    return number.integer && length > static_cast<ptrdiff_t>(MAX_INTEGER_DIGITS) ? nullptr : p;
}

inline bool starts(const Byte* p, const Byte* end, const char* word) {
    const size_t size = std::strlen(word);
    return static_cast<size_t>(end - p) >= size && std::memcmp(p, word, size) == 0;
}

}  // namespace sidecar::json
