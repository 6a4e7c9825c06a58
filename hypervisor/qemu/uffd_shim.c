/* Preloaded into QEMU, and into nothing else: parks one userfaultfd of QEMU's address space at
 * descriptor $FERRY_UFFD_FD before main() runs. A userfaultfd belongs to the address space of the
 * process that made it, so nobody can make it from outside; once it exists, the agent takes a
 * duplicate with pidfd_getfd() whenever it wants one, also after its own restart.
 *
 * A wrapper that execs QEMU (a shell, prlimit) must not act: its address space dies with the exec.
 * $FERRY_QEMU names the binary that is meant. In it, the environment is cleaned, so that nothing
 * that QEMU starts is preloaded.
 *
 * It also says how QEMU ended: what $FERRY_END_FD leads to holds "r" from now on, and "e" once QEMU
 * has gone through exit(): because the guest or somebody else asked for it, or with an error. After
 * a SIGKILL or a crash it is still "r" (records.py).
 *
 * The other part of the shim, which registers QEMU's iSCSI sessions, is iscsi_shim.c. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

static int end_fd = -1;
static pid_t own_pid;

static void tell_end(const char *state) {
  if (pwrite(end_fd, state, 1, 0) != 1) perror("ferry shim: the end can't be told");
}

__attribute__((destructor)) static void tell_exit(void) {
  if (end_fd >= 0 && getpid() == own_pid) tell_end("e");
}

__attribute__((constructor)) static void park_userfaultfd(void) {
  const char *number = getenv("FERRY_UFFD_FD");
  const char *iscsi_key = getenv("FERRY_ISCSI_KEY");
  const char *binary = getenv("FERRY_QEMU");
  const char *end = getenv("FERRY_END_FD");
  char self[PATH_MAX], wanted[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  if (!number || !binary || length < 0) return;
  self[length] = 0;
  if (!realpath(binary, wanted) || strcmp(self, wanted) != 0) return;
  shim_iscsi_init(iscsi_key);
  int want = atoi(number);
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    perror("ferry shim: userfaultfd");
  } else if (fd != want) {
    if (dup3(fd, want, O_CLOEXEC) < 0) perror("ferry shim: dup3");
    close(fd);
  }
  if (end) {
    end_fd = atoi(end);
    own_pid = getpid();
    tell_end("r");
  }
  unsetenv("LD_PRELOAD");
  unsetenv("FERRY_UFFD_FD");
  unsetenv("FERRY_QEMU");
  unsetenv("FERRY_ISCSI_KEY");
  unsetenv("FERRY_END_FD");
}
