/* A stand-in for a guest: maps a memory file, and writes to it as it is told on stdin.
 *
 *   fill START END        write every page of the range (bytes), with random content
 *   zero START END        write zeros to every page of the range
 *   touch COUNT START END write COUNT distinct pages spread over the range
 *   run RATE START END    write RATE random pages a second, in the background
 *   pause                 end that; answers how many were written
 *   time START END        write a word to each page; answers the nanoseconds
 *   punch START END       give the range back
 *
 * Every command is answered by one line. End of file ends it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t *memory, seed = 88172645463325252ull;
static volatile int running;
static long rate, low, high, written;

static uint64_t random_word(void) {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

static long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000l + t.tv_nsec;
}

static void write_page(long page) {
  for (int i = 0; i < 512; i += 64) memory[page * 512 + i] = random_word();
}

static void *dirty(void *unused) {
  long began = now_ns();
  for (written = 0; running; written++) {
    long ahead = began + (long)(written * 1e9 / rate) - now_ns();
    if (ahead > 0) usleep(ahead / 1000 + 1);
    write_page(low + random_word() % (high - low));
  }
  return unused;
}

int main(int count, char **arguments) {
  int fd = atoi(arguments[1]);
  long size = atol(arguments[2]), first, last, number;
  char line[128], word[16];
  pthread_t thread;
  (void)count;
  memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return perror("mmap"), 1;
  printf("%lu\n", (unsigned long)memory);
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    long answer = 0;
    number = first = last = 0;
    sscanf(line, "%15s", word);
    if (!strcmp(word, "touch") || !strcmp(word, "run"))
      sscanf(line, "%*s %ld %ld %ld", &number, &first, &last);
    else
      sscanf(line, "%*s %ld %ld", &first, &last);
    first /= 4096, last /= 4096;
    if (!strcmp(word, "fill"))
      for (long page = first; page < last; page++) write_page(page);
    else if (!strcmp(word, "zero"))
      memset(memory + first * 512, 0, (last - first) * 4096);
    else if (!strcmp(word, "touch"))
      for (long i = 0; i < number; i++) write_page(first + (last - first) * i / number);
    else if (!strcmp(word, "punch"))
      answer = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * 4096,
                         (last - first) * 4096);
    else if (!strcmp(word, "time")) {
      long began = now_ns();
      for (long page = first; page < last; page++) memory[page * 512]++;
      answer = now_ns() - began;
    } else if (!strcmp(word, "run")) {
      rate = number, low = first, high = last, running = 1;
      pthread_create(&thread, NULL, dirty, NULL);
    } else if (!strcmp(word, "pause")) {
      running = 0;
      pthread_join(thread, NULL);
      answer = written;
    }
    printf("%ld\n", answer);
    fflush(stdout);
  }
  return 0;
}
