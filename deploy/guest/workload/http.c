/* A small HTTP server on port 80: GET, HEAD and OPTIONS, one request a connection.
 *
 *   /                                a page with the guest's name, the same at every request
 *   /status                          the counters as JSON
 *   /verify                          verifies every page of memory first, then as /status
 *   /10m                             10 MiB of the stream
 *   /stream?bytes=N[&bytes_per_s=R]  N bytes of the stream, at most R a second
 *
 * The stream's contents depend on the offset alone: deploy/guest/protocol.py (stream_bytes).
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define PORT 80
#define CONNECTIONS_MAX 64
#define REQUEST_BYTES_MAX 2048
#define REQUEST_TIMEOUT_S 10
#define CHUNK_BYTES 16384u
#define PACE_NS 50000000ull
#define VERIFY_TIMEOUT_S 60
#define WEYL 0x9e3779b97f4a7c15ull

static atomic_int connections;

static bool send_all(int fd, const void *data, size_t length)
{
    const char *bytes = data;
    while (length > 0) {
        ssize_t count = send(fd, bytes, length, MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return false;
        bytes += count;
        length -= (size_t)count;
        counters.http_bytes_sent += (unsigned long long)count;
    }
    return true;
}

static bool send_head(int fd, const char *status, const char *type, uint64_t length)
{
    char head[256];
    int count = snprintf(head, sizeof head,
                         "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %llu\r\n"
                         "Cache-Control: no-store\r\nConnection: close\r\n\r\n",
                         status, type, (unsigned long long)length);
    return send_all(fd, head, (size_t)count);
}

static void send_text(int fd, bool body, const char *status, const char *type, const char *text)
{
    if (send_head(fd, status, type, strlen(text)) && body)
        send_all(fd, text, strlen(text));
}

static void send_stream(int fd, uint64_t length, uint64_t bytes_per_s)
{
    uint64_t words[CHUNK_BYTES / sizeof(uint64_t)];
    uint64_t chunk_bytes = CHUNK_BYTES;
    if (bytes_per_s > 0) {
        /* About twenty chunks a second, so that a slow stream is a steady one. */
        uint64_t paced = bytes_per_s / (NANOSECONDS_PER_SECOND / PACE_NS) / 8 * 8;
        if (paced < chunk_bytes)
            chunk_bytes = paced < 8 ? 8 : paced;
    }
    uint64_t word = 0;
    uint64_t deadline = monotonic_ns();
    for (uint64_t offset = 0; offset < length; offset += chunk_bytes) {
        uint64_t count = length - offset < chunk_bytes ? length - offset : chunk_bytes;
        for (size_t i = 0; i < (count + 7) / 8; i++, word += WEYL)
            words[i] = word;
        if (!send_all(fd, words, count))
            return;
        if (bytes_per_s == 0)
            continue;
        deadline += count * NANOSECONDS_PER_SECOND / bytes_per_s;
        uint64_t now = monotonic_ns();
        if (deadline < now)
            deadline = now;
        sleep_until_ns(deadline);
    }
}

/* The number after `key` in a query; false where the key is there without a number. */
static bool query_number(const char *query, const char *key, uint64_t *number)
{
    const char *found = strstr(query, key);
    if (!found)
        return true;
    char *end;
    const char *digits = found + strlen(key);
    errno = 0;
    *number = strtoull(digits, &end, 10);
    return !errno && end != digits && *digits != '-' && (*end == '\0' || *end == '&');
}

static void respond(int fd, bool body, char *target)
{
    char text[1024];
    char *query = strchr(target, '?');
    if (query)
        *query++ = '\0';
    if (strcmp(target, "/") == 0) {
        snprintf(text, sizeof text,
                 "<!doctype html>\n<title>%s</title>\n<h1>%s</h1>\n"
                 "<p>A guest on a Ferry cluster.</p>\n",
                 config.name, config.name);
        send_text(fd, body, "200 OK", "text/html; charset=utf-8", text);
    } else if (strcmp(target, "/status") == 0 || strcmp(target, "/verify") == 0) {
        if (target[1] == 'v' && config.memory_mib > 0 && !memory_verify_all(VERIFY_TIMEOUT_S)) {
            send_text(fd, body, "503 Service Unavailable", "text/plain", "not in time\n");
            return;
        }
        size_t length = status_json(text, sizeof text - 1);
        text[length] = '\n';
        text[length + 1] = '\0';
        send_text(fd, body, "200 OK", "application/json", text);
    } else if (strcmp(target, "/10m") == 0) {
        if (send_head(fd, "200 OK", "application/octet-stream", 10 << 20) && body)
            send_stream(fd, 10 << 20, 0);
    } else if (strcmp(target, "/stream") == 0) {
        uint64_t length = 0, bytes_per_s = 0;
        if (!query || !query_number(query, "bytes=", &length) || length == 0 ||
            !query_number(query, "bytes_per_s=", &bytes_per_s)) {
            send_text(fd, body, "400 Bad Request", "text/plain",
                      "use /stream?bytes=N or /stream?bytes=N&bytes_per_s=R\n");
        } else if (send_head(fd, "200 OK", "application/octet-stream", length) && body) {
            send_stream(fd, length, bytes_per_s);
        }
    } else {
        send_text(fd, body, "404 Not Found", "text/plain", "no such page\n");
    }
}

/* Reads up to the empty line. False: too long, too slow, or closed. */
static bool read_request(int fd, char *request)
{
    size_t length = 0;
    while (length < REQUEST_BYTES_MAX - 1) {
        ssize_t count = recv(fd, request + length, REQUEST_BYTES_MAX - 1 - length, 0);
        if (count <= 0)
            return false;
        length += (size_t)count;
        request[length] = '\0';
        if (strstr(request, "\r\n\r\n"))
            return true;
    }
    return false;
}

static void *connection_thread(void *argument)
{
    int fd = (int)(intptr_t)argument;
    char request[REQUEST_BYTES_MAX], method[8], target[256];
    struct timeval timeout = {.tv_sec = REQUEST_TIMEOUT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    if (read_request(fd, request) && sscanf(request, "%7s %255s", method, target) == 2) {
        bool get = strcmp(method, "GET") == 0;
        counters.http_requests++;
        if (get || strcmp(method, "HEAD") == 0)
            respond(fd, get, target);
        else if (strcmp(method, "OPTIONS") == 0) /* what load balancers check health with */
            send_text(fd, true, "200 OK", "text/plain", "");
        else
            send_text(fd, true, "405 Method Not Allowed", "text/plain", "GET it\n");
    }
    shutdown(fd, SHUT_WR);
    close(fd);
    connections--;
    return NULL;
}

static void *accept_thread(void *argument)
{
    int listener = (int)(intptr_t)argument;
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) {
            sleep_until_ns(monotonic_ns() + PACE_NS);
            continue;
        }
        if (connections >= CONNECTIONS_MAX) {
            close(fd);
            continue;
        }
        connections++;
        start_thread(connection_thread, (void *)(intptr_t)fd);
    }
    return NULL;
}

void http_start(void)
{
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_port = htons(PORT)};
    struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    struct sockaddr *address = (struct sockaddr *)&any6;
    socklen_t length = sizeof any6;
    int one = 1;
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0); /* IPv4 too */
    if (listener < 0) {
        listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        address = (struct sockaddr *)&any4;
        length = sizeof any4;
    }
    if (listener < 0)
        give_up("ferry.http=1: no socket: %s", strerror(errno));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, address, length) < 0 || listen(listener, CONNECTIONS_MAX) < 0)
        give_up("ferry.http=1: can't listen on port %d: %s", PORT, strerror(errno));
    start_thread(accept_thread, (void *)(intptr_t)listener);
}
