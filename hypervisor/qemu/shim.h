/* What the parts of the shim know of each other. One constructor (uffd_shim.c) reads the
 * environment, decides whether this is the QEMU that is meant, and cleans the environment. */
#ifndef FERRY_SHIM_H
#define FERRY_SHIM_H

/* The key that QEMU's iSCSI sessions register, as text; NULL: none. */
void shim_iscsi_init(const char *key);

#endif
