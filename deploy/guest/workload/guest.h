/* What the parts of the guest's workload share: configuration, counters, console, clock.
 *
 * One process, one thread a part:
 *
 *   main.c     reads the command line, starts the parts in order, prints the heartbeat
 *   memory.c   writes and verifies a region of memory
 *   disk.c     writes and verifies numbered records on /dev/vda
 *   udp.c      sends numbered packets, one a millisecond
 *   http.c     serves pages, streams and the counters
 *   power.c    powers off when the ACPI power button is pressed
 *   console.c  lines on the console, the counters as JSON, clock and small helpers
 *
 * Formats that a host reads back (records, packets, streams) are little-endian and are described
 * where the host parses them: deploy/guest/records.py and deploy/guest/protocol.py.
 */
#ifndef FERRY_GUEST_H
#define FERRY_GUEST_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define NANOSECONDS_PER_SECOND 1000000000ull

struct config {
    char name[64];
    uint64_t boot_id;
    uint64_t memory_mib;
    uint64_t memory_noise_percent; /* of each page: what can't be compressed */
    uint64_t dirty_pages_per_s;
    uint64_t verify_pages_per_s;
    bool disk;
    uint64_t disk_mib;
    uint64_t disk_records_per_s;
    bool http;
    uint64_t udp_per_s;
    char udp[64]; /* "a.b.c.d:port", empty for none */
};

/* Each counter has one writer, except the two of http.c. */
struct counters {
    atomic_bool ready;
    atomic_ullong memory_pages;
    atomic_ullong memory_writes;
    atomic_ullong memory_checks;
    atomic_ullong memory_sweeps;
    atomic_ullong memory_corruptions;
    atomic_ullong disk_slots;
    atomic_ullong disk_records_written;
    atomic_ullong disk_last_sequence;
    atomic_ullong disk_checks;
    atomic_ullong disk_corruptions;
    atomic_ullong disk_errors;
    atomic_ullong udp_sent;
    atomic_ullong udp_errors;
    atomic_ullong http_requests;
    atomic_ullong http_bytes_sent;
};

extern struct config config;
extern struct counters counters;

/* console.c */
uint64_t monotonic_ns(void);
void sleep_until_ns(uint64_t deadline_ns);
uint64_t mix64(uint64_t value);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Says why on the console and ends process 1, which panics the guest. */
_Noreturn void give_up(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The counters as one line of JSON, no newline. Returns its length. */
size_t status_json(char *buffer, size_t size_bytes);
/* Starts a detached thread with a small stack. */
void start_thread(void *(*body)(void *), void *argument);

/* Each part's start returns when the part is up. */
void memory_start(void);
/* Waits until every page was verified once more. False after timeout_s. */
bool memory_verify_all(unsigned timeout_s);
void disk_start(void);
/* Lets the record that is being written finish, and writes no other. */
void disk_stop(void);
void udp_start(void);
void http_start(void);
void power_start(void);

#endif
