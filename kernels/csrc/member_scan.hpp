// Members of a JSON text that arrives in pieces, found by their path.
//
// Rules: only members at the exact path are found, never the content of a string or a deeper object. Each byte is read
// once, and only wanted values, if short, are copied. The text is not checked: it belongs to its
// reader, and an invalid value is rejected by its parser. A list at the top is entered: each of its objects
// is an item of its own. Of members of one path and item the last counts, as in every parser.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace sidecar::json {

constexpr size_t MAX_KEY_BYTES = 64;
constexpr size_t MAX_VALUE_BYTES = 1 << 16;  // a longer value is no usage
constexpr size_t MAX_FOUND = 1 << 14;
constexpr size_t MAX_FOUND_BYTES = 1 << 20;  // of all values
constexpr size_t MAX_LEVELS = 4;

// The paths as a tree; node 0 is the top.
class MemberPaths {
public:
    struct Node {
        std::string name;
        uint32_t parent;
        int32_t path = -1;  // its index, if its value is wanted
    };

    MemberPaths() : nodes(1) {}

    bool add(const std::string& path, int32_t index) {
        uint32_t node = 0;
        size_t from = 0, levels = 0;
        for (size_t end = 0; end != std::string::npos; from = end + 1) {
            end = path.find('.', from);
            const auto name = path.substr(from, end == std::string::npos ? end : end - from);
            if (name.empty() || name.size() > MAX_KEY_BYTES || ++levels > MAX_LEVELS) return false;
            const int32_t known = child(node, name);
            if (known < 0) nodes.push_back({name, node});
            node = known < 0 ? static_cast<uint32_t>(nodes.size() - 1) : static_cast<uint32_t>(known);
        }
        nodes[node].path = index;
        return true;
    }

    int32_t child(uint32_t parent, std::string_view name) const {
        for (size_t i = 1; i < nodes.size(); ++i)
            if (nodes[i].parent == parent && nodes[i].name == name) return static_cast<int32_t>(i);
        return -1;
    }

    std::vector<Node> nodes;
};

struct FoundMember {
    int32_t path;
    uint64_t item, start;  // of the top list; of the value, in the whole text
    std::string value;
};

class MemberScan {
public:
    explicit MemberScan(const MemberPaths& paths) : paths(paths) {}

    std::vector<FoundMember> found;

    void feed(const char* begin, const char* end) {
        from = begin;
        for (const char* p = begin; p < end && mode != DONE;) p = step(p, end, begin);
        if (capturing) keep(from, end);
        fed += static_cast<uint64_t>(end - begin);
    }

private:
    // TOP: before the text, or between the items of a list. KEY: before a key or the end of an object.
    enum Mode : uint8_t { TOP, KEY, IN_KEY, COLON, VALUE, STRING, SCALAR, SKIP, DONE };

    const MemberPaths& paths;
    Mode mode = TOP;
    bool in_list = false, in_string = false, escaped = false;
    uint32_t levels[MAX_LEVELS + 1] = {};  // the nodes of the objects that are entered
    size_t level = 0;                      // how many of them are open
    uint64_t depth = 0;                    // of the value that is skipped
    uint64_t item = 0, fed = 0;
    size_t kept = 0;  // bytes of what was found
    int32_t node = -1;  // of the member, -1 if it is not wanted
    std::string key;
    bool capturing = false, too_long = false;
    FoundMember value{};
    const char* from = nullptr;  // what is captured of this piece begins here

    static bool is_blank(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t' || c == ','; }

    const char* step(const char* p, const char* end, const char* begin) {
        switch (mode) {
            case TOP:
                return top(p);
            case KEY:
                if (*p == '"') {
                    key.clear();
                    mode = IN_KEY;
                } else if (*p == '}') {
                    leave();
                } else if (!is_blank(*p)) {
                    mode = DONE;
                }
                return p + 1;
            case IN_KEY:
                return read_key(p, end);
            case COLON:
                if (*p == ':') mode = VALUE;
                return p + 1;
            case VALUE:
                return is_blank(*p) ? p + 1 : open(p, begin);
            case STRING:
                p = pass_string(p, end);
                if (!in_string) close(p, KEY);
                return p;
            case SCALAR:
                while (p < end && *p != ',' && *p != '}' && *p != ']' && !is_blank(*p)) ++p;
                if (p < end) close(p, KEY);
                return p;
            case SKIP:
                return skip(p, end);
            case DONE:
                break;
        }
        return end;
    }

    const char* top(const char* p) {
        const char c = *p;
        if (is_blank(c)) return p + 1;
        if (c == '{') {
            enter(0);
        } else if (c == '[' && !in_list && level == 0) {
            in_list = true;
        } else if (in_list && c == '[') {
            depth = 1;
            mode = SKIP;
            ++item;
        } else if (!in_list || c == ']' || c == '"') {
            mode = DONE;  // a list of texts has no members
        }
        return p + 1;
    }

    void enter(uint32_t at) {
        levels[level++] = at;
        mode = KEY;
    }

    void leave() {
        if (--level) return;
        mode = in_list ? TOP : DONE;
        ++item;
    }

    const char* read_key(const char* p, const char* end) {
        for (; p < end; ++p) {
            if (escaped) {
                escaped = false;
            } else if (*p == '\\') {
                escaped = true;
            } else if (*p == '"') {
                node = key.size() > MAX_KEY_BYTES ? -1 : paths.child(levels[level - 1], key);
                mode = COLON;
                return p + 1;
            }
            if (key.size() <= MAX_KEY_BYTES) key.push_back(*p);
        }
        return p;
    }

    // The first byte of a member's value.
    const char* open(const char* p, const char* begin) {
        const char c = *p;
        const int32_t path = node < 0 ? -1 : paths.nodes[node].path;
        if (c == '{' && node >= 0 && path < 0 && level <= MAX_LEVELS) {
            enter(static_cast<uint32_t>(node));
            return p + 1;
        }
        if (path >= 0) {
            capturing = true;
            too_long = false;
            value = {path, item, fed + static_cast<uint64_t>(p - begin), {}};
            from = p;
        }
        if (c == '"') {
            in_string = true;
            mode = STRING;
        } else if (c == '{' || c == '[') {
            depth = 1;
            mode = SKIP;
        } else if (c == '}' || c == ']') {
            capturing = false;
            mode = DONE;  // no value: this is no JSON
        } else {
            mode = SCALAR;
            return p;
        }
        return p + 1;
    }

    // The value ended before `p`.
    void close(const char* p, Mode next) {
        mode = next;
        if (!capturing) return;
        keep(from, p);
        capturing = false;
        if (too_long || kept + value.value.size() > MAX_FOUND_BYTES) return;
        kept += value.value.size();
        for (auto it = found.rbegin(); it != found.rend() && it->item == value.item; ++it)
            if (it->path == value.path) {
                kept -= it->value.size();
                *it = std::move(value);
                return;
            }
        if (found.size() < MAX_FOUND) found.push_back(std::move(value));
    }

    void keep(const char* begin, const char* end) {
        too_long = too_long || value.value.size() + static_cast<size_t>(end - begin) > MAX_VALUE_BYTES;
        if (too_long)
            value.value.clear();
        else
            value.value.append(begin, end);
    }

    // To the place after the quote that ends a string, or to the end of the piece.
    const char* pass_string(const char* p, const char* end) {
        while (p < end) {
            if (escaped) {
                escaped = false;
                ++p;
                continue;
            }
            p = find<'"', '\\'>(p, end);
            if (p == end) break;
            escaped = *p == '\\';
            in_string = escaped;
            ++p;
            if (!in_string) break;
        }
        return p;
    }

    const char* skip(const char* p, const char* end) {
        while (p < end) {
            if (in_string) {
                p = pass_string(p, end);
                continue;
            }
            p = find_bracket(p, end);
            if (p == end) break;
            const char c = *p++;
            if (c == '"') {
                in_string = true;
            } else if (c == '{' || c == '[') {
                ++depth;
            } else if (--depth == 0) {
                close(p, level ? KEY : TOP);
                break;
            }
        }
        return p;
    }

    static constexpr uint64_t ONES = 0x0101010101010101, TOPS = 0x8080808080808080;

    // Nonzero if one of eight bytes is `c`; the lowest that is marked is one.
    template <char c>
    static uint64_t marks(uint64_t x) {
        const uint64_t y = x ^ (static_cast<uint8_t>(c) * ONES);
        return (y - ONES) & ~y & TOPS;
    }

    template <char a, char b>
    static const char* find(const char* p, const char* end) {
        for (uint64_t x; end - p >= 8; p += 8) {
            std::memcpy(&x, p, 8);
            if (marks<a>(x) | marks<b>(x)) break;
        }
        while (p < end && *p != a && *p != b) ++p;
        return p;
    }

    // A quote, or a bracket of any kind: those differ from `{` and `}` by bit 5 at most.
    static const char* find_bracket(const char* p, const char* end) {
        for (uint64_t x; end - p >= 8; p += 8) {
            std::memcpy(&x, p, 8);
            const uint64_t folded = x | (0x20 * ONES);
            if (marks<'"'>(x) | marks<'{'>(folded) | marks<'}'>(folded)) break;
        }
        while (p < end && *p != '"' && *p != '{' && *p != '}' && *p != '[' && *p != ']') ++p;
        return p;
    }
};

}  // namespace sidecar::json
