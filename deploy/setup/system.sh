#!/bin/sh
# What Ferry needs from the system, on Debian 12 and its kin. Safe to repeat; quick when all is there.
#
#   system.sh            install what is missing with apt-get (needs root), without questions
#   system.sh python     print the path of a Python >= 3.11 that can make virtual environments
#
# Fails with one sentence on stderr that says what to do.
set -eu

fail() {
    echo "ferry: $*" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

links_statically() { # The demo's guest runs a small static program.
    has cc && echo 'int main(void) { return 0; }' | cc -static -x c - -o /dev/null 2>/dev/null
}

has_static_busybox() { # It's the demo guest's user space, where there are no libraries.
    has busybox && ! ldd "$(command -v busybox)" >/dev/null 2>&1
}

has_qemu_iscsi() { # A module of QEMU's in Debian, and with it libiscsi.
    ls /usr/lib/*/qemu/block-iscsi.so >/dev/null 2>&1
}

missing_packages() {
    find_python >/dev/null || echo python3 python3-venv
    has cc || echo gcc
    links_statically || echo libc6-dev
    has qemu-system-x86_64 || echo qemu-system-x86
    has qemu-img || echo qemu-utils
    has_static_busybox || echo busybox-static
    has_qemu_iscsi || echo qemu-block-extra
    has tgtd || echo tgt
    has nft || echo nftables
    has cpio || echo cpio
    has dpkg-deb || echo dpkg
    has ip || echo iproute2
    has etcd || echo etcd-server
    has etcdctl || echo etcd-client
    has haproxy || echo haproxy
    has ping || echo iputils-ping
    [ -x /usr/lib/frr/bgpd ] && has vtysh || echo frr
    has rpcbind || echo rpcbind
    has ganesha.nfsd || echo nfs-ganesha
    [ -n "$(find /usr/lib -name libfsalvfs.so -print -quit 2>/dev/null)" ] || echo nfs-ganesha-vfs
    [ -n "$(find /usr/lib -path '*qemu/block-nfs.so' -print -quit 2>/dev/null)" ] || echo qemu-block-extra
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
}

PATH="$PATH:/usr/sbin:/sbin"

if [ "${1:-}" = python ]; then
    find_python || fail "no Python 3.11 or newer with venv was found: install one (Debian: python3 python3-venv)."
    exit 0
fi

packages=$(missing_packages | tr '\n' ' ')
packages=${packages% }
[ -n "$packages" ] || exit 0

has apt-get || fail "this system has no apt-get: install the equivalents of these Debian packages, then try again: $packages"
[ "$(id -u)" = 0 ] || fail "root is needed once, to install packages: sudo apt-get install $packages"

export DEBIAN_FRONTEND=noninteractive
install() {
    # shellcheck disable=SC2086  # A list of words.
    apt-get install -y -q --no-install-recommends \
        -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 $packages </dev/null
}

# Debian starts and enables what it installs. Ferry wants programs, not services: for a while,
# somebody says no to that (see invoke-rc.d(8)), and where a policy is there already, it stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "ferry: installing $packages"
# The lists on a fresh machine are missing or old; then, and only then, they're fetched.
install || {
    apt-get update -q -o Acquire::Retries=3 </dev/null && install
} || fail "apt-get couldn't install: $packages (its messages are above)."

left=$(missing_packages | tr '\n' ' ')
[ -z "$left" ] || fail "still missing after the installation: $left"
