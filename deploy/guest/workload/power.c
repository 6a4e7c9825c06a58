/* Powers the guest off when its ACPI power button is pressed. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

#define DEVICES_MAX 8

static struct pollfd devices[DEVICES_MAX];
static nfds_t device_count;

static bool pressed(int fd)
{
    struct input_event event;
    return read(fd, &event, sizeof event) == (ssize_t)sizeof event && event.type == EV_KEY &&
           event.code == KEY_POWER && event.value == 1;
}

static void *power_thread(void *unused)
{
    (void)unused;
    for (;;) {
        if (poll(devices, device_count, -1) < 0)
            continue;
        for (nfds_t i = 0; i < device_count; i++) {
            if (!(devices[i].revents & POLLIN) || !pressed(devices[i].fd))
                continue;
            disk_stop();
            say("FERRY-POWEROFF the power button was pressed");
            reboot(RB_POWER_OFF);
            give_up("can't power off: %s", strerror(errno));
        }
    }
    return NULL;
}

void power_start(void)
{
    for (int number = 0; number < DEVICES_MAX; number++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/input/event%d", number);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0)
            devices[device_count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    if (device_count)
        start_thread(power_thread, NULL);
    else
        say("FERRY-NOTE this machine has no power button");
}
