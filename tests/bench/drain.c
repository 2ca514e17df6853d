/* SPDX-License-Identifier: Apache-2.0 */
/*
 * drain FD SIZE: empties the BPF ring buffer behind FD once a millisecond and does nothing with it, until standard
 * input ends; prints how many records there were. What no reader can do with less: the physical limit.
 * The ring's layout is the kernel's (kernel/bpf/ringbuf.c), as services/collector/stella_collector/ring.c has it.
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUSY 0x80000000u
#define DISCARD 0x40000000u
#define LENGTH 0x3fffffffu

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	int fd = atoi(argv[1]);
	uint64_t size = strtoull(argv[2], NULL, 10), records = 0;
	long page = sysconf(_SC_PAGESIZE);
	uint64_t *consumer = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	uint8_t *rest = mmap(NULL, page + 2 * size, PROT_READ, MAP_SHARED, fd, page);
	if (consumer == MAP_FAILED || rest == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	struct pollfd input = { .fd = 0, .events = POLLIN };
	int last = 0;
	puts("ready");
	fflush(stdout);
	do {
		last = poll(&input, 1, 1) != 0;
		uint64_t at = *consumer, end = __atomic_load_n((uint64_t *)rest, __ATOMIC_ACQUIRE);
		while (at < end) {
			uint32_t head = __atomic_load_n((uint32_t *)(rest + page + (at & (size - 1))), __ATOMIC_ACQUIRE);
			if (head & BUSY)
				break;
			records += !(head & DISCARD);
			at += ((uint64_t)(head & LENGTH) + 8 + 7) & ~7ull;
		}
		__atomic_store_n(consumer, at, __ATOMIC_RELEASE);
	} while (!last);
	printf("%lu\n", (unsigned long)records);
	return 0;
}
