/* Opens files and connects by ways that have no system call of their own: io_uring, and int 0x80.
 *
 *   uncommon_ways uring FILE N PORT    N opens of FILE, N connects to 127.0.0.1:PORT, through a ring
 *   uncommon_ways int80 FILE N         N opens of FILE by the 32-bit numbers (x86 only)
 *
 * Prints how many of each succeeded.  Raw system calls: nothing needs liburing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct io_uring_params params;
static int ring;
static unsigned *tail, *mask, *order, *completed_head, *completed_tail, *completed_mask;
static struct io_uring_sqe *requests;
static struct io_uring_cqe *completions;

static void open_ring(void) {
    ring = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0) {
        perror("io_uring_setup");
        exit(2);
    }
    char *asked = mmap(NULL, params.sq_off.array + params.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                       IORING_OFF_SQ_RING);
    char *done = mmap(NULL, params.cq_off.cqes + params.cq_entries * sizeof *completions, PROT_READ | PROT_WRITE,
                      MAP_SHARED, ring, IORING_OFF_CQ_RING);
    requests = mmap(NULL, params.sq_entries * sizeof *requests, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
                    IORING_OFF_SQES);
    tail = (unsigned *)(asked + params.sq_off.tail);
    mask = (unsigned *)(asked + params.sq_off.ring_mask);
    order = (unsigned *)(asked + params.sq_off.array);
    completed_head = (unsigned *)(done + params.cq_off.head);
    completed_tail = (unsigned *)(done + params.cq_off.tail);
    completed_mask = (unsigned *)(done + params.cq_off.ring_mask);
    completions = (struct io_uring_cqe *)(done + params.cq_off.cqes);
}

static int ask(const struct io_uring_sqe *request) {
    unsigned at = *tail & *mask;
    requests[at] = *request;
    order[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0) {
        perror("io_uring_enter");
        exit(2);
    }
    while (*completed_head == __atomic_load_n(completed_tail, __ATOMIC_ACQUIRE))
        ;
    int result = completions[*completed_head & *completed_mask].res;
    __atomic_store_n(completed_head, *completed_head + 1, __ATOMIC_RELEASE);
    return result;
}

int main(int argc, char **argv) {
    int count = argc > 3 ? atoi(argv[3]) : 0, opened = 0, connected = 0;
    if (argc == 5 && !strcmp(argv[1], "uring")) {
        open_ring();
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[4]))};
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        for (int i = 0; i < count; i++) {
            struct io_uring_sqe open = {.opcode = IORING_OP_OPENAT, .fd = AT_FDCWD, .addr = (unsigned long)argv[2]};
            int fd = ask(&open);
            opened += fd >= 0;
            close(fd);
            struct io_uring_sqe connect = {.opcode = IORING_OP_CONNECT, .addr = (unsigned long)&to, .off = sizeof to};
            connect.fd = socket(AF_INET, SOCK_STREAM, 0);
            connected += ask(&connect) == 0;
            close(connect.fd);
        }
        printf("%d %d\n", opened, connected);
        return 0;
    }
#if defined(__x86_64__)
    if (argc == 4 && !strcmp(argv[1], "int80")) {
        char *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        strncpy(low, argv[2], 4095);
        for (int i = 0; i < count; i++) {
            long fd;
            __asm__ volatile("int $0x80" : "=a"(fd) : "a"(5L), "b"(low), "c"(0L), "d"(0L) : "memory", "r8", "r9", "r10", "r11");
            opened += fd >= 0;
            close((int)fd);
        }
        printf("%d\n", opened);
        return 0;
    }
#endif
    return 2;
}
