/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drains a BPF ring buffer into one flat buffer, and keeps each lane's numbers while it is at it.
 *
 * The ring's layout is kernel ABI (kernel/bpf/ringbuf.c): a consumer page, a producer page, then the data
 * mapped twice in a row so that a record never wraps. Every record has an 8-byte head: u32 length with a
 * busy bit (31) and a discard bit (30), u32 page offset.
 *
 * Out comes record after record, each padded to 8 bytes, without those heads. Loads of positions and heads
 * acquire, the store of the consumer position releases, so this is right on weakly ordered machines too.
 * Called without Python's lock; one caller at a time.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUSY 0x80000000u
#define DISCARD 0x40000000u
#define LENGTH 0x3fffffffu
#define LANE_KINDS 4
#define LANE_UPROBE 3

struct ring {
	uint64_t size, mask;
	uint64_t *consumer;
	const uint64_t *producer;
	const uint8_t *data;
	size_t page;
};

/* What user space knows of a lane; stella_collector/accounting.py reads these as four u64. */
struct lane {
	uint64_t next;	    /* strict lanes: the number expected next */
	uint64_t delivered; /* records seen */
	uint64_t gaps;	    /* strict lanes: numbers that were skipped */
	uint64_t disorder;  /* strict lanes: numbers below the expected one; must stay 0 */
};

struct drained {
	uint64_t records;
	uint64_t bytes; /* written to out */
	uint64_t left;	/* bytes that still wait in the ring */
	uint64_t first_ts_ns, last_ts_ns;
	uint64_t malformed; /* records whose size or lane cannot be; must stay 0 */
};

/* The head of every record: bpf/include/stella_record.h, struct stella_header. */
struct header {
	uint64_t ts_ns, seq, cgroup_id;
	uint32_t tgid, tid, uid, lane;
	uint16_t type, call;
	uint32_t size;
};

struct ring *stella_ring_open(int fd, uint64_t size)
{
	size_t page = sysconf(_SC_PAGESIZE);
	struct ring *r = calloc(1, sizeof(*r));
	if (!r)
		return NULL;
	r->size = size;
	r->mask = size - 1;
	r->page = page;
	void *consumer = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (consumer == MAP_FAILED) {
		free(r);
		return NULL;
	}
	void *rest = mmap(NULL, page + 2 * size, PROT_READ, MAP_SHARED, fd, page);
	if (rest == MAP_FAILED) {
		munmap(consumer, page);
		free(r);
		return NULL;
	}
	r->consumer = consumer;
	r->producer = rest;
	r->data = (const uint8_t *)rest + page;
	return r;
}

void stella_ring_close(struct ring *r)
{
	munmap(r->consumer, r->page);
	munmap((void *)r->producer, r->page + 2 * r->size);
	free(r);
}

/* Bytes that wait in the ring. */
uint64_t stella_ring_waiting(const struct ring *r)
{
	return __atomic_load_n(r->producer, __ATOMIC_ACQUIRE) - *r->consumer;
}

/* Take what is there, as far as `capacity` goes. Stops at a record that is still being written. */
void stella_ring_drain(struct ring *r, uint8_t *out, uint64_t capacity, struct lane *lanes, uint32_t lane_count,
		       struct drained *result)
{
	uint64_t at = *r->consumer;
	const uint64_t end = __atomic_load_n(r->producer, __ATOMIC_ACQUIRE);
	uint64_t used = 0, records = 0;

	memset(result, 0, sizeof(*result));
	while (at < end) {
		const uint8_t *p = r->data + (at & r->mask);
		uint32_t head = __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
		if (head & BUSY)
			break;
		uint32_t length = head & LENGTH;
		uint64_t step = ((uint64_t)length + 8 + 7) & ~7ull;
		if (step > end - at) {
			result->malformed++;
			at = end;
			break;
		}
		if (!(head & DISCARD)) {
			const struct header *h = (const struct header *)(p + 8);
			uint64_t padded = ((uint64_t)length + 7) & ~7ull;
			if (used + padded > capacity)
				break;
			if (length < sizeof(*h) || h->size > length || h->lane >= lane_count) {
				result->malformed++;
				at += step;
				continue;
			}
			struct lane *lane = &lanes[h->lane];
			lane->delivered++;
			if (h->lane % LANE_KINDS != LANE_UPROBE) {
				if (h->seq < lane->next) {
					lane->disorder++;
				} else {
					lane->gaps += h->seq - lane->next;
					lane->next = h->seq + 1;
				}
			}
			memcpy(out + used, h, length);
			/* Behind it stands what the ring held before; equal events shall be equal bytes. */
			memset(out + used + length, 0, padded - length);
			/* The ring is the kernel's; from here on the record is ours: give it the exact size. */
			((struct header *)(out + used))->size = (uint32_t)padded;
			if (!records)
				result->first_ts_ns = h->ts_ns;
			result->last_ts_ns = h->ts_ns;
			used += padded;
			records++;
		}
		at += step;
	}
	__atomic_store_n(r->consumer, at, __ATOMIC_RELEASE);
	result->records = records;
	result->bytes = used;
	result->left = end - at;
}
