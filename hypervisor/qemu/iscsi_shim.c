/* The part of the shim that keeps QEMU's iSCSI sessions registered, so that a LUN knows them.
 *
 * A persistent reservation's registration belongs to a session, and QEMU's libiscsi makes its
 * sessions by itself, also anew whenever a connection breaks. So the registering is done here, in
 * QEMU, between libiscsi and its caller. Only libiscsi's public functions are used.
 *
 *   login done ── every command is held ── REGISTER our key ── READ RESERVATION
 *                                                                 │ is it ours to write?
 *          held commands go out, in order  <── yes ───────────────┤
 *          unregister, then the same: the LUN refuses the writes <── no
 *
 * Nothing is written between REGISTER and the answer of READ RESERVATION. The winner of a handoff
 * makes itself the holder first, and removes the other keys after. So a stale QEMU that
 * comes back is either removed by the winner, or sees the winner and removes itself.
 *
 * A key is 8 bits of mark, 32 bits that stand for the node, 24 bits of fencing token
 * (storage/holder_keys.py). Ours to write: nobody holds the LUN; this node does; or a holder with an
 * older token (a migration's destination, which is paused until it has won).
 *
 * A write that is refused though this node is the holder belongs to a QEMU that lost the LUN and
 * got it back (a rollback after the destination had won). Its connection is shut, so that libiscsi
 * makes a new one, and the write is answered BUSY, so that QEMU tries it again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shim.h"

/* libiscsi's interface, as far as it is used. Its headers need not be installed. */
struct iscsi_context;
struct scsi_task;
struct iscsi_data {
  size_t size;
  unsigned char *data;
};
typedef void (*command_cb)(struct iscsi_context *, int status, void *data, void *private_data);
typedef int (*connect_fn)(struct iscsi_context *, const char *, int, command_cb, void *);
typedef int (*command_fn)(struct iscsi_context *, int, struct scsi_task *, command_cb,
                          struct iscsi_data *, void *);

enum { GOOD = 0, CHECK_CONDITION = 2, BUSY = 8, CONFLICT = 0x18, CANCELLED = 0x0f000000 };
enum { XFER_READ = 1, XFER_WRITE = 2 };
enum { CHECKS_MAX = 16 }; /* unit attentions that follow a login or a target's restart */

static struct {
  connect_fn connect;
  command_fn command;
  int (*destroy)(struct iscsi_context *);
  int (*fd)(struct iscsi_context *);
  struct scsi_task *(*create)(int, unsigned char *, int, int);
  int (*data_in)(struct scsi_task *, int, unsigned char *);
  void (*release)(struct scsi_task *);
} real;

struct held {
  struct held *next;
  struct scsi_task *task;
  command_cb cb;
  void *private_data;
  struct iscsi_data data;
  bool has_data;
  int lun;
};

enum stage { OPEN, REGISTERING, READING, UNREGISTERING };

struct session {
  struct session *next;
  struct iscsi_context *iscsi;
  int lun;
  enum stage stage;
  int checks;
  unsigned char out[24];
  unsigned char in[24];
  struct scsi_task *dropped; /* a claim's task that libiscsi would have sent again */
  struct held *first, **last;
};

struct connecting {
  command_cb cb;
  void *private_data;
  int lun;
};

struct watched {
  command_cb cb;
  void *private_data;
  int lun;
};

struct probe {
  struct watched *command;
  void *data;
  unsigned char in[24];
};

static uint64_t our_key;
static struct session *sessions;
static pthread_mutex_t sessions_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t resolved = PTHREAD_ONCE_INIT;

void shim_iscsi_init(const char *key) { our_key = key ? strtoull(key, NULL, 0) : 0; }

static int find_library(struct dl_phdr_info *info, size_t size, void *found) {
  (void)size;
  const char *base = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
  if (!base || strncmp(base, "/libiscsi.so", 12) != 0) return 0;
  *(void **)found = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  return 1;
}

static void resolve(void) {
  void *library = NULL;
  dl_iterate_phdr(find_library, &library);
  if (!library) library = RTLD_NEXT;
  *(void **)&real.connect = dlsym(library, "iscsi_full_connect_async");
  *(void **)&real.command = dlsym(library, "iscsi_scsi_command_async");
  *(void **)&real.destroy = dlsym(library, "iscsi_destroy_context");
  *(void **)&real.fd = dlsym(library, "iscsi_get_fd");
  *(void **)&real.create = dlsym(library, "scsi_create_task");
  *(void **)&real.data_in = dlsym(library, "scsi_task_add_data_in_buffer");
  *(void **)&real.release = dlsym(library, "scsi_free_scsi_task");
  if (!real.connect || !real.command || !real.destroy || !real.fd || !real.create ||
      !real.data_in || !real.release) {
    fprintf(stderr, "ferry shim: this libiscsi lacks a function; not going on without a fence\n");
    abort();
  }
}

static struct session *find_session(struct iscsi_context *iscsi, bool make) {
  struct session *session;
  pthread_mutex_lock(&sessions_lock);
  for (session = sessions; session && session->iscsi != iscsi; session = session->next) {
  }
  if (!session && make && (session = calloc(1, sizeof *session))) {
    session->iscsi = iscsi;
    session->last = &session->first;
    session->next = sessions;
    sessions = session;
  }
  pthread_mutex_unlock(&sessions_lock);
  return session;
}

static uint64_t key_at(const unsigned char *at) {
  uint64_t key = 0;
  for (int i = 0; i < 8; i++) key = key << 8 | at[i];
  return key;
}

/* The holder's key in a READ RESERVATION answer; 0 where nobody holds it. */
static uint64_t holder_in(const unsigned char *in) {
  uint32_t length = (uint32_t)in[4] << 24 | in[5] << 16 | in[6] << 8 | in[7];
  return length < 16 ? 0 : key_at(in + 8);
}

static bool same_node(uint64_t holder) { return holder >> 24 == our_key >> 24; }

static bool ours_to_write(uint64_t holder) {
  if (holder == 0 || same_node(holder)) return true;
  return holder >> 56 == our_key >> 56 && (holder & 0xffffff) < (our_key & 0xffffff);
}

/* --- claiming a session --- */

static void claim_done(struct iscsi_context *iscsi, int status, void *data, void *private_data);

static void release_held(struct session *session) {
  session->stage = OPEN;
  while (session->stage == OPEN && session->first) {
    struct held *held = session->first;
    session->first = held->next;
    if (!session->first) session->last = &session->first;
    if (real.command(session->iscsi, held->lun, held->task, held->cb,
                     held->has_data ? &held->data : NULL, held->private_data) != 0)
      held->cb(session->iscsi, CANCELLED, held->task, held->private_data);
    free(held);
  }
}

static void send_claim(struct session *session, enum stage stage) {
  unsigned char cdb[10] = {0};
  struct iscsi_data data = {sizeof session->out, session->out};
  struct scsi_task *task;
  session->stage = stage;
  if (stage == READING) {
    cdb[0] = 0x5e; /* PERSISTENT RESERVE IN, READ RESERVATION */
    cdb[1] = 0x01;
    cdb[8] = sizeof session->in;
    memset(session->in, 0, sizeof session->in);
    task = real.create(sizeof cdb, cdb, XFER_READ, sizeof session->in);
    if (task && real.data_in(task, sizeof session->in, session->in) != 0) goto failed;
  } else {
    uint64_t key = stage == REGISTERING ? our_key : 0;
    cdb[0] = 0x5f; /* PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY */
    cdb[1] = 0x06;
    cdb[8] = sizeof session->out;
    memset(session->out, 0, sizeof session->out);
    for (int i = 0; i < 8; i++) session->out[8 + i] = key >> (56 - 8 * i);
    task = real.create(sizeof cdb, cdb, XFER_WRITE, sizeof session->out);
  }
  if (!task) goto failed;
  if (real.command(session->iscsi, session->lun, task, claim_done,
                   stage == READING ? NULL : &data, NULL) == 0)
    return;
  real.release(task);
failed:
  /* Out of memory, or the session has just broken. Held commands stay held until it is back. */
  fprintf(stderr, "ferry shim: can't ask the LUN for its reservation now\n");
}

static void claim_done(struct iscsi_context *iscsi, int status, void *data, void *private_data) {
  struct session *session = find_session(iscsi, false);
  struct scsi_task *task = data;
  (void)private_data;
  if (!session || status == CANCELLED) { /* The session broke; its successor claims anew. */
    if (task) real.release(task);
    return;
  }
  enum stage stage = session->stage;
  uint64_t holder = stage == READING && status == GOOD ? holder_in(session->in) : 0;
  if (task) real.release(task);
  if (status == CHECK_CONDITION && ++session->checks <= CHECKS_MAX) {
    send_claim(session, stage);
  } else if (status != GOOD) {
    fprintf(stderr, "ferry shim: LUN %d refused a reservation command: status 0x%x\n",
            session->lun, status);
    if (stage == UNREGISTERING || stage == REGISTERING)
      release_held(session); /* Not registered: under a reservation it can't write. */
    else
      send_claim(session, UNREGISTERING);
  } else if (stage == REGISTERING) {
    send_claim(session, READING);
  } else if (stage == READING && !ours_to_write(holder)) {
    fprintf(stderr, "ferry shim: LUN %d is held by key %#llx, ours is %#llx: fenced\n",
            session->lun, (unsigned long long)holder, (unsigned long long)our_key);
    send_claim(session, UNREGISTERING);
  } else {
    release_held(session);
  }
}

static void connected(struct iscsi_context *iscsi, int status, void *data, void *private_data) {
  struct connecting connecting = *(struct connecting *)private_data;
  struct session *session = NULL;
  free(private_data);
  if (status == GOOD) {
    session = find_session(iscsi, true);
    if (!session) abort(); /* Going on unregistered would be going on without a fence. */
    session->lun = connecting.lun;
    session->checks = 0;
    session->stage = REGISTERING; /* From here on commands are held. */
  }
  /* After a reconnect this sends the old session's commands again: into our hands. */
  connecting.cb(iscsi, status, data, connecting.private_data);
  if (!session) return;
  if (session->dropped) real.release(session->dropped);
  session->dropped = NULL;
  send_claim(session, REGISTERING);
}

/* --- watching commands --- */

static void finish(struct iscsi_context *iscsi, int status, void *data, struct watched *watched) {
  command_cb cb = watched->cb;
  void *private_data = watched->private_data;
  free(watched);
  cb(iscsi, status, data, private_data);
}

static void probed(struct iscsi_context *iscsi, int status, void *data, void *private_data) {
  struct probe *probe = private_data;
  struct watched *command = probe->command;
  void *its_data = probe->data;
  uint64_t holder = status == GOOD ? holder_in(probe->in) : 0;
  bool again = status == CANCELLED || status == CHECK_CONDITION;
  if (status == GOOD && holder && same_node(holder)) {
    fprintf(stderr, "ferry shim: LUN %d is this node's again; connecting anew\n", command->lun);
    shutdown(real.fd(iscsi), SHUT_RDWR);
    again = true;
  }
  if (data) real.release(data);
  free(probe);
  finish(iscsi, again ? BUSY : CONFLICT, its_data, command);
}

static void watch_done(struct iscsi_context *iscsi, int status, void *data, void *private_data) {
  struct watched *watched = private_data;
  unsigned char cdb[10] = {0x5e, 0x01};
  struct probe *probe;
  struct scsi_task *task;
  if (status != CONFLICT || !(probe = calloc(1, sizeof *probe))) {
    finish(iscsi, status, data, watched);
    return;
  }
  probe->command = watched;
  probe->data = data;
  cdb[8] = sizeof probe->in;
  task = real.create(sizeof cdb, cdb, XFER_READ, sizeof probe->in);
  if (task && real.data_in(task, sizeof probe->in, probe->in) == 0 &&
      real.command(iscsi, watched->lun, task, probed, NULL, probe) == 0)
    return;
  if (task) real.release(task);
  free(probe);
  finish(iscsi, status, data, watched);
}

/* --- what libiscsi's callers, and libiscsi itself, call in its place --- */

int iscsi_full_connect_async(struct iscsi_context *iscsi, const char *portal, int lun,
                             command_cb cb, void *private_data) {
  pthread_once(&resolved, resolve);
  if (!our_key) return real.connect(iscsi, portal, lun, cb, private_data);
  struct connecting *connecting = calloc(1, sizeof *connecting);
  if (!connecting) return -1;
  *connecting = (struct connecting){cb, private_data, lun};
  int result = real.connect(iscsi, portal, lun, connected, connecting);
  if (result != 0) free(connecting);
  return result;
}

int iscsi_scsi_command_async(struct iscsi_context *iscsi, int lun, struct scsi_task *task,
                             command_cb cb, struct iscsi_data *data, void *private_data) {
  pthread_once(&resolved, resolve);
  struct session *session = our_key ? find_session(iscsi, false) : NULL;
  if (!session) return real.command(iscsi, lun, task, cb, data, private_data);
  if (cb == claim_done) { /* Of the session before: sent again by libiscsi. */
    if (session->dropped) real.release(session->dropped);
    session->dropped = task;
    return 0;
  }
  if (cb == probed) {
    probed(iscsi, CANCELLED, NULL, private_data);
    return 0;
  }
  if (session->stage == OPEN) {
    struct watched *watched = calloc(1, sizeof *watched);
    if (!watched) return -1;
    *watched = (struct watched){cb, private_data, lun};
    int result = real.command(iscsi, lun, task, watch_done, data, watched);
    if (result != 0) free(watched);
    return result;
  }
  struct held *held = calloc(1, sizeof *held);
  if (!held) return -1;
  held->task = task;
  held->lun = lun;
  held->cb = cb;
  held->private_data = private_data;
  held->has_data = data != NULL;
  if (data) held->data = *data;
  if (cb != watch_done) {
    struct watched *watched = calloc(1, sizeof *watched);
    if (!watched) {
      free(held);
      return -1;
    }
    *watched = (struct watched){cb, private_data, lun};
    held->cb = watch_done;
    held->private_data = watched;
  }
  *session->last = held;
  session->last = &held->next;
  return 0;
}

int iscsi_destroy_context(struct iscsi_context *iscsi) {
  pthread_once(&resolved, resolve);
  struct session *session = our_key ? find_session(iscsi, false) : NULL;
  if (!session) return real.destroy(iscsi);
  while (session->first) {
    struct held *held = session->first;
    session->first = held->next;
    held->cb(iscsi, CANCELLED, held->task, held->private_data);
    free(held);
  }
  session->last = &session->first;
  int result = real.destroy(iscsi);
  pthread_mutex_lock(&sessions_lock);
  for (struct session **at = &sessions; *at; at = &(*at)->next)
    if (*at == session) {
      *at = session->next;
      break;
    }
  pthread_mutex_unlock(&sessions_lock);
  if (session->dropped) real.release(session->dropped);
  free(session);
  return result;
}
