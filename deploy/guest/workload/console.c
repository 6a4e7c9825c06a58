#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 1024
#define STACK_BYTES (128 * 1024)

static pthread_mutex_t console_lock = PTHREAD_MUTEX_INITIALIZER;

uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NANOSECONDS_PER_SECOND + (uint64_t)now.tv_nsec;
}

void sleep_until_ns(uint64_t deadline_ns)
{
    struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / NANOSECONDS_PER_SECOND),
        .tv_nsec = (long)(deadline_ns % NANOSECONDS_PER_SECOND),
    };
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, NULL) == EINTR)
        ;
}

/* The finalizer of splitmix64: every input bit reaches every output bit. */
uint64_t mix64(uint64_t value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

static void write_line(const char *format, va_list arguments)
{
    char line[LINE_BYTES];
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    if (length < 0)
        return;
    if (length > (int)sizeof line - 2)
        length = (int)sizeof line - 2;
    line[length++] = '\n';
    /* One lock and whole lines: two parts that report at once don't garble each other. */
    pthread_mutex_lock(&console_lock);
    for (int done = 0; done < length;) {
        ssize_t count = write(STDOUT_FILENO, line + done, (size_t)(length - done));
        if (count <= 0)
            break;
        done += (int)count;
    }
    pthread_mutex_unlock(&console_lock);
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line(format, arguments);
    va_end(arguments);
}

void give_up(const char *format, ...)
{
    char reason[LINE_BYTES / 2];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    say("FERRY-ERROR %s", reason);
    _exit(1);
}

size_t status_json(char *buffer, size_t size_bytes)
{
    unsigned long long memory_corruptions = counters.memory_corruptions;
    unsigned long long disk_corruptions = counters.disk_corruptions;
    int length = snprintf(
        buffer, size_bytes,
        "{\"name\":\"%s\",\"boot_id\":\"%016llx\",\"uptime_ms\":%llu,\"ready\":%s,"
        "\"corruptions\":%llu,"
        "\"memory_pages\":%llu,\"memory_writes\":%llu,\"memory_checks\":%llu,"
        "\"memory_sweeps\":%llu,\"memory_corruptions\":%llu,"
        "\"disk_slots\":%llu,\"disk_records_written\":%llu,\"disk_last_sequence\":%llu,"
        "\"disk_checks\":%llu,\"disk_corruptions\":%llu,\"disk_errors\":%llu,"
        "\"udp_sent\":%llu,\"udp_errors\":%llu,"
        "\"http_requests\":%llu,\"http_bytes_sent\":%llu}",
        config.name, (unsigned long long)config.boot_id,
        (unsigned long long)(monotonic_ns() / 1000000), counters.ready ? "true" : "false",
        memory_corruptions + disk_corruptions, counters.memory_pages, counters.memory_writes,
        counters.memory_checks, counters.memory_sweeps, memory_corruptions, counters.disk_slots,
        counters.disk_records_written, counters.disk_last_sequence, counters.disk_checks,
        disk_corruptions, counters.disk_errors, counters.udp_sent, counters.udp_errors,
        counters.http_requests, counters.http_bytes_sent);
    return length < (int)size_bytes ? (size_t)length : size_bytes - 1;
}

void start_thread(void *(*body)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &attributes, body, argument);
    pthread_attr_destroy(&attributes);
    if (error)
        give_up("can't start a thread: %s", strerror(error));
}
