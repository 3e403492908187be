// One pass over the body of a request: it is checked, and what a price, a label or an image needs is measured.
//
// Rules: no recursion, and memory is bounded: at most MAX_DEPTH frames, MAX_TEXTS texts, MAX_PARTS image parts. Nothing is
// copied. An object is judged when it ends, because its `type` may stand last: until then its frame keeps apart what
// counts under some types only. A key that is known here or asked for holds its last value, as in engines' parsers; any
// other counts each time that it is there.
// What is text and what is media: sidecar/load/python_scan.py says the same in Python, and tests hold them equal.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "json_text.hpp"

namespace sidecar::json {

constexpr size_t MAX_DEPTH = 1024;  // Python's parser goes a little less deep
constexpr size_t MAX_TEXTS = 4096;
constexpr size_t MAX_PARTS = 64;
constexpr size_t MAX_HEAD = 136;  // of a data URL, up to its base64 text
constexpr uint32_t NONE = ~0u;
constexpr uint64_t BYTES_PER_ID = 4;  // that a token id weighs next to text

struct Span {
    uint64_t start = 0, end = 0;  // offsets into the body
};

// Media first, in the order of MEDIA; the others have a slot in a frame, or a meaning of their own.
enum Key : uint8_t {
    IMAGE_URL, INPUT_IMAGE, IMAGE, IMAGE_PIL, IMAGE_EMBEDS, INPUT_AUDIO, AUDIO_URL, AUDIO, VIDEO_URL, INPUT_VIDEO, VIDEO,
    URL, TEXT, CONTENT, DATA, FILE_DATA, INPUT, TOOLS, TOOL, ARGUMENTS, TYPE, FUNCTIONS, FUNCTION, STRICT, UUID, TOOL_USE, IMAGES,
    MULTIMODAL_DATA, SIGNATURE, ENCRYPTED_CONTENT, OTHER
};
constexpr const char* WORDS[] = {
    "image_url", "input_image", "image", "image_pil", "image_embeds", "input_audio", "audio_url", "audio", "video_url", "input_video", "video",
    "url", "text", "content", "data", "file_data", "input", "tools", "tool", "arguments", "type", "functions", "function", "strict", "uuid", "tool_use", "images",
    "multimodal_data", "signature", "encrypted_content",
};
constexpr Key FIRST_AUDIO = INPUT_AUDIO, FIRST_VIDEO = VIDEO_URL, FIRST_SLOT = TEXT, FIRST_PRINTED = INPUT;
constexpr size_t MEDIA = URL, SLOTS = INPUT - TEXT + 1, PRINTED = ARGUMENTS - INPUT + 1, LONGEST_WORD = 17;

// What a frame is, by its place in the body.
enum class Role : uint8_t { ANY, ROOT, MESSAGES, MESSAGE, CONTENT, PART, TOOLS, TOOL, SOURCES };
enum class Type : uint8_t { OBJECT, LIST, STRING, INTEGER, FLOAT, TRUE, OTHER };

struct Chain {  // of nodes
    uint32_t first = NONE, last = NONE;
};

struct TextNode {
    Span span;
    uint32_t next = NONE;
    bool printed = false;  // a value that engines print as JSON, not a string's inside
};

struct PartNode {
    Span url;               // without its quotes
    uint64_t object = 0;    // where its part begins
    uint64_t item = 0, part = 0;  // messages[item].content[part]
    uint32_t next = NONE;
    uint8_t list = 0;       // 0: messages, 1: input, 2: images
    bool escaped = false, link = false, named = false;
};

struct Sums {
    Length text;
    uint64_t ids = 0;
    uint32_t images = 0, audios = 0, videos = 0;
    uint32_t parts = 0, links = 0;  // image parts that hold their image, and those with a link
    Chain texts, part_nodes;
    bool fetches = false;
    bool any = false;  // it differs from Sums{}
};

// Content of a member of the body, by items; weights are bytes of text.
struct Items {
    uint64_t count = 0, lists = 0, weight = 0, squares = 0;
    bool ids = false;  // one sequence
};

struct Url {
    Span span;
    bool escaped = false, link = false, fetched = false, data = false;
};

struct Value {
    Type type = Type::OTHER;
    bool truthy = true, offers = false, strict = false, null = false;
    const Text* text = nullptr;  // of a string
    const Url* url = nullptr;    // an object's own
    const Sums* sums = nullptr;  // of an object or a list
    Length printed;              // as JSON
    Span span;
    uint64_t count = 0;
    Items items;  // of a member of the body
};

struct Frame {
    bool object, mute, named;
    Role role;
    Key key, kind;
    uint8_t list, strict;           // bits: of itself, of its function
    uint8_t offers, strict_offers;  // bits: its tools, its functions
    uint16_t media, fetched;  // bits by Key
    uint32_t set;             // which slots hold something
    size_t root_key;
    uint64_t start, count;
    uint64_t pictures;        // items of its `images`
    uint64_t attached;        // items of its `multimodal_data`
    Url url, image;
    Items items;
    Length printed;
    Sums sums;
    std::array<Sums, SLOTS> slots;          // valid where `set` says so
    std::array<Sums, PRINTED> as_printed;

    void begin(bool is_object, bool is_mute, Role as, uint8_t of, uint64_t at) {
        object = is_object, mute = is_mute, named = false;
        role = as, key = kind = OTHER, list = of;
        strict = offers = strict_offers = 0, media = fetched = 0, set = 0;
        start = at, count = pictures = attached = 0, root_key = 0;
        items = Items{};
        url = image = Url{};
        printed = Length{};
        sums = Sums{};
    }
};

// Names by their length, so that most words are looked at not once.
class Names {
public:
    void add(std::string name) {
        if (by_length_.size() <= name.size()) by_length_.resize(name.size() + 1);
        by_length_[name.size()].emplace_back(std::move(name), count_++);
    }
    size_t count() const { return count_; }

    // The index of a name; count() if it is none.
    size_t find(const char* word, size_t size) const {
        if (size < by_length_.size())
            for (const auto& [name, index] : by_length_[size])
                if (std::memcmp(name.data(), word, size) == 0) return index;
        return count_;
    }
    size_t find(const Text& text) const {
        char head[64];
        const size_t size = text.end - text.begin;
        if (!text.escaped) return find(reinterpret_cast<const char*>(text.begin), size);
        size_t used = 0;
        for (Chars chars{text.begin, text.end}; chars.more();) {
            const int code = chars.next();
            if (code >= 0x80 || used == sizeof head) return count_;  // all names are ASCII
            head[used++] = static_cast<char>(code);
        }
        return find(head, used);
    }

private:
    std::vector<std::vector<std::pair<std::string, size_t>>> by_length_;
    size_t count_ = 0;
};

inline const Names& words() {
    static const Names names = [] {
        Names made;
        for (const char* word : WORDS) made.add(word);
        return made;
    }();
    return names;
}

// The members of a body that are asked for: the first `prompts` of them hold its prompt.
struct Wanted {
    Names names;
    size_t prompts = 0, messages = 0, input = 0, tools = 0, functions = 0, images = 0, documents = 0, state = 0, questions = 0;

    // Whether engines print a member into the prompt as JSON.
    bool prints(size_t key) const { return key < prompts && (key == tools || key == state || key == questions); }

    void add(std::string name, bool is_prompt) {
        names.add(std::move(name));
        if (is_prompt) prompts = names.count();
        const auto of = [&](const char* word) { return names.find(word, std::strlen(word)); };
        messages = of("messages"), input = of("input"), tools = of("tools"), functions = of("functions"), images = of("images");
        documents = of("documents"), state = of("state"), questions = of("questions");
    }
};

struct Findings {
    Sums sums;                  // of the whole prompt
    std::vector<Span> members;  // of the names that are asked for, by the last of each; {0, 0} if absent
    std::vector<Items> items;   // for the same names
    std::vector<TextNode> texts;
    std::vector<PartNode> parts;
    bool all_texts = true;     // none was left out of `texts`
    uint64_t messages = 0;
    uint8_t offers = 0, strict_offers = 0;  // bits: tools, functions, those of messages
    uint64_t sources = 0;      // items of `images`
    bool only_texts = false;   // those items are
    Chain source_nodes;        // of `parts`
};

class Scan {
public:
    Scan(const Byte* body, size_t size, const Wanted& wanted)
        : body_(body), at_(body), end_(body + size), wanted_(wanted), prompts_(wanted.prompts) {
        found.members.resize(wanted.names.count());
        found.items.resize(wanted.names.count());
    }

    // Whether the body is one JSON object, and not too deep.
    bool run() {
        if (starts(at_, end_, "\xEF\xBB\xBF")) at_ += 3;
        if (!skip_space() || *at_ != '{') return false;
        open();
        while (depth_)
            if (!step()) return false;
        skip_space();
        for (const Sums& sums : prompts_) add(found.sums, sums);
        return at_ == end_;
    }

    Findings found;

private:
    const Byte *body_, *at_, *end_;
    const Wanted& wanted_;
    std::vector<Sums> prompts_;
    std::vector<Frame> frames_;
    size_t depth_ = 0;

    uint64_t offset(const Byte* p) const { return p - body_; }
    Span inside(const Text& text) const { return {offset(text.begin), offset(text.end)}; }
    Frame& top() { return frames_[depth_ - 1]; }
    bool skip_space() {
        while (at_ < end_ && is_space(*at_)) ++at_;
        return at_ < end_;
    }

    // The next member or item of the innermost frame, or its end.
    bool step() {
        Frame& frame = top();
        if (!skip_space()) return false;
        if (*at_ == (frame.object ? '}' : ']')) {
            ++at_;
            close();
            return true;
        }
        if (frame.count) {
            if (*at_ != ',') return false;
            ++at_;
            if (!skip_space()) return false;
            frame.printed.add(1);
        }
        if (frame.object && !key(frame)) return false;
        ++frame.count;
        return value();
    }

    bool key(Frame& frame) {
        Text name;
        if (*at_ != '"' || !(at_ = read_string(at_ + 1, end_, name)) || !skip_space() || *at_ != ':') return false;
        ++at_;
        frame.printed.add(name.length);
        frame.printed.add(3 + name.printed_extra);
        if (frame.role == Role::ROOT) frame.root_key = wanted_.names.find(name);
        else frame.key = name.end - name.begin <= static_cast<ptrdiff_t>(LONGEST_WORD) || name.escaped ? static_cast<Key>(words().find(name)) : OTHER;
        return skip_space();
    }

    bool value() {
        if (*at_ == '{' || *at_ == '[') return open();
        Value found;
        Text text;
        found.span.start = offset(at_);
        if (*at_ == '"') {
            if (!(at_ = read_string(at_ + 1, end_, text))) return false;
            found.type = Type::STRING;
            found.text = &text;
            found.truthy = text.begin != text.end;
            found.printed = text.length;
            found.printed.add(2 + text.printed_extra);
        } else {
            if (!(at_ = literal(found))) return false;
            if (!found.printed.bytes) found.printed.add(offset(at_) - found.span.start);
        }
        found.span.end = offset(at_);
        deliver(found);
        return true;
    }

    const Byte* literal(Value& found) {
        const auto is = [&](const char* word) { return starts(at_, end_, word) ? at_ + std::strlen(word) : nullptr; };
        if (*at_ == '-' ? end_ - at_ > 1 && at_[1] != 'I' : is_digit(*at_)) {
            Number number;
            const Byte* after = read_number(at_, end_, number);
            found.type = number.integer ? Type::INTEGER : Type::FLOAT;
            found.truthy = !number.zero;
            // printed, an integer has no -0
            if (after) found.printed.add(number.integer && number.zero ? 1 : after - at_);
            return after;
        }
        switch (*at_) {
            case 't': return found.type = Type::TRUE, is("true");
            case 'f': return found.truthy = false, is("false");
            case 'n': return found.truthy = false, found.null = true, is("null");
            case 'N': return found.type = Type::FLOAT, is("NaN");
            case 'I': return found.type = Type::FLOAT, is("Infinity");
            case '-': return found.type = Type::FLOAT, is("-Infinity");
        }
        return nullptr;
    }

    bool open() {
        if (depth_ == MAX_DEPTH) return false;
        const bool object = *at_ == '{';
        const Role role = depth_ ? role_of(top(), object) : Role::ROOT;
        const uint8_t list = !depth_ ? 0 : role == Role::MESSAGES && top().root_key == wanted_.input ? 1 : top().list;
        if (frames_.size() == depth_) frames_.emplace_back();
        const bool mute = depth_ && (top().mute || mutes(top()));
        frames_[depth_++].begin(object, mute, role, list, offset(at_));
        ++at_;
        return true;
    }

    // Whether the texts below a member need no place of their own: it is no prompt, or counts as a whole.
    bool mutes(const Frame& frame) const {
        if (frame.role == Role::ROOT) return frame.root_key >= wanted_.prompts || wanted_.prints(frame.root_key);
        return frame.object && (frame.key < URL || frame.key == Key::TOOLS || frame.key == Key::TOOL || frame.key == ARGUMENTS);
    }

    Role role_of(const Frame& parent, bool object) const {
        const size_t root = parent.root_key;
        switch (parent.role) {
            case Role::ROOT:
                if (object || root == wanted_.names.count()) return Role::ANY;
                if (root == wanted_.messages || root == wanted_.input) return Role::MESSAGES;
                if (root == wanted_.tools || root == wanted_.functions) return Role::TOOLS;
                return root == wanted_.images ? Role::SOURCES : Role::ANY;
            case Role::MESSAGES: return object ? Role::MESSAGE : Role::ANY;
            case Role::MESSAGE:
                if (!object && parent.key == Key::CONTENT) return Role::CONTENT;
                return !object && parent.list == 0 && (parent.key == Key::TOOLS || parent.key == FUNCTIONS) ? Role::TOOLS : Role::ANY;
            case Role::CONTENT: return object ? Role::PART : Role::ANY;
            case Role::TOOLS: return object ? Role::TOOL : Role::ANY;
            default: return Role::ANY;
        }
    }

    void close() {
        Frame& frame = top();
        Value made;
        made.type = frame.object ? Type::OBJECT : Type::LIST;
        made.truthy = frame.count > 0;
        made.span = {frame.start, offset(at_)};
        made.printed = frame.printed;
        made.printed.add(2);
        made.count = frame.count;
        made.items = frame.items;
        made.items.count = frame.count;
        made.url = &frame.url;
        if (frame.role == Role::ROOT) {
            depth_ = 0;
            return;
        }
        Sums media;
        made.sums = frame.object ? judge(frame, media) : &frame.sums;
        made.offers = frame.role == Role::TOOLS ? frame.count > 0 : frame.offers != 0;
        made.strict = (frame.role == Role::MESSAGE ? frame.strict_offers : frame.strict) != 0;
        --depth_;
        deliver(made);
    }

    // What an object counts, now that its type is known. `media`: room for what a media part does.
    const Sums* judge(Frame& frame, Sums& media) {
        const bool is_media = frame.kind < MEDIA;
        if (!is_media && !frame.set && !frame.media && !frame.pictures && !frame.attached) return &frame.sums;
        Sums& sums = is_media ? media : frame.sums;
        const auto slot = [&](Key key) {
            if (frame.set >> key & 1) add(sums, frame.slots[key - FIRST_SLOT]);
        };
        const auto as_printed = [&](Key key) {
            if (frame.set >> key & 1) add(sums, frame.as_printed[key - FIRST_PRINTED]);
        };
        slot(Key::TEXT);
        slot(Key::CONTENT);
        if (is_media) {
            count_media(sums, frame.kind);
            sums.fetches = sums.fetches || frame.fetched;
            if (frame.role == Role::PART && frame.kind <= INPUT_IMAGE) add_part(sums, frame);
            return &sums;
        }
        if (frame.kind == Key::TEXT || frames_[0].root_key == wanted_.documents) slot(DATA), slot(FILE_DATA);
        if (frame.kind == TOOL_USE) as_printed(INPUT);
        else slot(INPUT);
        for (Key key : {Key::TOOLS, Key::TOOL, ARGUMENTS}) as_printed(key);
        for (int key = 0; key < static_cast<int>(MEDIA); ++key)
            if (frame.media >> key & 1) count_media(sums, static_cast<Key>(key));
        if (frame.pictures + frame.attached) sums.any = true, sums.images += frame.pictures + frame.attached;
        return &sums;
    }

    static void count_media(Sums& sums, Key key) {
        sums.any = true;
        ++(key < FIRST_AUDIO ? sums.images : key < FIRST_VIDEO ? sums.audios : sums.videos);
    }

    void deliver(Value& value) {
        Frame& frame = top();
        if (frame.role == Role::ROOT) return root_member(frame, value);
        frame.printed.add(value.printed);
        if (depth_ == 2) weigh(frame.items, value);
        if (frame.object) return member(frame, value);
        if (is_id(value)) ++frame.sums.ids, frame.sums.any = true;
        else add_value(frame.sums, value);
        if (frame.role == Role::MESSAGES || frame.role == Role::TOOLS) frame.offers |= value.offers, frame.strict |= value.strict;
        if (frame.role == Role::SOURCES) source(frame, value);
    }

    void member(Frame& frame, Value& value) {
        const Key key = frame.key;
        if (key <= URL) {
            const Url url = url_of(value);
            const uint16_t bit = 1u << key;
            frame.fetched = (frame.fetched & ~bit) | (url.fetched ? bit : 0);
            if (key == URL) frame.url = value.type == Type::STRING ? url : Url{};
            if (key == IMAGE_URL) frame.image = url;
            if (key < URL) frame.media = (frame.media & ~bit) | (value.truthy ? bit : 0);
            if (key < URL) return;
        }
        switch (key) {
            case Key::TEXT: case Key::CONTENT: case DATA: case FILE_DATA: case INPUT: {
                frame.set |= 1u << key;
                Sums& slot = frame.slots[key - FIRST_SLOT] = Sums{};
                add_value(slot, value);
                if (key == INPUT) print(frame.as_printed[0] = Sums{}, value);
                return;
            }
            case Key::TOOLS: case Key::TOOL: case ARGUMENTS:
                frame.set |= 1u << key;
                print(frame.as_printed[key - FIRST_PRINTED] = Sums{}, value);
                if (key == Key::TOOLS && frame.role == Role::MESSAGE) offer(frame, value, 1);
                return;
            case TYPE: frame.kind = value.type == Type::STRING ? kind_of(*value.text) : OTHER; break;
            case FUNCTIONS: if (frame.role == Role::MESSAGE) offer(frame, value, 2); break;
            case STRICT: frame.strict = (frame.strict & 2) | (value.type == Type::TRUE ? 1 : 0); break;
            case FUNCTION:
                if (frame.role == Role::TOOL) frame.strict = (frame.strict & 1) | (value.type == Type::OBJECT && value.strict ? 2 : 0);
                break;
            case UUID: frame.named = true; break;
            case IMAGES: frame.pictures = value.type == Type::LIST ? value.count : 0; return;  // Ollama's
            case MULTIMODAL_DATA: frame.attached = value.type == Type::LIST ? value.count : 0; return;  // llama.cpp's
            case SIGNATURE: case ENCRYPTED_CONTENT:
                if (frames_[0].root_key != wanted_.documents) return;
                break;
            default: break;
        }
        add_value(frame.sums, value);
    }

    // Engines also accept 7.0 and true as token ids.
    static bool is_id(const Value& value) { return !value.text && !value.sums && !value.null; }

    static uint64_t weight_of(const Value& value) {
        if (value.type == Type::STRING) return value.text->length.bytes;
        return value.sums ? weight_of(*value.sums) : 0;
    }
    static uint64_t weight_of(const Sums& sums) { return sums.text.bytes + BYTES_PER_ID * sums.ids; }

    static void weigh(Items& items, const Value& value) {
        const uint64_t weight = weight_of(value);
        items.squares += weight * weight;
        items.lists += value.type == Type::LIST;
        items.ids = items.ids || is_id(value);
    }

    template <class Holder>
    static void offer(Holder& holder, const Value& tools, uint8_t bit) {
        const bool is = tools.type == Type::LIST && tools.offers;
        holder.offers = (holder.offers & ~bit) | (is ? bit : 0);
        holder.strict_offers = (holder.strict_offers & ~bit) | (is && tools.strict ? bit : 0);
    }

    void root_member(Frame& frame, Value& value) {
        const size_t key = frame.root_key;
        if (key == wanted_.names.count()) return;
        found.members[key] = value.span;
        found.items[key] = value.items;
        if (value.type == Type::OBJECT && key != wanted_.questions) found.items[key] = Items{};
        found.items[key].weight = weight_of(value);
        const uint64_t items = value.type == Type::LIST ? value.count : 0;
        if (key == wanted_.tools) offer(found, value, 1);
        if (key == wanted_.functions) offer(found, value, 2);
        if (key == wanted_.messages) found.messages = items, offer(found, value, 4);
        if (key == wanted_.images) {
            found.sources = items;
            found.only_texts = value.type == Type::LIST && value.sums->parts == items;
            found.source_nodes = found.only_texts ? value.sums->part_nodes : Chain{};
        }
        if (key >= wanted_.prompts) return;
        Sums& slot = prompts_[key] = Sums{};
        if (wanted_.prints(key)) print(slot, value);
        else add_value(slot, value);
        found.items[key].weight = weight_of(slot);
    }

    void add_value(Sums& sums, const Value& value) {
        if (value.type == Type::STRING) add_text(sums, value);
        else if (value.sums) add(sums, *value.sums);
    }

    void add_text(Sums& sums, const Value& value) {
        if (!value.truthy) return;
        sums.any = true;
        sums.text.add(value.text->length);
        add_node(sums, inside(*value.text), false);
    }

    // A value as engines print it into a prompt: a string as it is, anything else but null as JSON.
    void print(Sums& sums, const Value& value) {
        if (value.type == Type::STRING) return add_text(sums, value);
        if (value.null) return;
        sums.any = true;
        sums.text.add(value.printed);
        add_node(sums, value.span, true);
    }

    void add_node(Sums& sums, Span span, bool printed) {
        if (top().mute) return;
        if (found.texts.size() == MAX_TEXTS) found.all_texts = false;
        else append(sums.texts, found.texts, TextNode{span, NONE, printed});
    }

    template <class Node>
    static void append(Chain& chain, std::vector<Node>& nodes, const Node& node) {
        const uint32_t index = static_cast<uint32_t>(nodes.size());
        nodes.push_back(node);
        join(chain, {index, index}, nodes);
    }

    template <class Node>
    static void join(Chain& chain, const Chain& other, std::vector<Node>& nodes) {
        if (other.first == NONE) return;
        if (chain.first == NONE) chain.first = other.first;
        else nodes[chain.last].next = other.first;
        chain.last = other.last;
    }

    void add(Sums& sums, const Sums& other) {
        if (!other.any) return;
        sums.any = true;
        sums.text.add(other.text);
        sums.ids += other.ids;
        sums.images += other.images, sums.audios += other.audios, sums.videos += other.videos;
        sums.parts += other.parts, sums.links += other.links;
        sums.fetches = sums.fetches || other.fetches;
        join(sums.texts, other.texts, found.texts);
        join(sums.part_nodes, other.part_nodes, found.parts);
    }

    void add_part(Sums& sums, const Frame& frame) {
        const Url& url = frame.image;
        if (!url.data && !url.link) return;
        ++(url.link ? sums.links : sums.parts);
        sums.any = true;
        PartNode node;
        node.url = url.span, node.object = frame.start, node.list = frame.list;
        node.item = frames_[1].count - 1, node.part = frames_[3].count - 1;
        node.escaped = url.escaped, node.link = url.link, node.named = frame.named;
        add_part(sums, node);
    }

    void source(Frame& frame, const Value& value) {
        if (value.type != Type::STRING) return;
        ++frame.sums.parts;
        frame.sums.any = true;
        PartNode node;
        node.url = inside(*value.text);
        node.list = 2, node.item = frame.count - 1, node.escaped = value.text->escaped, node.link = is_link(*value.text);
        add_part(frame.sums, node);
    }

    void add_part(Sums& sums, const PartNode& node) {
        if (found.parts.size() < MAX_PARTS) append(sums.part_nodes, found.parts, node);
    }

    // --- what a short text says ---

    static Key kind_of(const Text& text) {
        const Key kind = static_cast<Key>(words().find(text));
        return kind < MEDIA || kind == Key::TEXT || kind == TOOL_USE ? kind : OTHER;
    }

    Url url_of(const Value& value) const {
        if (value.type == Type::OBJECT) return *value.url;
        if (value.type != Type::STRING) return {};
        const Text& text = *value.text;
        return {inside(text), text.escaped, is_link(text), has_scheme(text.begin, text.end, true), is_image(text)};
    }

    static bool is_blank(int code) {  // as str.isspace() has it
        return (code >= 9 && code <= 13) || (code >= 28 && code <= 32) || code == 0x85 || code == 0xA0 || code == 0x1680 ||
               (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
    }

    static bool has_scheme(const Byte* begin, const Byte* end, bool slashes) {
        Chars chars{begin, end};
        const auto next = [&] {
            const int code = chars.more() ? chars.next() : -1;
            return code >= 'A' && code <= 'Z' ? code | 0x20 : code;
        };
        for (const char* letter = "http"; *letter; ++letter)
            if (next() != *letter) return false;
        int code = next();
        if (code == 's') code = next();
        return code == ':' && (!slashes || (next() == '/' && next() == '/'));
    }

    // As url_policy.is_link has it.
    static bool is_link(const Text& text) {
        Chars chars{text.begin, text.end};
        const Byte* at = chars.at;
        while (chars.more() && is_blank(chars.next())) at = chars.at;
        return has_scheme(at, text.end, false);
    }

    // Whether it is a base64 data URL of an image.
    static bool is_image(const Text& text) {
        char head[MAX_HEAD];
        size_t used = 0;
        for (Chars chars{text.begin, text.end}; chars.more() && used < MAX_HEAD;) {
            const int code = chars.next();
            head[used++] = static_cast<char>(code < 0x80 ? code : '?');
            if (used == 5 && std::memcmp(head, "data:", 5) != 0) return false;
        }
        if (used < 5) return false;
        constexpr char MARK[] = ";base64,";
        const char* stop = std::search(head + 5, head + used, MARK, MARK + 8);
        if (stop == head + used) return false;
        const char* from = head + 5;
        while (from < stop && is_blank(static_cast<Byte>(*from))) ++from;
        constexpr char WORD[] = "image/";
        for (int i = 0; i < 6; ++i)
            if (from + i == stop || (from[i] >= 'A' && from[i] <= 'Z' ? from[i] | 0x20 : from[i]) != WORD[i]) return false;
        return true;
    }
};

}  // namespace sidecar::json
