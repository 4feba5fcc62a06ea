/* Load generator of the benchmark: sends prepared HTTP requests over many connections and times every answer.
 *
 *     load PORT CONNECTIONS MODE FIRST COUNT PATIENCE_SECONDS REQUESTS ANSWERS
 *
 * MODE is "keep" (the connections are kept alive), "new" (a new connection for each request), or "hold" (as
 * "new", but nothing is sent before all connections have been opened and HOLD_SECONDS have passed, so that
 * the server has accepted what it accepts). REQUESTS holds the requests one after the other, each behind its
 * length as a 32-bit integer; those from FIRST on are sent, COUNT of them, each once. CONNECTIONS requests
 * are always under way, until none is left: with CONNECTIONS = COUNT all begin at once. ANSWERS gets a record
 * for each request: its time in seconds from the beginning (of connect() with a new connection, of sending
 * with "hold") to the last byte of the answer, and its status; status 0 stands for no whole answer within
 * PATIENCE. stdout gets one JSON object. One thread, epoll, no copying: it costs a fraction of any server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HOLD_SECONDS 1.5

enum { ANSWER_BYTES = 16384 };

struct answer {
    double seconds;
    int32_t status;
    int32_t connection;
};

struct connection {
    int fd;
    int reused;            /* it has carried a request before */
    int held;              /* it stands, and nothing is sent yet */
    uint32_t events;       /* what epoll waits for */
    long request;          /* -1: idle */
    size_t sent, received;
    double began;
    char buffer[ANSWER_BYTES + 1];
};

static struct sockaddr_in server;
static const char **requests;
static uint32_t *lengths;
static struct answer *answers;
static long next_request, count, unanswered, opened, repeated;
static int poller, keep_alive, holding;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void watch(struct connection *c, uint32_t events) {
    if (c->events == events)
        return;
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, c->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event))
        fail("epoll_ctl");
    c->events = events;
}

static void hang_up(struct connection *c) {
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->events = 0;
    c->reused = c->held = 0;
}

/* Note the outcome of the request in hand. */
static void settle(struct connection *c, int status, int reusable) {
    answers[c->request] = (struct answer){now() - c->began, status, (int32_t)opened};
    unanswered--;
    c->request = -1;
    if (!reusable)
        hang_up(c);
}

static int start(struct connection *c) {
    if (next_request == count)
        return 0;
    c->request = next_request++;
    c->began = now();
    return 1;
}

static int dial(struct connection *c) {
    int one = 1;
    c->sent = c->received = 0;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        fail("socket");
    opened++;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS)
        return -1;
    watch(c, EPOLLOUT);
    return 0;
}

/* It ended before an answer. One kept alive may have been closed just before: that is tried again. */
static void lose(struct connection *c) {
    int again = c->reused && !c->received;
    hang_up(c);
    if (again && !dial(c))
        repeated++;
    else
        settle(c, 0, 0);
}

/* Return the size of the whole answer, 0 while that is not known, -1 if it goes to the end of the stream. */
static long answer_size(const char *buffer, int *reusable) {
    const char *end = strstr(buffer, "\r\n\r\n"), *line = buffer;
    long length = -1;
    if (!end)
        return 0;
    *reusable = !strncmp(buffer, "HTTP/1.1", 8);
    while ((line = strstr(line, "\r\n")) && line < end) {
        line += 2;
        if (!strncasecmp(line, "content-length:", 15))
            length = atol(line + 15);
        else if (!strncasecmp(line, "connection:", 11))
            *reusable = strncasecmp(line + 11 + strspn(line + 11, " "), "close", 5) != 0;
    }
    if (length < 0)
        *reusable = 0;
    return length < 0 ? -1 : end + 4 - buffer + length;
}

static void send_request(struct connection *c) {
    const char *data = requests[c->request];
    size_t length = lengths[c->request];
    while (c->sent < length) {
        ssize_t n = send(c->fd, data + c->sent, length - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, EPOLLOUT);
            return;
        }
        if (n < 0)
            break; /* the answer, or the reason, is what can be read */
        c->sent += n;
    }
    watch(c, EPOLLIN);
}

static void read_answer(struct connection *c) {
    ssize_t n = recv(c->fd, c->buffer + c->received, ANSWER_BYTES - c->received, 0);
    int reusable = 0;
    if (n < 0 && errno == EAGAIN)
        return;
    if (n > 0)
        c->received += n;
    c->buffer[c->received] = 0;
    long size = answer_size(c->buffer, &reusable);
    if ((size > 0 && c->received >= (size_t)size) || (size < 0 && n == 0))
        settle(c, atoi(c->buffer + 9), reusable && keep_alive);
    else if (n <= 0 || c->received == ANSWER_BYTES)
        lose(c);
}

static void step(struct connection *c) {
    if (c->request >= 0) {
        if (c->events & EPOLLOUT && holding) {
            c->held = 1;
            watch(c, EPOLLIN);
        } else if (c->events & EPOLLOUT)
            send_request(c);
        else
            read_answer(c);
    }
    while (c->request < 0 && start(c)) {
        if (c->fd < 0) {
            if (dial(c))
                settle(c, 0, 0);
        } else {
            c->reused = 1;
            c->sent = c->received = 0;
            send_request(c);
        }
    }
}

/* Send on all connections that have been held. */
static void release(struct connection *all, long connections) {
    holding = 0;
    for (long i = 0; i < connections; i++)
        if (all[i].request >= 0) {
            all[i].began = now();
            if (all[i].held)
                send_request(&all[i]);
        }
}

static void read_requests(const char *path, long first) {
    struct stat status;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &status))
        fail(path);
    const char *data = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (data == MAP_FAILED)
        fail("mmap");
    const char *end = data + status.st_size;
    for (long i = -first; i < count; i++) {
        uint32_t length;
        if (data + 4 > end) {
            fprintf(stderr, "%s: too few requests\n", path);
            exit(1);
        }
        memcpy(&length, data, 4);
        if (i >= 0) {
            requests[i] = data + 4;
            lengths[i] = length;
        }
        data += 4 + length;
    }
}

int main(int argc, char **argv) {
    if (argc != 9) {
        fprintf(stderr, "usage: see the top of load.c\n");
        return 2;
    }
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    long connections = atol(argv[2]);
    keep_alive = !strcmp(argv[3], "keep");
    holding = !strcmp(argv[3], "hold");
    count = unanswered = atol(argv[5]);
    double patience = atof(argv[6]);
    requests = calloc(count, sizeof *requests);
    lengths = calloc(count, sizeof *lengths);
    answers = calloc(count, sizeof *answers);
    struct connection *all = calloc(connections, sizeof *all);
    struct epoll_event events[256];
    if (!requests || !lengths || !answers || !all)
        fail("calloc");
    read_requests(argv[7], atol(argv[4]));
    poller = epoll_create1(0);
    double began = now(), checked = began;
    for (long i = 0; i < connections; i++) {
        all[i].fd = all[i].request = -1;
        step(&all[i]);
    }
    while (unanswered) {
        int n = epoll_wait(poller, events, 256, 100);
        for (int i = 0; i < n; i++)
            step(events[i].data.ptr);
        if (holding && now() - began > HOLD_SECONDS)
            release(all, connections);
        if (now() - checked > 0.1) {
            checked = now();
            for (long i = 0; i < connections; i++)
                if (all[i].request >= 0 && checked - all[i].began > patience) {
                    hang_up(&all[i]);
                    settle(&all[i], 0, 0);
                    step(&all[i]);
                }
        }
    }
    double seconds = now() - began;
    FILE *file = fopen(argv[8], "wb");
    if (!file || fwrite(answers, sizeof *answers, count, file) != (size_t)count || fclose(file))
        fail(argv[8]);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec;
    cpu += (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    printf("{\"seconds\": %.6f, \"cpu\": %.6f, ", seconds, cpu);
    printf("\"connections\": %ld, \"repeated\": %ld}\n", opened, repeated);
    return 0;
}
