#!/bin/busybox sh
# The guest's /init: file systems, drivers, addresses; then the workload becomes process 1.
# Everything is configured on the kernel command line (deploy/guest/cmdline.py).
# If the workload ends, the kernel panics: a broken guest is never a quiet one.

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

while read -r module; do
    insmod "/lib/modules/$module"
done < /lib/modules/order

read -r cmdline < /proc/cmdline
address=''
address6=''
gateway=''
gateway6=''
name=guest
for word in $cmdline; do
    case $word in
        ferry.ip=*) address=${word#*=} ;;
        ferry.ip6=*) address6=${word#*=} ;;
        ferry.gw=*) gateway=${word#*=} ;;
        ferry.gw6=*) gateway6=${word#*=} ;;
        ferry.name=*) name=${word#*=} ;;
    esac
done

echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    if [ -n "$address6" ]; then
        # Duplicate address detection would keep the address unusable for a second.
        echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
    fi
    ip link set eth0 up
    if [ -n "$address" ]; then ip addr add "$address" dev eth0; fi
    if [ -n "$address6" ]; then ip addr add "$address6" dev eth0; fi
    if [ -n "$gateway" ]; then ip route add default via "$gateway"; fi
    if [ -n "$gateway6" ]; then ip -6 route add default via "$gateway6" dev eth0; fi
elif [ -n "$address$address6" ]; then
    echo "FERRY-ERROR an address is given, but the guest has no network interface"
fi

exec /bin/workload
