#!/bin/sh
# What `make bench` needs beyond system.sh, on Debian 12: libvirt to be compared with (its daemons aren't
# started), and for QEMU=SUITE debootstrap. Needs root; safe to repeat; quick when all is there.
#
#   bench.sh [--newer-qemu]
#
# Where it can't be installed the benchmark runs without libvirt, and says so.
set -eu

PATH="$PATH:/usr/sbin:/sbin"

has() {
    command -v "$1" >/dev/null 2>&1
}

packages=
has libvirtd || packages="$packages libvirt-daemon-system"
has virsh || packages="$packages libvirt-clients"
if [ "${1:-}" = --newer-qemu ]; then
    has debootstrap || packages="$packages debootstrap"
fi
[ -n "$packages" ] || exit 0

if [ "$(id -u)" != 0 ] || ! has apt-get; then
    echo "bench: not installed (that takes root and apt-get):$packages" >&2
    exit 0
fi

# libvirt's packages would start its daemons and a network on this host: the benchmark has its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
echo "bench: installing$packages"
install() {
    # shellcheck disable=SC2086  # A list of words.
    apt-get install -y -q --no-install-recommends \
        -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 $packages </dev/null
}
install || { apt-get update -q -o Acquire::Retries=3 </dev/null && install; } ||
    echo "bench: couldn't be installed:$packages (apt-get's messages are above)" >&2
