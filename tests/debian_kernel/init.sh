#!/bin/busybox sh
# The machine's /init: drivers, the host's files with a layer in memory above them, one command.
# Its output goes to ttyS1, its status to ttyS2, the kernel's words to ttyS0 (see machine.py).
# Whatever fails here ends the machine, without a status.

set -e
bb=/bin/busybox

$bb mount -t proc proc /proc
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $bb insmod "/modules/$module"
done < /modules/order

$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
$bb mount -t tmpfs tmpfs /memory
$bb mkdir /memory/changes /memory/work
$bb mount -t overlay -o lowerdir=/host,upperdir=/memory/changes,workdir=/memory/work overlay /root

$bb mount -t proc proc /root/proc
$bb mount -t sysfs sysfs /root/sys
$bb mount -t devtmpfs devtmpfs /root/dev
$bb mkdir -p /root/dev/shm /root/dev/pts /root/run /root/tmp
$bb mount -t tmpfs tmpfs /root/dev/shm
$bb mount -t devpts devpts /root/dev/pts
$bb mount -t tmpfs tmpfs /root/run
$bb ip link set lo up

$bb cp /command /root/run/command
set +e
$bb chroot /root /bin/sh /run/command < /dev/null > /dev/ttyS1 2>&1
echo "status $?" > /dev/ttyS2
$bb poweroff -f
