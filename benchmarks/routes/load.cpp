// The two ends of a measured route, and the least that can stand between them; one thread and one epoll each.
//
//   load engine PORT                          an engine that answers from memory
//   load forward PORT ENGINE_PORT             the physical limit: bytes from socket to socket, nothing is read
//   load requests PORT CONNECTIONS [TENANTS]  one-token requests on kept connections, each after the last one's answer,
//                                             of so many tenants in turn
//   load streams PORT STREAMS CHUNKS PACE_US  streams of that many chunks, a new one when one ends; pace 0: unpaced
//
// A client prints a line of JSON about the time since the last one for each line on its stdin, and ends with it.
// A paced stream's chunks are spread over the pace, unlike those of an engine that decodes all sequences at once: each
// wakes the relay alone, which is the dearest way. Each chunk carries the time when it was sent.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t MAX_KEPT = 1 << 20;  // of a body, to read its options
constexpr int MAX_STARTING = 64;      // connections without a byte of their answer yet, below every listener's backlog
constexpr int RETRY_MS = 20;          // between a connection that broke and the next one
constexpr const char* PROMPT =
    "Say one word. Say one word. Say one word. Say one word. Say one word. Say one word. Say one word. ";

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

// --- HTTP/1.1, as far as these ends speak it ---

bool starts_with_word(std::string_view text, const char* word) {
    return text.size() >= std::strlen(word) && strncasecmp(text.data(), word, std::strlen(word)) == 0;
}

std::string_view header(std::string_view head, const char* name) {
    for (size_t at = head.find("\r\n"); at != std::string_view::npos; at = head.find("\r\n", at + 2)) {
        std::string_view line = head.substr(at + 2);
        if (!starts_with_word(line, name) || line.size() <= std::strlen(name) || line[std::strlen(name)] != ':') continue;
        line = line.substr(std::strlen(name) + 1);
        line = line.substr(0, line.find("\r\n"));
        return line.substr(std::min(line.find_first_not_of(' '), line.size()));
    }
    return {};
}

// One message after the other, requests or responses; `on_body` gets the bytes of the body without their framing.
struct Parser {
    enum { HEAD, SIZED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, DONE } state = HEAD;
    std::string head, line;
    size_t left = 0;

    // Returns the bytes taken; fewer than `size` only where a message ends.
    template <class OnBody> size_t feed(const char* data, size_t size, OnBody&& on_body) {
        size_t at = 0;
        while (at < size && state != DONE) switch (state) {
            case HEAD: {
                head += data[at++];
                if (head.size() < 4 || head.compare(head.size() - 4, 4, "\r\n\r\n") != 0) break;
                begin_body();
                break;
            }
            case SIZED:
            case CHUNK: {
                size_t some = std::min(left, size - at);
                on_body(data + at, some);
                at += some;
                left -= some;
                if (left == 0) state = state == SIZED ? DONE : CHUNK_END;
                break;
            }
            case CHUNK_SIZE:
            case CHUNK_END:
            case TRAILER: {
                line += data[at++];
                if (line.back() == '\n') end_line();
                break;
            }
            case DONE: break;
        }
        return at;
    }

    void begin_body() {
        std::string_view length = header(head, "content-length");
        left = length.empty() ? 0 : std::strtoul(std::string(length).c_str(), nullptr, 10);
        if (starts_with_word(header(head, "transfer-encoding"), "chunked")) state = CHUNK_SIZE;
        else state = left ? SIZED : DONE;
    }

    void end_line() {
        if (state == CHUNK_END) state = CHUNK_SIZE;
        else if (state == TRAILER) state = line == "\r\n" ? DONE : TRAILER;
        else state = (left = std::strtoul(line.c_str(), nullptr, 16)) ? CHUNK : TRAILER;
        line.clear();
    }

    int status() const { return head.size() > 12 ? std::atoi(head.c_str() + 9) : 0; }
    bool closes() const { return starts_with_word(header(head, "connection"), "close"); }
    void reset() { *this = Parser(); }
};

// --- sockets ---

sockaddr_in address(int port) {
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(port);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}

int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in a = address(port);
    if (bind(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) || listen(fd, 4096)) fail("listen");
    return fd;
}

void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

int connect_to(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    sockaddr_in a = address(port);
    if (fd < 0 || (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) && errno != EINPROGRESS)) fail("connect");
    no_delay(fd);
    return fd;
}

struct Poller {
    int fd = epoll_create1(0);
    epoll_event ready[512];

    void change(int operation, int socket, uint32_t events) {
        epoll_event e{};
        e.events = events;
        e.data.fd = socket;
        if (epoll_ctl(fd, operation, socket, &e) && operation != EPOLL_CTL_DEL) fail("epoll_ctl");
    }
    void add(int socket, uint32_t events = EPOLLIN) { change(EPOLL_CTL_ADD, socket, events); }
    void set(int socket, uint32_t events) { change(EPOLL_CTL_MOD, socket, events); }
    int wait(int timeout_ms) { return std::max(0, epoll_wait(fd, ready, 512, timeout_ms)); }
};

// Bytes on their way out of one socket. `flush` returns false where the connection broke.
struct Outbox {
    std::string bytes;
    size_t sent = 0;
    bool blocked = false;  // the socket took no more at the last flush

    bool flush(int fd) {
        while (sent < bytes.size()) {
            ssize_t n = send(fd, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
            if (n < 0) return (blocked = errno == EAGAIN);
            sent += n;
        }
        bytes.clear();
        sent = 0;
        blocked = false;
        return true;
    }
};

char buffer[1 << 18];

// --- the engine ---

std::string sized(const char* type, const std::string& body, const char* status = "200 OK") {
    return std::string("HTTP/1.1 ") + status + "\r\ncontent-type: " + type +
           "\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

std::string chunked(const std::string& data) {
    char size[20];
    std::snprintf(size, sizeof size, "%zx\r\n", data.size());
    return size + data + "\r\n";
}

const std::string CHUNK_HEAD =
    "data: {\"id\":\"chatcmpl-6f1c1a52c6e54d1a\",\"object\":\"chat.completion.chunk\",\"created\":1764500000,"
    "\"model\":\"m\",\"system_fingerprint\":\"t";
const std::string CHUNK_TAIL =
    "\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
const std::string USAGE_EVENT =
    "data: {\"id\":\"chatcmpl-6f1c1a52c6e54d1a\",\"object\":\"chat.completion.chunk\",\"created\":1764500000,\"model\":\"m\","
    "\"choices\":[],\"usage\":{\"prompt_tokens\":31,\"total_tokens\":231,\"completion_tokens\":200}}\n\n";
const std::string DONE_EVENT = "data: [DONE]\n\n";
const std::string ANSWER = sized(
    "application/json",
    "{\"id\":\"chatcmpl-6f1c1a52c6e54d1a\",\"object\":\"chat.completion\",\"created\":1764500000,\"model\":\"m\",\"choices\":[{"
    "\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"word\"},\"logprobs\":null,\"finish_reason\":\"length\"}],"
    "\"usage\":{\"prompt_tokens\":31,\"total_tokens\":32,\"completion_tokens\":1}}");

// What stands after `"key":` in a body, without a parser; a text equal to the key is passed over.
std::string_view value_of(const std::string& body, const char* key) {
    for (size_t at = body.find(key); at != std::string::npos; at = body.find(key, at)) {
        at = body.find_first_not_of(' ', at + std::strlen(key));
        if (at == std::string::npos || body[at] != ':') continue;
        at = body.find_first_not_of(' ', at + 1);
        return at == std::string::npos ? std::string_view() : std::string_view(body).substr(at, 32);
    }
    return {};
}

long number(std::string_view text) { return std::strtol(std::string(text).c_str(), nullptr, 10); }

struct Served {
    Parser parser;
    std::string body;
    Outbox out;
    long chunks_left = -1;  // of the stream under way; -1: none
    int64_t pace_ns = 0, due_ns = 0;
    bool usage_wanted = false;
    uint64_t serial;
};

struct Engine {
    Poller poller;
    int listener, timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    std::unordered_map<int, Served> open;
    using Due = std::pair<int64_t, std::pair<int, uint64_t>>;
    std::priority_queue<Due, std::vector<Due>, std::greater<>> due;
    std::deque<std::pair<int, uint64_t>> unpaced;
    uint64_t serials = 0;
    long running = 0, tokens = 0, finished = 0;

    explicit Engine(int port) : listener(listen_on(port)) {
        poller.add(listener);
        poller.add(timer);
    }

    Served* find(std::pair<int, uint64_t> who) {
        auto found = open.find(who.first);
        return found == open.end() || found->second.serial != who.second ? nullptr : &found->second;
    }

    [[noreturn]] void run() {
        for (;;) {
            int n = poller.wait(unpaced.empty() ? -1 : 0);
            for (int i = 0; i < n; i++) {
                int fd = poller.ready[i].data.fd;
                if (fd == listener) accept_all();
                else if (fd == timer) (void)!read(timer, buffer, 8);
                else serve(fd, poller.ready[i].events);
            }
            send_due();
            for (size_t left = unpaced.size(); left; left--) send_unpaced();
        }
    }

    void accept_all() {
        for (int fd; (fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
            no_delay(fd);
            open[fd].serial = ++serials;
            poller.add(fd);
        }
    }

    void serve(int fd, uint32_t events) {
        if (events & EPOLLOUT && !flushed(fd, open[fd])) return;
        if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
        ssize_t n = recv(fd, buffer, sizeof buffer, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return drop(fd);
        Served& c = open[fd];
        for (ssize_t at = 0; at < n;) {
            at += c.parser.feed(buffer + at, n - at, [&](const char* data, size_t size) {
                c.body.append(data, std::min(size, MAX_KEPT - std::min(MAX_KEPT, c.body.size())));
            });
            if (c.parser.state != Parser::DONE) continue;
            answer(fd, c);
            c.parser.reset();
            c.body.clear();
        }
        flushed(fd, c);
    }

    void answer(int fd, Served& c) {
        std::string_view head = c.parser.head;
        if (starts_with_word(head, "POST")) {
            if (starts_with_word(value_of(c.body, "\"stream\""), "true")) return begin_stream(fd, c);
            tokens++;
            finished++;
            c.out.bytes += ANSWER;
        } else if (starts_with_word(head, "GET /v1/models ")) {
            c.out.bytes += sized("application/json", "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\"}]}");
        } else if (starts_with_word(head, "GET /health ")) {
            c.out.bytes += sized("text/plain", "");
        } else if (starts_with_word(head, "GET /version ")) {
            c.out.bytes += sized("application/json", "{\"version\":\"0.32.0\"}");
        } else if (starts_with_word(head, "GET /metrics ")) {
            c.out.bytes += sized("text/plain; version=0.0.4", metrics());
        } else {
            c.out.bytes += sized("application/json", "{\"detail\":\"Not Found\"}", "404 Not Found");
        }
    }

    std::string metrics() const {
        char page[2048];
        std::snprintf(page, sizeof page,
                      "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} %ld\n"
                      "vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 0\n"
                      "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.1\n"
                      "vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} %ld\n"
                      "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} %ld\n"
                      "vllm:iteration_tokens_total_count{engine=\"0\",model_name=\"m\"} %ld\n"
                      "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"m\"} %ld\n",
                      running, finished * 31, tokens, tokens, finished);
        return page;
    }

    void begin_stream(int fd, Served& c) {
        c.chunks_left = std::max(1L, number(value_of(c.body, "\"max_tokens\"")));
        c.usage_wanted = starts_with_word(value_of(c.body, "\"include_usage\""), "true");
        std::string_view user = value_of(c.body, "\"user\"");  // "pace-50000", in microseconds
        c.pace_ns = starts_with_word(user, "\"pace-") ? number(user.substr(6)) * 1000 : 0;
        c.out.bytes += "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        running++;
        if (!c.pace_ns) return unpaced.push_back({fd, c.serial});
        // golden ratio: any number of streams is spread evenly
        double phase = static_cast<double>(c.serial) * 0.6180339887498949;
        c.due_ns = now_ns() + static_cast<int64_t>((phase - static_cast<int64_t>(phase)) * c.pace_ns);
        due.push({c.due_ns, {fd, c.serial}});
    }

    void put_chunk(Served& c) {
        tokens++;
        c.out.bytes += chunked(CHUNK_HEAD + std::to_string(now_ns()) + CHUNK_TAIL);
        if (--c.chunks_left) return;
        c.chunks_left = -1;
        if (c.usage_wanted) c.out.bytes += chunked(USAGE_EVENT);
        c.out.bytes += chunked(DONE_EVENT) + "0\r\n\r\n";
        running--;
        finished++;
    }

    void send_due() {
        while (!due.empty() && due.top().first <= now_ns()) {
            auto who = due.top().second;
            due.pop();
            Served* c = find(who);
            if (!c) continue;
            put_chunk(*c);
            if (!flushed(who.first, *c) || c->chunks_left < 0) continue;
            due.push({c->due_ns += c->pace_ns, who});
        }
        itimerspec at{};
        if (!due.empty()) {
            at.it_value.tv_sec = due.top().first / 1'000'000'000;
            at.it_value.tv_nsec = due.top().first % 1'000'000'000;
        }
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, nullptr);
    }

    // One chunk, one write, as engines do; a stream whose client is behind waits for EPOLLOUT.
    void send_unpaced() {
        auto who = unpaced.front();
        unpaced.pop_front();
        Served* c = find(who);
        if (!c || c->out.blocked) return;
        put_chunk(*c);
        if (flushed(who.first, *c) && !c->out.blocked && c->chunks_left > 0) unpaced.push_back(who);
    }

    bool flushed(int fd, Served& c) {
        bool was_blocked = c.out.blocked;
        if (!c.out.flush(fd)) return drop(fd), false;
        if (c.out.blocked == was_blocked) return true;
        poller.set(fd, c.out.blocked ? EPOLLIN | EPOLLOUT : EPOLLIN);
        if (was_blocked && c.chunks_left > 0 && !c.pace_ns) unpaced.push_back({fd, c.serial});
        return true;
    }

    void drop(int fd) {
        running -= open[fd].chunks_left > 0;
        open.erase(fd);
        close(fd);
    }
};

// --- the limit ---

struct Forwarder {
    Poller poller;
    int listener, engine_port;
    std::unordered_map<int, int> other;
    std::unordered_map<int, Outbox> out;

    Forwarder(int port, int engine) : listener(listen_on(port)), engine_port(engine) { poller.add(listener); }

    [[noreturn]] void run() {
        for (;;) {
            int n = poller.wait(-1);
            for (int i = 0; i < n; i++) {
                int fd = poller.ready[i].data.fd;
                if (fd == listener) accept_all();
                else if (other.count(fd)) move(fd, poller.ready[i].events);
            }
        }
    }

    void accept_all() {
        for (int fd; (fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
            no_delay(fd);
            int up = connect_to(engine_port);
            other[fd] = up;
            other[up] = fd;
            poller.add(fd);
            poller.add(up);
        }
    }

    void move(int fd, uint32_t events) {
        int to = other[fd];
        if (events & EPOLLOUT && !push(fd)) return drop(fd);
        if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || out[to].blocked) return;
        ssize_t n = recv(fd, buffer, 1 << 16, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return drop(fd);
        if (n < 0) return;
        out[to].bytes.append(buffer, n);
        if (!push(to)) drop(fd);
    }

    // While one side is full, nothing is read from the other.
    bool push(int fd) {
        bool was_blocked = out[fd].blocked;
        if (!out[fd].flush(fd)) return false;
        if (out[fd].blocked == was_blocked) return true;
        // each direction is of its own: what this socket reads, and what the other one does
        set_events(fd);
        set_events(other[fd]);
        return true;
    }

    void set_events(int fd) {
        poller.set(fd, (out[other[fd]].blocked ? 0u : 0u + EPOLLIN) | (out[fd].blocked ? 0u + EPOLLOUT : 0u));
    }

    void drop(int fd) {
        for (int each : {fd, other[fd]}) {
            other.erase(each);
            out.erase(each);
            close(each);
        }
    }
};

// --- the client ---

struct Asking {
    Parser parser;
    Outbox out;
    std::string event;
    int64_t began_ns = 0, last_ns = 0;
    long events = 0;
    bool first_seen = false;
};

struct Client {
    Poller poller;
    int port;
    long streams_of;  // chunks of a stream; 0: one-token requests
    int wanted, starting = 0;
    long tenants, turn = 0;
    std::string head, rest;
    std::unordered_map<int, Asking> open;
    long requests = 0, chunks = 0, errors = 0;
    int64_t since_ns = now_ns(), retry_ns = 0, max_gap_ns = 0;
    std::vector<int64_t> times;  // of requests, or of chunks from the engine's hand to here

    Client(int to, int connections, long chunks_each, long pace_us, long of_tenants = 0)
        : port(to), streams_of(chunks_each), wanted(connections), tenants(of_tenants) {
        post(chunks_each, pace_us);
        poller.add(0);
    }

    void post(long chunks_each, long pace_us) {
        std::string body = std::string("{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"") + PROMPT + "\"}],";
        if (chunks_each) body += "\"stream\":true,\"user\":\"pace-" + std::to_string(pace_us) + "\",";
        body += "\"max_tokens\":" + std::to_string(std::max(1L, chunks_each)) + "}";
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: load\r\naccept: */*\r\n";
        rest = "content-type: application/json\r\ncontent-length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
    }

    std::string request() {
        if (!tenants) return head + rest;
        return head + "x-tenant-id: t" + std::to_string(turn++ % tenants) + "\r\n" + rest;
    }

    void run() {
        for (;;) {
            while (may_connect() && now_ns() >= retry_ns) connect_one();
            int n = poller.wait(may_connect() ? RETRY_MS : -1);
            for (int i = 0; i < n; i++) {
                int fd = poller.ready[i].data.fd;
                if (fd != 0) go_on(fd, poller.ready[i].events);
                else if (read(0, buffer, sizeof buffer) > 0) report();
                else return;
            }
        }
    }

    bool may_connect() const { return static_cast<int>(open.size()) < wanted && starting < MAX_STARTING; }

    void connect_one() {
        int fd = connect_to(port);
        poller.add(fd, EPOLLIN | EPOLLOUT);
        starting++;
        ask(open[fd]);
    }

    void ask(Asking& c) {
        c.parser.reset();
        c.events = c.last_ns = 0;
        c.began_ns = now_ns();
        c.out.bytes = request();
    }

    void go_on(int fd, uint32_t events) {
        Asking& c = open[fd];
        if (events & EPOLLOUT) {
            if (!c.out.flush(fd)) return broke(fd);
            if (!c.out.blocked) poller.set(fd, EPOLLIN);
        }
        if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
        ssize_t n = recv(fd, buffer, sizeof buffer, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return broke(fd);
        if (n < 0) return;
        if (!c.first_seen) starting--;
        c.first_seen = true;
        int64_t now = now_ns();
        ssize_t at = c.parser.feed(buffer, n, [&](const char* data, size_t size) { body(c, now, data, size); });
        if (c.parser.state != Parser::DONE) return;
        if (at != n || !ended_well(c)) return broke(fd);
        requests++;
        if (!streams_of) times.push_back(now - c.began_ns);
        if (c.parser.closes()) return drop(fd);
        ask(c);
        if (!c.out.flush(fd)) return broke(fd);
        if (c.out.blocked) poller.set(fd, EPOLLIN | EPOLLOUT);
    }

    bool ended_well(const Asking& c) const {
        return c.parser.status() == 200 && c.events == (streams_of ? streams_of + 1 : 0);
    }

    void body(Asking& c, int64_t now, const char* data, size_t size) {
        if (!streams_of) return;
        while (size) {
            const char* end = static_cast<const char*>(std::memchr(data, '\n', size));
            size_t some = end ? end - data + 1 : size;
            c.event.append(data, some);
            data += some;
            size -= some;
            if (end && c.event.size() > 1 && c.event[c.event.size() - 2] == '\n') on_event(c, now);
        }
    }

    void on_event(Asking& c, int64_t now) {
        c.events++;
        size_t at = c.event.find("\"t");
        if (at != std::string::npos) {
            chunks++;
            times.push_back(now - std::strtoll(c.event.c_str() + at + 2, nullptr, 10));
        }
        if (c.last_ns) max_gap_ns = std::max(max_gap_ns, now - c.last_ns);
        c.last_ns = now;
        c.event.clear();
    }

    void broke(int fd) {
        errors++;
        retry_ns = now_ns() + RETRY_MS * 1'000'000LL;
        drop(fd);
    }

    void drop(int fd) {
        starting -= !open[fd].first_seen;
        open.erase(fd);
        close(fd);
    }

    double quantile_us(double q) {
        if (times.empty()) return 0;
        auto at = times.begin() + std::min(times.size() - 1, static_cast<size_t>(q * times.size()));
        std::nth_element(times.begin(), at, times.end());
        return *at / 1e3;
    }

    void report() {
        int64_t now = now_ns();
        long active = std::count_if(open.begin(), open.end(), [](auto& each) { return each.second.first_seen; });
        std::printf("{\"seconds\":%.6f,\"requests\":%ld,\"chunks\":%ld,\"errors\":%ld,\"active\":%ld,\"p50_us\":%.1f,"
                    "\"p99_us\":%.1f,\"max_us\":%.1f,\"max_gap_us\":%.1f}\n",
                    (now - since_ns) / 1e9, requests, chunks, errors, active, quantile_us(0.5), quantile_us(0.99),
                    quantile_us(1), max_gap_ns / 1e3);
        std::fflush(stdout);
        requests = chunks = errors = max_gap_ns = 0;
        since_ns = now;
        times.clear();
    }
};

}  // namespace

int main(int count, char** words) {
    std::signal(SIGPIPE, SIG_IGN);
    rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    std::string mode = count > 1 ? words[1] : "";
    std::vector<long> given;
    for (int i = 2; i < count; i++) given.push_back(std::atol(words[i]));
    if (mode == "engine" && given.size() == 1) Engine(given[0]).run();
    if (mode == "forward" && given.size() == 2) Forwarder(given[0], given[1]).run();
    if (mode == "requests" && (given.size() == 2 || given.size() == 3))
        return Client(given[0], given[1], 0, 0, given.size() == 3 ? given[2] : 0).run(), 0;
    if (mode == "streams" && given.size() == 4) return Client(given[0], given[1], given[2], given[3]).run(), 0;
    std::fputs("load engine|forward|requests|streams NUMBERS\n", stderr);
    return 2;
}
