/* A numbered packet every millisecond, or at the rate asked for; layout in deploy/guest/protocol.py (UdpPacket).
 *
 * A packet that is late is not made up for: the next follows an interval after it. A packet that
 * can't be sent still uses up its number, so that the receiver sees a gap.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>

struct packet {
    char magic[8];
    uint64_t boot_id;
    uint64_t sequence;
    uint64_t guest_monotonic_ns;
};

static struct sockaddr_in destination = {.sin_family = AF_INET};

static void *udp_thread(void *unused)
{
    (void)unused;
    /* Ahead of the other threads: the interval is what a client measures. */
    struct sched_param parameter = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_FIFO, &parameter);
    prctl(PR_SET_TIMERSLACK, 1);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        give_up("can't make a UDP socket: %s", strerror(errno));
    struct packet packet = {.magic = {'F', 'E', 'R', 'R', 'Y', 'U', 'D', 'P'},
                            .boot_id = config.boot_id};
    const uint64_t interval_ns = NANOSECONDS_PER_SECOND / config.udp_per_s;
    for (uint64_t deadline = monotonic_ns();;) {
        packet.sequence++;
        packet.guest_monotonic_ns = monotonic_ns();
        /* Not connected: a receiver that isn't there yet must not turn into errors here. */
        if (sendto(fd, &packet, sizeof packet, MSG_DONTWAIT, (struct sockaddr *)&destination,
                   sizeof destination) == (ssize_t)sizeof packet)
            counters.udp_sent++;
        else
            counters.udp_errors++;
        uint64_t now = monotonic_ns();
        deadline += interval_ns;
        if (deadline < now)
            deadline = now + interval_ns;
        sleep_until_ns(deadline);
    }
    return NULL;
}

void udp_start(void)
{
    char host[sizeof config.udp];
    strcpy(host, config.udp);
    char *colon = strrchr(host, ':');
    if (colon)
        *colon++ = '\0';
    int port = colon ? atoi(colon) : 0;
    if (port < 1 || port > 65535 || inet_pton(AF_INET, host, &destination.sin_addr) != 1)
        give_up("ferry.udp=%s: not address:port", config.udp);
    if (config.udp_per_s == 0)
        return;
    destination.sin_port = htons((uint16_t)port);
    start_thread(udp_thread, NULL);
}
