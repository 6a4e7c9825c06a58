/* A region of memory whose contents are known, rewritten at a rate and verified all the time.
 *
 * A page's contents follow from its number, its generation (how often it was rewritten) and the
 * boot. The generations are kept beside the region, so a page that a migration lost or left stale
 * is found: by the check before its next rewrite, or by the sweep, which verifies all pages in turn.
 *
 *   word 0       page number
 *   word 1       generation
 *   word i >= 2  value(i) = seed + i * WEYL, seed = mix64(boot_id ^ mix64(page << 32 | generation))
 *                as it is, which no codec makes smaller, up to ferry.mem_noise percent of the page;
 *                from there on one of 16 words that memory is full of, chosen by mix64(value(i))
 *
 * One thread does it all, in ticks, so nothing here is locked but the requests for a full sweep.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <time.h>

#define WORDS_PER_PAGE (PAGE_BYTES / sizeof(uint64_t))
#define WEYL 0x9e3779b97f4a7c15ull
#define TICK_NS 10000000ull
/* A tick that comes late (a busy guest) does at most this much work more. */
#define LATE_NS_MAX 100000000ull
#define FULL_SWEEP_BURST_PAGES 1024u
#define REPORTS_MAX 50u
#define NICE_LEVEL 5

static const uint64_t common[16] = {
    0,
    0,
    0,
    1,
    0xffffffffffffffffull,
    0x00007f0000000000ull,
    0x0000000100000000ull,
    0xffff888000000000ull,
    0x6c6320766964203cull, /* "< div cl", ... */
    0x223d737361202020ull,
    0x2f3c3e6e6170732full,
    0x6572683c20202020ull,
    0x2020202020202020ull,
    0x203a226570797422ull,
    0x74786574202c226eull,
    0x0a0d30203a687467ull,
};

static uint64_t *region;
static size_t noise_words;
static uint32_t *generations;
static uint64_t page_count;
static uint64_t sweep_page;
static uint64_t sweep_pages_left; /* of a full sweep that somebody waits for */

static pthread_mutex_t sweep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sweep_done = PTHREAD_COND_INITIALIZER;
static uint64_t sweeps_requested;
static uint64_t sweeps_finished;

static uint64_t page_seed(uint64_t page, uint32_t generation)
{
    return mix64(config.boot_id ^ mix64(page << 32 | generation));
}

static uint64_t text_word(uint64_t value)
{
    return common[mix64(value) >> 60];
}

static void write_page(uint64_t page)
{
    uint64_t *words = region + page * WORDS_PER_PAGE;
    uint32_t generation = ++generations[page];
    uint64_t word = page_seed(page, generation) + 2 * WEYL;
    size_t i = 2;
    words[0] = page;
    words[1] = generation;
    for (; i < noise_words; i++, word += WEYL)
        words[i] = word;
    for (; i < WORDS_PER_PAGE; i++, word += WEYL)
        words[i] = text_word(word);
}

static void report(uint64_t page)
{
    const uint64_t *words = region + page * WORDS_PER_PAGE;
    uint32_t generation = generations[page];
    uint64_t word = page_seed(page, generation) + 2 * WEYL;
    size_t bad_words = 0;
    size_t first_bad = WORDS_PER_PAGE;
    for (size_t i = 0; i < WORDS_PER_PAGE; i++) {
        uint64_t value = i < noise_words ? word : text_word(word);
        uint64_t expected = i == 0 ? page : i == 1 ? generation : value;
        if (i >= 2)
            word += WEYL;
        if (words[i] == expected)
            continue;
        if (bad_words++ == 0)
            first_bad = i;
    }
    if (++counters.memory_corruptions <= REPORTS_MAX)
        say("FERRY-CORRUPTION memory page=%llu generation=%u found_page=%llu found_generation=%llu "
            "first_bad_word=%zu bad_words=%zu",
            (unsigned long long)page, generation, (unsigned long long)words[0],
            (unsigned long long)words[1], first_bad, bad_words);
    write_page(page); /* so that one loss is reported once */
}

static void verify_page(uint64_t page)
{
    const uint64_t *words = region + page * WORDS_PER_PAGE;
    uint32_t generation = generations[page];
    uint64_t word = page_seed(page, generation) + 2 * WEYL;
    uint64_t difference = (words[0] ^ page) | (words[1] ^ generation);
    size_t i = 2;
    for (; i < noise_words; i++, word += WEYL)
        difference |= words[i] ^ word;
    for (; i < WORDS_PER_PAGE; i++, word += WEYL)
        difference |= words[i] ^ text_word(word);
    if (difference)
        report(page);
    else
        counters.memory_checks++;
}

static void sweep(uint64_t pages)
{
    while (pages--) {
        verify_page(sweep_page);
        if (++sweep_page == page_count) {
            sweep_page = 0;
            counters.memory_sweeps++;
        }
    }
}

static void serve_full_sweep(void)
{
    if (sweep_pages_left == 0) {
        pthread_mutex_lock(&sweep_lock);
        if (sweeps_requested > sweeps_finished)
            sweep_pages_left = page_count;
        pthread_mutex_unlock(&sweep_lock);
    }
    if (sweep_pages_left == 0)
        return;
    uint64_t burst = sweep_pages_left;
    if (burst > FULL_SWEEP_BURST_PAGES)
        burst = FULL_SWEEP_BURST_PAGES;
    sweep(burst);
    sweep_pages_left -= burst;
    if (sweep_pages_left == 0) {
        pthread_mutex_lock(&sweep_lock);
        sweeps_finished++;
        pthread_cond_broadcast(&sweep_done);
        pthread_mutex_unlock(&sweep_lock);
    }
}

bool memory_verify_all(unsigned timeout_s)
{
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += timeout_s;
    int error = 0;
    pthread_mutex_lock(&sweep_lock);
    /* Of its own: a sweep that has begun may have passed the pages the caller asks about. */
    uint64_t ticket = ++sweeps_requested;
    while (sweeps_finished < ticket && error == 0)
        error = pthread_cond_timedwait(&sweep_done, &sweep_lock, &deadline);
    bool finished = sweeps_finished >= ticket;
    pthread_mutex_unlock(&sweep_lock);
    return finished;
}

static void *memory_thread(void *unused)
{
    (void)unused;
    setpriority(PRIO_PROCESS, 0, NICE_LEVEL); /* of this thread, on Linux */
    uint64_t random = config.boot_id;
    uint64_t dirty_debt = 0, verify_debt = 0; /* pages times nanoseconds per second */
    uint64_t last = monotonic_ns();
    for (;;) {
        uint64_t now = monotonic_ns();
        uint64_t elapsed = now - last < LATE_NS_MAX ? now - last : LATE_NS_MAX;
        last = now;
        dirty_debt += elapsed * config.dirty_pages_per_s;
        verify_debt += elapsed * config.verify_pages_per_s;
        for (; dirty_debt >= NANOSECONDS_PER_SECOND; dirty_debt -= NANOSECONDS_PER_SECOND) {
            random += WEYL;
            uint64_t page = mix64(random) % page_count;
            verify_page(page);
            write_page(page);
            counters.memory_writes++;
        }
        sweep(verify_debt / NANOSECONDS_PER_SECOND);
        verify_debt %= NANOSECONDS_PER_SECOND;
        serve_full_sweep();
        if (sweep_pages_left == 0)
            sleep_until_ns(now + TICK_NS);
    }
    return NULL;
}

void memory_start(void)
{
    struct sysinfo info;
    sysinfo(&info);
    uint64_t bytes = config.memory_mib << 20;
    uint64_t free_bytes = (uint64_t)info.freeram * info.mem_unit;
    if (bytes == 0)
        return;
    if (bytes >= free_bytes)
        give_up("ferry.mem_mib=%llu: only %llu MiB are free", (unsigned long long)config.memory_mib,
                (unsigned long long)(free_bytes >> 20));
    if (config.memory_noise_percent > 100)
        give_up("ferry.mem_noise=%llu: at most 100 percent",
                (unsigned long long)config.memory_noise_percent);
    noise_words = WORDS_PER_PAGE * config.memory_noise_percent / 100;
    page_count = bytes / PAGE_BYTES;
    region = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    generations = calloc(page_count, sizeof *generations);
    if (region == MAP_FAILED || !generations)
        give_up("ferry.mem_mib=%llu: can't allocate", (unsigned long long)config.memory_mib);
    for (uint64_t page = 0; page < page_count; page++)
        write_page(page);
    counters.memory_pages = page_count;
    start_thread(memory_thread, NULL);
}
