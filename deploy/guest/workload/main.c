/* Process 1 after /init: starts the parts, says FERRY-READY, then a FERRY-STATUS each second. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct config config = {
    .name = "guest",
    .memory_mib = 64,
    .memory_noise_percent = 100,
    .dirty_pages_per_s = 0,
    .verify_pages_per_s = 2000,
    .disk = false,
    .disk_mib = 16,
    .disk_records_per_s = 20,
    .http = false,
    .udp_per_s = 1000,
};
struct counters counters;

static size_t read_text(const char *path, char *buffer, size_t size_bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        give_up("can't open %s: %s", path, strerror(errno));
    ssize_t length = read(fd, buffer, size_bytes - 1);
    close(fd);
    buffer[length > 0 ? length : 0] = '\0';
    return length > 0 ? (size_t)length : 0;
}

static uint64_t parse_number(const char *word, const char *value)
{
    char *end = NULL;
    errno = 0;
    uint64_t number = strtoull(value, &end, 10);
    if (errno || end == value || *end || *value == '-')
        give_up("%s: not a number", word);
    return number;
}

static void parse_word(const char *word)
{
    static const char prefix[] = "ferry.";
    if (strncmp(word, prefix, sizeof prefix - 1) != 0)
        return;
    const char *key = word + sizeof prefix - 1;
    const char *value = strchr(key, '=');
    if (!value)
        give_up("%s: no value", word);
    size_t length = (size_t)(value++ - key);
#define IS(name) (length == sizeof name - 1 && memcmp(key, name, length) == 0)
    if (IS("name"))
        snprintf(config.name, sizeof config.name, "%s", value);
    else if (IS("udp"))
        snprintf(config.udp, sizeof config.udp, "%s", value);
    else if (IS("udp_per_s"))
        config.udp_per_s = parse_number(word, value);
    else if (IS("mem_mib"))
        config.memory_mib = parse_number(word, value);
    else if (IS("mem_noise"))
        config.memory_noise_percent = parse_number(word, value);
    else if (IS("dirty_pages_per_s"))
        config.dirty_pages_per_s = parse_number(word, value);
    else if (IS("verify_pages_per_s"))
        config.verify_pages_per_s = parse_number(word, value);
    else if (IS("disk"))
        config.disk = parse_number(word, value) != 0;
    else if (IS("disk_mib"))
        config.disk_mib = parse_number(word, value);
    else if (IS("disk_records_per_s"))
        config.disk_records_per_s = parse_number(word, value);
    else if (IS("http"))
        config.http = parse_number(word, value) != 0;
    else if (!IS("ip") && !IS("ip6") && !IS("gw") && !IS("gw6")) /* for /init */
        give_up("%s: unknown option", word);
#undef IS
}

static void read_config(void)
{
    char text[4096];
    char *rest = text;
    read_text("/proc/cmdline", text, sizeof text);
    for (char *word; (word = strsep(&rest, " \n"));)
        parse_word(word);
    /* A UUID, "01234567-89ab-...": its first 64 bits, without the hyphens. */
    read_text("/proc/sys/kernel/random/boot_id", text, sizeof text);
    unsigned digits = 0;
    for (const char *at = text; *at && digits < 16; at++) {
        if (*at == '-')
            continue;
        char digit[2] = {*at, '\0'};
        config.boot_id = config.boot_id << 4 | strtoul(digit, NULL, 16);
        digits++;
    }
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    read_config();
    power_start();
    if (config.disk)
        disk_start();
    memory_start();
    if (config.http)
        http_start();
    if (config.udp[0])
        udp_start();
    counters.ready = true;
    say("FERRY-READY name=%s boot_id=%016llx uptime_ms=%llu", config.name,
        (unsigned long long)config.boot_id, (unsigned long long)(monotonic_ns() / 1000000));
    for (uint64_t next = monotonic_ns();; next += NANOSECONDS_PER_SECOND) {
        char status[900];
        sleep_until_ns(next);
        status_json(status, sizeof status);
        say("FERRY-STATUS %s", status);
    }
}
