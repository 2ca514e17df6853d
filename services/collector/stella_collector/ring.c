/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drains a BPF ring buffer into one batch, and keeps each lane's numbers while it is at it.
 *
 * The ring's layout is kernel ABI (kernel/bpf/ringbuf.c): a consumer page, a producer page, then the data
 * mapped twice in a row so that a record never wraps. Every record has an 8-byte head: u32 length with a
 * busy bit (31) and a discard bit (30), u32 page offset.
 *
 * Most records repeat what others say: the same thread opens the same file. A batch says each distinct thing
 * once and then speaks in numbers (stella_shared/raw_batches.py has the same in Python):
 *
 *     u32 whos, u32 whats, u32 events, u32 bytes of whats
 *     whos    each: u64 cgroup_id, u64 start_ns, u64 program, u32 tgid, u32 tid, u32 uid, u32 lane
 *     whats   each: u16 type, u16 call, u32 stride, char comm[16], body, zeros up to 8 bytes
 *     events  each: u64 ts_ns, u64 seq, u32 who, u32 what
 *
 * The tables that find repetitions are seeded, probe a bounded number of slots and start anew with each batch;
 * a repetition that they miss is said twice, no more.
 *
 * Reading and releasing are two things: a record stays in the ring, where it outlives this process, until somebody
 * says that it is safe elsewhere.
 *
 * Loads of positions and heads acquire, the store of the consumer position releases, so this is right on weakly
 * ordered machines too.
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

#define SLOTS 32768 /* of each table: four times the events of a batch */
#define MAX_EVENTS 8192
#define PROBES 16

struct who {
	uint64_t cgroup_id, start_ns, program;
	uint32_t tgid, tid, uid, lane;
};

struct event {
	uint64_t ts_ns, seq;
	uint32_t who, what;
};

struct slot {
	uint32_t batch; /* of another batch: free */
	uint32_t index;
	uint64_t hash;
};

struct ring {
	uint64_t size, mask;
	uint64_t at; /* where reading goes on; the kernel writes over what lies before *consumer */
	uint64_t *consumer;
	const uint64_t *producer;
	const uint8_t *data;
	size_t page;
	uint64_t seed;
	uint32_t batch;
	struct slot who_slots[SLOTS], what_slots[SLOTS];
	struct who whos[MAX_EVENTS];
	uint32_t what_at[MAX_EVENTS]; /* where a what begins in `whats` */
	struct event events[MAX_EVENTS];
	uint8_t *whats;
	uint64_t whats_capacity;
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
	uint64_t bytes; /* of the batch: stella_ring_batch writes them */
	uint64_t left;	/* bytes that still wait in the ring */
	uint64_t first_ts_ns, last_ts_ns;
	uint64_t whos, whats, what_bytes;
	uint64_t malformed; /* records whose size or lane cannot be; must stay 0 */
	uint64_t span;	    /* bytes of the ring that were read */
};

/* The head of every record: bpf/include/stella_record.h, struct stella_header. */
struct header {
	uint64_t ts_ns, seq, cgroup_id, start_ns, program;
	uint32_t tgid, tid, uid, lane;
	uint16_t type, call;
	uint32_t size;
	char comm[16];
};

struct ring *stella_ring_open(int fd, uint64_t size, uint64_t seed)
{
	size_t page = sysconf(_SC_PAGESIZE);
	struct ring *r = calloc(1, sizeof(*r));
	if (!r)
		return NULL;
	r->size = size;
	r->mask = size - 1;
	r->page = page;
	r->seed = seed | 1;
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
	r->at = *r->consumer;
	return r;
}

void stella_ring_close(struct ring *r)
{
	munmap(r->consumer, r->page);
	munmap((void *)r->producer, r->page + 2 * r->size);
	free(r->whats);
	free(r);
}

/* Bytes that have not been read. */
uint64_t stella_ring_waiting(const struct ring *r)
{
	return __atomic_load_n(r->producer, __ATOMIC_ACQUIRE) - r->at;
}

/* Bytes that the kernel cannot use: not read, or read and not released. */
uint64_t stella_ring_used(const struct ring *r)
{
	return __atomic_load_n(r->producer, __ATOMIC_ACQUIRE) - *r->consumer;
}

uint64_t stella_ring_position(const struct ring *r)
{
	return r->at;
}

/* Go on reading at a position that has not been released. */
void stella_ring_seek(struct ring *r, uint64_t at)
{
	r->at = at;
}

uint64_t stella_ring_released(const struct ring *r)
{
	return *r->consumer;
}

/* Give the kernel what lies before `at`, which has been read. */
void stella_ring_release(struct ring *r, uint64_t at)
{
	__atomic_store_n(r->consumer, at, __ATOMIC_RELEASE);
}

static uint64_t mix(uint64_t h, uint64_t word)
{
	h = (h ^ word) * 0x9e3779b97f4a7c15ull;
	return h ^ h >> 32;
}

static uint64_t hash_of(uint64_t h, const void *data, uint32_t length)
{
	const uint8_t *p = data;
	uint64_t word;
	for (; length >= 8; length -= 8, p += 8) {
		memcpy(&word, p, 8);
		h = mix(h, word);
	}
	word = 0;
	memcpy(&word, p, length);
	return mix(h, word ^ (uint64_t)length << 56);
}

/* Find `hash` among this batch's entries; *slot is where it is, or where it may go (NULL: nowhere). */
static int find(const struct ring *r, struct slot *slots, uint64_t hash, struct slot **slot)
{
	*slot = NULL;
	for (uint32_t i = 0; i < PROBES; i++) {
		struct slot *s = &slots[(hash + i) & (SLOTS - 1)];
		if (s->batch != r->batch) {
			*slot = s;
			return 0;
		}
		if (s->hash == hash) {
			*slot = s;
			return 1;
		}
	}
	return 0;
}

static void claim(const struct ring *r, struct slot *slot, uint64_t hash, uint32_t index)
{
	if (!slot)
		return;
	slot->batch = r->batch;
	slot->hash = hash;
	slot->index = index;
}

/* Read what is there, as far as `capacity` bytes of ring and MAX_EVENTS go, and release nothing. Stops at a record
 * that is still being written. What was read stays in the reader until stella_ring_batch has written it out. */
void stella_ring_drain(struct ring *r, uint64_t capacity, struct lane *lanes, uint32_t lane_count,
		       struct drained *result)
{
	uint64_t at = r->at;
	const uint64_t begin = at, end = __atomic_load_n(r->producer, __ATOMIC_ACQUIRE);
	uint32_t events = 0, whos = 0, whats = 0;
	uint64_t whats_used = 0;

	memset(result, 0, sizeof(*result));
	if (!++r->batch) /* 2^32 batches later: nothing of the first may look like this one's */
		memset(r->who_slots, 0, sizeof(r->who_slots) + sizeof(r->what_slots)), r->batch = 1;
	/* A what is never larger than its record, but for 8 bytes of padding. */
	if (r->whats_capacity < capacity + 8 * MAX_EVENTS) {
		uint8_t *grown = realloc(r->whats, capacity + 8 * MAX_EVENTS);
		if (!grown) {
			result->left = end - at;
			return;
		}
		r->whats = grown;
		r->whats_capacity = capacity + 8 * MAX_EVENTS;
	}
	while (at < end && events < MAX_EVENTS) {
		const uint8_t *p = r->data + (at & r->mask);
		uint32_t head = __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
		if (head & BUSY)
			break;
		uint32_t length = head & LENGTH;
		uint64_t step = ((uint64_t)length + 8 + 7) & ~7ull;
		if (step > end - at) { /* nothing behind it can be found */
			result->malformed++;
			at = end;
			break;
		}
		if (head & DISCARD) {
			at += step;
			continue;
		}
		if (at + step - begin > capacity)
			break;
		const struct header *h = (const struct header *)(p + 8);
		if (length < sizeof(*h) || h->size > length || h->size < sizeof(*h) || h->lane >= lane_count) {
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
		struct slot *slot;
		struct who who = { h->cgroup_id, h->start_ns, h->program, h->tgid, h->tid, h->uid, h->lane };
		uint64_t hash = hash_of(r->seed, &who, sizeof(who));
		uint32_t who_index, what_index;
		if (find(r, r->who_slots, hash, &slot) && !memcmp(&r->whos[slot->index], &who, sizeof(who))) {
			who_index = slot->index;
		} else {
			who_index = whos++;
			r->whos[who_index] = who;
			claim(r, slot, hash, who_index);
		}
		const uint8_t *what = (const uint8_t *)h->comm;
		uint32_t what_length = h->size - (sizeof(*h) - sizeof(h->comm));
		hash = hash_of(r->seed ^ ((uint64_t)h->type << 16 | h->call), what, what_length);
		const uint8_t *known = NULL;
		uint32_t stride = (8 + what_length + 7) & ~7u;
		if (find(r, r->what_slots, hash, &slot))
			known = r->whats + r->what_at[slot->index];
		if (known && !memcmp(known, &h->type, 2) && !memcmp(known + 2, &h->call, 2) &&
		    !memcmp(known + 4, &stride, 4) && !memcmp(known + 8, what, what_length)) {
			what_index = slot->index;
		} else {
			uint8_t *new = r->whats + whats_used;
			memset(new + stride - 8, 0, 8);
			memcpy(new, &h->type, 2);
			memcpy(new + 2, &h->call, 2);
			memcpy(new + 4, &stride, 4);
			memcpy(new + 8, what, what_length);
			what_index = whats++;
			r->what_at[what_index] = (uint32_t)whats_used;
			whats_used += stride;
			claim(r, slot, hash, what_index);
		}
		r->events[events++] = (struct event){ h->ts_ns, h->seq, who_index, what_index };
		at += step;
	}
	r->at = at;
	result->records = events;
	result->whos = whos;
	result->whats = whats;
	result->what_bytes = whats_used;
	result->bytes = events ? 16 + whos * sizeof(struct who) + whats_used + events * sizeof(struct event) : 0;
	result->left = end - at;
	result->span = at - begin;
	if (events) {
		result->first_ts_ns = r->events[0].ts_ns;
		result->last_ts_ns = r->events[events - 1].ts_ns;
	}
}

/* Write the batch that the last drain made: `result->bytes` bytes. */
void stella_ring_batch(const struct ring *r, const struct drained *result, uint8_t *out)
{
	uint32_t counts[4] = { result->whos, result->whats, result->records, result->what_bytes };
	if (!result->records)
		return;
	memcpy(out, counts, sizeof(counts));
	out += sizeof(counts);
	memcpy(out, r->whos, result->whos * sizeof(struct who));
	out += result->whos * sizeof(struct who);
	memcpy(out, r->whats, result->what_bytes);
	out += result->what_bytes;
	memcpy(out, r->events, result->records * sizeof(struct event));
}
