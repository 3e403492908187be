// The scanner of bodies over random ones, for a build with -fsanitize=address,undefined: `make sanitize`.
//
// Every body lies in memory of exactly its size, so that one byte read past it is found; so does what texts are unescaped into.
// What is found lies inside the body, and a prefix of a valid body is never valid. Arguments: seconds, seed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>

#include "body_scan.hpp"
#include "member_scan.hpp"

using namespace sidecar::json;

namespace {

std::mt19937 dice;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(dice); }

template <size_t N>
std::string any(const char* const (&of)[N]) {
    return of[pick(0, N - 1)];
}

constexpr const char* PLAIN[] = {
    "messages", "input", "tools", "functions", "images", "model", "stream", "strict", "function", "type", "text", "content", "data", "uuid", "url",
    "image_url", "input_image", "image", "tool_use", "arguments", "http://a", "https:", "data:image/png;base64,AAAA", "data: IMAGE/x;a;base64,", "k", "",
};
constexpr const char* ODD[] = {
    "\\n", "\\u0074ext", "\\ud83d\\ude00", "\\ud83d", "\\ude00x", "\\\"", "\\/", "\xC3\xA9", "\xE4\xBD\xA0", "\xED\xA0\x80", "\xF0\x9F\x98\x80", "\xC2\xA0http:", "a long text of many words",
};
constexpr const char* SCALARS[] = {"0", "-0", "7", "1.5", "-1e9", "1E-400", "true", "false", "null", "NaN", "-Infinity", "Infinity"};
constexpr const char* WRONG[] = {"\\", "\"", "{", "}", "[", "]", ",", ":", "\\u12", "\\ud83d\\u", "\xE4", "\xF0\x9F", "01", "-", "1.", "1e", "tru", "\x01", "/"};

std::string text() {
    std::string made = "\"";
    for (int n = pick(0, 2); n >= 0; --n) made += pick(0, 3) ? any(PLAIN) : any(ODD);
    return made + (pick(0, 30) ? "" : std::string(pick(1, 300), 'x')) + "\"";
}

std::string blank() { return pick(0, 9) ? "" : " \t\r\n"; }

std::string value(int depth) {
    const int kind = depth ? pick(0, 6) : pick(3, 6);
    if (kind > 4) return text();
    if (kind > 2) return any(SCALARS);
    const bool object = kind > 0;
    std::string made = object ? "{" : "[";
    for (int n = pick(0, 4), first = 1; n; --n, first = 0)
        made += (first ? "" : ",") + blank() + (object ? (pick(0, 5) ? "\"" + any(PLAIN) + "\"" : text()) + blank() + ":" : "") + blank() + value(depth - 1);
    return made + blank() + (object ? "}" : "]");
}

std::string body() {
    if (pick(0, 200) == 0) return "{\"input\":" + std::string(pick(1000, 1030), '[') + "1";  // as deep as may be
    std::string made = blank() + "{";
    for (int n = pick(0, 4), first = 1; n; --n, first = 0) made += (first ? "\"" : ",\"") + any(PLAIN) + "\":" + value(pick(0, 7));
    return made + "}" + blank();
}

std::string wrong(std::string made) {
    for (int n = pick(1, 3); n; --n) {
        const size_t at = pick(0, static_cast<int>(made.size()));
        if (pick(0, 1)) made.insert(at, any(WRONG));
        else made.erase(at, pick(1, 9));
    }
    return made;
}

void must(bool holds, const char* what, const std::string& body) {
    if (holds) return;
    std::fprintf(stderr, "%s: %s\n", what, body.c_str());
    std::abort();
}

bool scan(const std::string& text, const Wanted& wanted) {
    const std::unique_ptr<Byte[]> bytes(new Byte[text.size()]);
    std::memcpy(bytes.get(), text.data(), text.size());
    Scan scan(bytes.get(), text.size(), wanted);
    if (!scan.run()) return false;
    const auto inside = [&](Span span) { return span.start <= span.end && span.end <= text.size(); };
    for (Span span : scan.found.members) must(inside(span), "a member lies outside", text);
    uint64_t bytes_of_texts = 0;
    for (uint32_t i = scan.found.sums.texts.first; i != NONE; i = scan.found.texts[i].next) {
        const TextNode& node = scan.found.texts[i];
        must(inside(node.span), "a text lies outside", text);
        if (node.printed) continue;
        const size_t size = node.span.end - node.span.start;
        must(is_string(bytes.get() + node.span.start, bytes.get() + node.span.end), "a text is no string", text);
        const std::unique_ptr<Byte[]> out(new Byte[size]);
        bytes_of_texts += unescape(bytes.get() + node.span.start, bytes.get() + node.span.end, out.get());
    }
    must(bytes_of_texts <= scan.found.sums.text.bytes, "texts are longer than their sum", text);
    for (uint32_t i = scan.found.sums.part_nodes.first; i != NONE; i = scan.found.parts[i].next) {
        const PartNode& node = scan.found.parts[i];
        must(inside(node.url) && bytes[node.object] == '{' && bytes[node.url.start - 1] == '"' && bytes[node.url.end] == '"', "a part lies elsewhere", text);
    }
    return true;
}

// Members by path, of the whole text and of the same in two pieces, each in memory of its own size.
void members(const std::string& text, const MemberPaths& paths) {
    MemberScan whole(paths), pieces(paths);
    const auto feed = [](MemberScan& scan, const std::string& piece) {
        const std::unique_ptr<char[]> bytes(new char[piece.size()]);
        std::memcpy(bytes.get(), piece.data(), piece.size());
        scan.feed(bytes.get(), bytes.get() + piece.size());
    };
    const size_t cut = pick(0, static_cast<int>(text.size()));
    feed(whole, text);
    feed(pieces, text.substr(0, cut));
    feed(pieces, text.substr(cut));
    must(whole.found.size() == pieces.found.size(), "pieces hold other members", text);
    for (size_t i = 0; i < whole.found.size(); ++i) {
        const auto &a = whole.found[i], &b = pieces.found[i];
        must(a.path == b.path && a.start == b.start && a.value == b.value, "a member differs in pieces", text);
        must(text.compare(a.start, a.value.size(), a.value) == 0, "a member lies elsewhere", text);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
    dice.seed(argc > 2 ? std::atoi(argv[2]) : 1);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    Wanted wanted;
    for (const char* name : {"messages", "input", "tools", "text", "content"}) wanted.add(name, true);
    for (const char* name : {"model", "stream", "functions", "images"}) wanted.add(name, false);
    MemberPaths paths;
    int index = 0;
    for (const char* path : {"model", "messages", "tools.function.name", "input.content", "stream"}) paths.add(path, index++);
    long cases = 0, valid = 0;
    for (; std::chrono::steady_clock::now() < end; ++cases) {
        const std::string made = body();
        members(pick(0, 3) ? made : "[" + made + "," + made + "]", paths);
        members(wrong(made), paths);
        const bool read = scan(made, wanted);
        must(read || made.find("[[[[[[[[[") != std::string::npos, "a valid body is refused", made);
        valid += read + scan(wrong(made), wanted);
        if (read) must(!scan(made.substr(0, pick(0, static_cast<int>(made.rfind('}')))), wanted), "a part of a body is taken for one", made);
        const std::string noise = any(ODD) + any(WRONG);
        is_string(reinterpret_cast<const Byte*>(noise.data()), reinterpret_cast<const Byte*>(noise.data()) + pick(0, static_cast<int>(noise.size())));
    }
    std::printf("%ld random bodies and broken ones, %ld of them valid: no read or write out of bounds\n", cases, valid);
}
