/* Numbered, checksummed records on /dev/vda, written in a circle; layout in deploy/guest/records.py.
 *
 * Record n is in slot (n - 1) % slots. Each carries the checksum of the one before, so two writers
 * that interleave break the chain even where each of their records is whole. Records are read back:
 * all at the start, then two after each write, in turn: the reader has to be faster than the writer,
 * or it would trail it for ever and see nothing but the newest record.
 *
 * Only the slot that the next record goes to may hold a broken one at the start: a guest that was
 * killed in the middle of a write had not counted it.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define DEVICE "/dev/vda"
#define VERSION 1u
#define RECORD_BYTES 4096u
#define SCAN_RECORDS 64u
#define VERIFIES_PER_WRITE 2
#define SLOTS_MAX (1u << 20)
#define PATTERN_WORDS ((RECORD_BYTES - 56u) / 8u)
#define WEYL 0x9e3779b97f4a7c15ull
#define REPORTS_MAX 50u

struct record {
    char magic[8];
    uint32_t version;
    uint32_t crc32; /* of the record with this field 0 */
    uint64_t sequence;
    uint64_t slots;
    uint64_t boot_id;
    uint64_t guest_monotonic_ns;
    uint32_t previous_crc32; /* 0 in record 1 */
    uint32_t reserved;
    uint64_t pattern[PATTERN_WORDS];
};
_Static_assert(sizeof(struct record) == RECORD_BYTES, "a record fills its slot");

enum slot_state { SLOT_EMPTY, SLOT_VALID, SLOT_BROKEN };

struct slot {
    uint64_t sequence;
    uint32_t crc32;
    uint32_t previous_crc32;
    enum slot_state state;
};

static const char magic[8] = {'F', 'E', 'R', 'R', 'Y', 'R', 'E', 'C'};
static uint32_t crc_table[256];
static int device = -1;
static uint64_t slot_count;
static uint64_t last_sequence;
static struct slot *slots; /* what each slot holds */
static struct record *buffer; /* SCAN_RECORDS of them, aligned for O_DIRECT */
static pthread_mutex_t write_lock = PTHREAD_MUTEX_INITIALIZER;

static void make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
        crc_table[i] = value;
    }
}

/* CRC-32 as in zlib, of a record whose crc32 field counts as 0. */
static uint32_t record_crc(const struct record *record)
{
    const unsigned char *bytes = (const unsigned char *)record;
    const size_t field = offsetof(struct record, crc32);
    uint32_t crc = ~0u;
    for (size_t i = 0; i < RECORD_BYTES; i++) {
        unsigned char byte = i - field < sizeof record->crc32 ? 0 : bytes[i];
        crc = crc >> 8 ^ crc_table[(crc ^ byte) & 0xff];
    }
    return ~crc;
}

static bool is_zero(const struct record *record)
{
    const uint64_t *words = (const uint64_t *)record;
    uint64_t any = 0;
    for (size_t i = 0; i < RECORD_BYTES / sizeof *words; i++)
        any |= words[i];
    return any == 0;
}

static struct slot inspect(const struct record *record)
{
    struct slot slot = {.state = SLOT_EMPTY};
    if (is_zero(record))
        return slot;
    slot.sequence = record->sequence;
    slot.crc32 = record->crc32;
    slot.previous_crc32 = record->previous_crc32;
    bool valid = memcmp(record->magic, magic, sizeof magic) == 0 && record->version == VERSION &&
                 record->sequence > 0 && record->crc32 == record_crc(record);
    slot.state = valid ? SLOT_VALID : SLOT_BROKEN;
    return slot;
}

static void report(uint64_t sequence, uint64_t slot, const char *what, const struct slot *found)
{
    static const char *const states[] = {"empty", "valid", "broken"};
    if (++counters.disk_corruptions <= REPORTS_MAX)
        say("FERRY-CORRUPTION disk record=%llu slot=%llu what=%s found_state=%s found_record=%llu",
            (unsigned long long)sequence, (unsigned long long)slot, what, states[found->state],
            (unsigned long long)found->sequence);
}

/* Reads `count` records from slot `first`; on an error waits and tries again, like a real disk's
 * user would: the hypervisor decides what a failed request means. */
static void read_slots(uint64_t first, size_t count)
{
    const size_t length = count * RECORD_BYTES;
    while (pread(device, buffer, length, (off_t)(first * RECORD_BYTES)) != (ssize_t)length) {
        counters.disk_errors++;
        say("FERRY-DISK-ERROR reading slot=%llu: %s", (unsigned long long)first, strerror(errno));
        sleep(1);
    }
}

/* The newest record that belongs into a slot when `last_sequence` is the newest of all; 0: none. */
static uint64_t expected_sequence(uint64_t slot)
{
    if (last_sequence <= slot)
        return 0;
    return last_sequence - (last_sequence - 1 - slot) % slot_count;
}

static void verify_start(void)
{
    for (uint64_t first = 0; first < slot_count; first += SCAN_RECORDS) {
        size_t count = slot_count - first < SCAN_RECORDS ? slot_count - first : SCAN_RECORDS;
        read_slots(first, count);
        for (size_t i = 0; i < count; i++) {
            struct slot *slot = &slots[first + i];
            *slot = inspect(buffer + i);
            if (slot->state == SLOT_VALID && slot->sequence > last_sequence)
                last_sequence = slot->sequence;
        }
    }
    for (uint64_t index = 0; index < slot_count; index++) {
        const struct slot *slot = &slots[index];
        uint64_t sequence = expected_sequence(index);
        if (slot->state == SLOT_BROKEN && index == last_sequence % slot_count)
            continue; /* was being written */
        if (sequence == 0 ? slot->state != SLOT_EMPTY
                          : slot->state != SLOT_VALID || slot->sequence != sequence) {
            report(sequence, index, "contents", slot);
            continue;
        }
        if (sequence == 0)
            continue;
        counters.disk_checks++;
        const struct slot *previous = &slots[(index + slot_count - 1) % slot_count];
        if (sequence > 1 && previous->state == SLOT_VALID &&
            previous->sequence == sequence - 1 && previous->crc32 != slot->previous_crc32)
            report(sequence, index, "chain", slot);
    }
}

static void verify_slot(uint64_t index)
{
    if (slots[index].state != SLOT_VALID)
        return;
    read_slots(index, 1);
    struct slot found = inspect(buffer);
    if (found.state == SLOT_VALID && found.sequence == slots[index].sequence &&
        found.crc32 == slots[index].crc32) {
        counters.disk_checks++;
        return;
    }
    bool same_number = found.state == SLOT_VALID && found.sequence == slots[index].sequence;
    report(slots[index].sequence, index, same_number ? "other-writer" : "contents", &found);
    slots[index].state = SLOT_BROKEN; /* reported once; valid again when it is rewritten */
}

static void write_record(void)
{
    const uint64_t sequence = last_sequence + 1;
    const uint64_t index = (sequence - 1) % slot_count;
    struct record *record = buffer;
    memset(record, 0, RECORD_BYTES);
    memcpy(record->magic, magic, sizeof magic);
    record->version = VERSION;
    record->sequence = sequence;
    record->slots = slot_count;
    record->boot_id = config.boot_id;
    record->guest_monotonic_ns = monotonic_ns();
    if (sequence > 1)
        record->previous_crc32 = slots[(index + slot_count - 1) % slot_count].crc32;
    uint64_t word = mix64(sequence ^ config.boot_id);
    for (size_t i = 0; i < PATTERN_WORDS; i++, word += WEYL)
        record->pattern[i] = word;
    record->crc32 = record_crc(record);
    ssize_t written = pwrite(device, record, RECORD_BYTES, (off_t)(index * RECORD_BYTES));
    if (written != (ssize_t)RECORD_BYTES) {
        counters.disk_errors++;
        say("FERRY-DISK-ERROR writing record=%llu: %s", (unsigned long long)sequence,
            strerror(errno));
        sleep(1);
        return;
    }
    slots[index] = inspect(record);
    last_sequence = sequence;
    counters.disk_last_sequence = sequence;
    counters.disk_records_written++;
}

static void *disk_thread(void *unused)
{
    (void)unused;
    const uint64_t interval_ns = NANOSECONDS_PER_SECOND / config.disk_records_per_s;
    uint64_t verify_index = 0;
    for (uint64_t deadline = monotonic_ns();;) {
        pthread_mutex_lock(&write_lock);
        write_record();
        pthread_mutex_unlock(&write_lock);
        for (int i = 0; i < VERIFIES_PER_WRITE; i++) {
            verify_slot(verify_index);
            if (++verify_index >= slot_count || verify_index >= last_sequence)
                verify_index = 0;
        }
        uint64_t now = monotonic_ns();
        deadline += interval_ns;
        if (deadline < now)
            deadline = now;
        sleep_until_ns(deadline);
    }
    return NULL;
}

void disk_stop(void)
{
    pthread_mutex_lock(&write_lock); /* for good */
}

void disk_start(void)
{
    uint64_t size_bytes = 0;
    device = open(DEVICE, O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
    if (device < 0 || ioctl(device, BLKGETSIZE64, &size_bytes) < 0)
        give_up("ferry.disk=1: %s: %s", DEVICE, strerror(errno));
    uint64_t device_slots = size_bytes / RECORD_BYTES;
    slot_count = (config.disk_mib << 20) / RECORD_BYTES;
    if (slot_count > device_slots)
        slot_count = device_slots;
    if (slot_count < 2 || slot_count > SLOTS_MAX)
        give_up("ferry.disk=1: %s has %llu bytes, ferry.disk_mib=%llu: need 2 to %u slots", DEVICE,
                (unsigned long long)size_bytes, (unsigned long long)config.disk_mib, SLOTS_MAX);
    if (posix_memalign((void **)&buffer, RECORD_BYTES, SCAN_RECORDS * RECORD_BYTES))
        give_up("ferry.disk=1: no memory");
    make_crc_table();
    /* A disk that was used before keeps its circle, whatever disk_mib says now. */
    read_slots(0, 1);
    if (inspect(buffer).state == SLOT_VALID && buffer->slots >= 2 &&
        buffer->slots <= device_slots && buffer->slots <= SLOTS_MAX)
        slot_count = buffer->slots;
    slots = calloc(slot_count, sizeof *slots);
    if (!slots)
        give_up("ferry.disk=1: no memory");
    verify_start();
    counters.disk_slots = slot_count;
    counters.disk_last_sequence = last_sequence;
    if (config.disk_records_per_s > 0)
        start_thread(disk_thread, NULL);
}
