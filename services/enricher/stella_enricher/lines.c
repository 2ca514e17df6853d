/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loop of lines.py: puts evidence lines together from parts that are already text.
 *
 * Distinct things are rendered once, in Python, and kept here: an event by the bytes of its record behind the
 * numbers (thread name and body), a cgroup's fields by its id. The loop looks both up, and writes the numbers
 * in between. Where it meets something it does not know it stops and says so; Python adds it and calls again.
 *
 * The bytes that are looked up come from traced programs, so the table is seeded, probes a bounded number of
 * slots, and forgets rather than grows. Every length is checked before it is used.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HEADER 64
#define KEY_AT 48 /* comm, and the body behind it */
#define TYPES 8
#define PROBES 16
#define NUMBERS 256 /* room for the fixed words and the decimal numbers of one line */

enum { DONE = 0, NEED_EVENT = 1, NEED_PLACE = 2, MALFORMED = -1, NO_MEMORY = -2 };

struct header { /* bpf/include/stella_record.h: struct stella_header */
	uint64_t ts_ns, seq, cgroup_id;
	uint32_t tgid, tid, uid, lane;
	uint16_t type, call;
	uint32_t size;
	char comm[16];
};

struct text {
	char *at;
	uint32_t length;
};

struct event {
	uint64_t hash; /* 0: free */
	uint8_t *key;
	uint32_t key_length;
	uint16_t call;
	uint8_t type;	   /* 0: the filters drop it */
	uint8_t anonymous; /* no process is named */
	struct text comm, event, source;
};

struct place {
	uint64_t cgroup_id;
	uint8_t used;
	struct text before, between, after;
};

struct out {
	char *at;
	uint64_t length, capacity, lines;
};

struct lines {
	uint64_t seed;
	uint32_t events_mask, places_mask;
	uint32_t events_used, places_used;
	struct event *events;
	struct place *places;
	struct text node, run; /* `"node":"…",` and `"run":"…",` */
	struct out out[TYPES];
	uint32_t lanes;
	uint64_t *counted, *filtered; /* by lane; behind the last lane stands the sum */
};

static int copy(struct text *t, const char *from, uint32_t length)
{
	t->at = malloc(length ? length : 1);
	if (!t->at)
		return NO_MEMORY;
	memcpy(t->at, from, length);
	t->length = length;
	return 0;
}

static void drop(struct text *t)
{
	free(t->at);
	t->at = NULL;
	t->length = 0;
}

struct lines *stella_lines_new(uint32_t events_log2, uint32_t places_log2, uint32_t lanes, uint64_t seed)
{
	struct lines *l = calloc(1, sizeof(*l));
	if (!l)
		return NULL;
	l->seed = seed | 1;
	l->events_mask = (1u << events_log2) - 1;
	l->places_mask = (1u << places_log2) - 1;
	l->lanes = lanes;
	l->events = calloc((size_t)l->events_mask + 1, sizeof(*l->events));
	l->places = calloc((size_t)l->places_mask + 1, sizeof(*l->places));
	l->counted = calloc((size_t)lanes + 1, sizeof(uint64_t));
	l->filtered = calloc((size_t)lanes + 1, sizeof(uint64_t));
	if (!l->events || !l->places || !l->counted || !l->filtered)
		return NULL; /* the process is at its end anyway */
	return l;
}

static void forget_places(struct lines *l)
{
	for (uint32_t i = 0; i <= l->places_mask; i++) {
		if (!l->places[i].used)
			continue;
		drop(&l->places[i].before);
		drop(&l->places[i].between);
		drop(&l->places[i].after);
		l->places[i].used = 0;
	}
	l->places_used = 0;
}

static void forget_event(struct event *e)
{
	free(e->key);
	drop(&e->comm);
	drop(&e->event);
	drop(&e->source);
	memset(e, 0, sizeof(*e));
}

void stella_lines_forget(struct lines *l)
{
	for (uint32_t i = 0; i <= l->events_mask; i++)
		if (l->events[i].hash)
			forget_event(&l->events[i]);
	l->events_used = 0;
	forget_places(l);
}

void stella_lines_free(struct lines *l)
{
	stella_lines_forget(l);
	for (int i = 0; i < TYPES; i++)
		free(l->out[i].at);
	drop(&l->node);
	drop(&l->run);
	free(l->events);
	free(l->places);
	free(l->counted);
	free(l->filtered);
	free(l);
}

/* A new batch: outputs and counts start anew, and places are asked for again, for containers change. */
int stella_lines_begin(struct lines *l, const char *node, uint32_t node_length, const char *run,
		       uint32_t run_length)
{
	forget_places(l);
	drop(&l->node);
	drop(&l->run);
	for (int i = 0; i < TYPES; i++)
		l->out[i].length = l->out[i].lines = 0;
	memset(l->counted, 0, ((size_t)l->lanes + 1) * sizeof(uint64_t));
	memset(l->filtered, 0, ((size_t)l->lanes + 1) * sizeof(uint64_t));
	return copy(&l->node, node, node_length) | copy(&l->run, run, run_length);
}

static uint64_t hash_of(const struct lines *l, uint16_t call, const uint8_t *key, uint32_t length)
{
	uint64_t h = l->seed ^ ((uint64_t)call << 32) ^ length;
	/* Records are padded to 8 bytes. */
	for (uint32_t i = 0; i + 8 <= length; i += 8) {
		uint64_t word;
		memcpy(&word, key + i, 8);
		h = (h ^ word) * 0x9e3779b97f4a7c15ull;
		h ^= h >> 32;
	}
	return h | 1;
}

static struct event *find_event(const struct lines *l, uint64_t hash, uint16_t call, const uint8_t *key,
				uint32_t length)
{
	for (uint32_t i = 0; i < PROBES; i++) {
		struct event *e = &l->events[(hash + i) & l->events_mask];
		if (e->hash == hash && e->call == call && e->key_length == length && !memcmp(e->key, key, length))
			return e;
		if (!e->hash)
			return NULL;
	}
	return NULL;
}

static struct place *find_place(const struct lines *l, uint64_t cgroup_id)
{
	uint64_t hash = (cgroup_id ^ l->seed) * 0x9e3779b97f4a7c15ull;
	for (uint32_t i = 0; i <= l->places_mask; i++) {
		struct place *p = &l->places[((hash >> 32) + i) & l->places_mask];
		if (!p->used || p->cgroup_id == cgroup_id)
			return p;
	}
	return NULL;
}

/* Keep a rendered event. `key` is the record from KEY_AT on. A full neighbourhood gives its first slot up. */
int stella_lines_add_event(struct lines *l, uint16_t call, const uint8_t *key, uint32_t key_length, uint8_t type,
			   uint8_t anonymous, const char *comm, uint32_t comm_length, const char *event,
			   uint32_t event_length, const char *source, uint32_t source_length)
{
	uint64_t hash = hash_of(l, call, key, key_length);
	struct event *e = NULL;
	if (type >= TYPES)
		return MALFORMED;
	if (l->events_used > l->events_mask / 4 * 3)
		stella_lines_forget(l); /* places too: they are asked for again */
	for (uint32_t i = 0; i < PROBES && !e; i++)
		if (!l->events[(hash + i) & l->events_mask].hash)
			e = &l->events[(hash + i) & l->events_mask];
	if (!e) {
		e = &l->events[hash & l->events_mask];
		forget_event(e);
		l->events_used--;
	}
	e->key = malloc(key_length);
	if (!e->key || copy(&e->comm, comm, comm_length) || copy(&e->event, event, event_length) ||
	    copy(&e->source, source, source_length))
		return NO_MEMORY;
	memcpy(e->key, key, key_length);
	e->key_length = key_length;
	e->call = call;
	e->type = type;
	e->anonymous = anonymous;
	e->hash = hash;
	l->events_used++;
	return DONE;
}

int stella_lines_add_place(struct lines *l, uint64_t cgroup_id, const char *before, uint32_t before_length,
			   const char *between, uint32_t between_length, const char *after, uint32_t after_length)
{
	if (l->places_used > l->places_mask / 4 * 3)
		forget_places(l);
	struct place *p = find_place(l, cgroup_id);
	if (!p || p->used)
		return MALFORMED;
	if (copy(&p->before, before, before_length) || copy(&p->between, between, between_length) ||
	    copy(&p->after, after, after_length))
		return NO_MEMORY;
	p->cgroup_id = cgroup_id;
	p->used = 1;
	l->places_used++;
	return DONE;
}

static inline char *put(char *o, const struct text *t)
{
	memcpy(o, t->at, t->length);
	return o + t->length;
}

static inline char *put_bytes(char *o, const char *from, uint32_t length)
{
	memcpy(o, from, length);
	return o + length;
}
#define PUT(o, literal) put_bytes(o, literal, sizeof(literal) - 1)

static inline char *put_number(char *o, uint64_t n)
{
	char digits[20];
	int i = 20;
	do {
		digits[--i] = '0' + n % 10;
		n /= 10;
	} while (n);
	memcpy(o, digits + i, 20 - i);
	return o + 20 - i;
}

static int reserve(struct out *out, uint64_t more)
{
	if (out->length + more <= out->capacity)
		return 0;
	uint64_t capacity = (out->length + more) * 2;
	char *at = realloc(out->at, capacity);
	if (!at)
		return NO_MEMORY;
	out->at = at;
	out->capacity = capacity;
	return 0;
}

/* Go on at `*position`; return DONE at the end, or why it stopped there. */
int stella_lines_run(struct lines *l, const uint8_t *data, uint64_t length, uint64_t *position)
{
	uint64_t at = *position;
	const struct place *place = NULL;

	while (at < length) {
		const struct header *h = (const struct header *)(data + at);
		*position = at;
		if (length - at < HEADER || h->size < HEADER || h->size % 8 || h->size > length - at ||
		    h->lane >= l->lanes)
			return MALFORMED;
		const uint8_t *key = data + at + KEY_AT;
		uint32_t key_length = h->size - KEY_AT;
		uint64_t hash = hash_of(l, h->call, key, key_length);
		const struct event *e = find_event(l, hash, h->call, key, key_length);
		if (!e)
			return NEED_EVENT;
		if (!e->type) {
			l->counted[h->lane]++;
			l->counted[l->lanes]++;
			l->filtered[h->lane]++;
			at += h->size;
			continue;
		}
		if (!place || place->cgroup_id != h->cgroup_id) {
			place = find_place(l, h->cgroup_id);
			if (!place || !place->used)
				return NEED_PLACE;
		}
		struct out *out = &l->out[e->type];
		if (reserve(out, (uint64_t)place->before.length + place->between.length + place->after.length +
					 e->comm.length + e->event.length + e->source.length + l->node.length +
					 l->run.length + NUMBERS))
			return NO_MEMORY;
		char *o = out->at + out->length;
		o = put(o, &place->before);
		if (!e->anonymous)
			o = put(o, &e->comm);
		o = put(o, &place->between);
		o = put(o, &e->event);
		o = put(o, &place->after);
		o = put_number(PUT(o, "\"lane\":"), h->lane);
		o = put(PUT(o, ","), &l->node);
		if (!e->anonymous)
			o = PUT(put_number(PUT(o, "\"pid\":"), h->tgid), ",");
		o = put(o, &l->run);
		o = put_number(PUT(o, "\"seq\":"), h->seq);
		o = put(PUT(o, ","), &e->source);
		if (!e->anonymous)
			o = PUT(put_number(PUT(o, "\"tid\":"), h->tid), ",");
		o = put_number(PUT(o, "\"ts_ns\":"), h->ts_ns);
		if (!e->anonymous)
			o = put_number(PUT(o, ",\"uid\":"), h->uid);
		o = PUT(o, "}\n");
		out->length = o - out->at;
		out->lines++;
		l->counted[h->lane]++;
		l->counted[l->lanes]++;
		at += h->size;
	}
	*position = at;
	return DONE;
}

const char *stella_lines_output(const struct lines *l, uint32_t type, uint64_t *length, uint64_t *lines)
{
	*length = l->out[type].length;
	*lines = l->out[type].lines;
	return l->out[type].at;
}

const uint64_t *stella_lines_counts(const struct lines *l, int filtered)
{
	return filtered ? l->filtered : l->counted;
}

/* Write up to `room` distinct cgroup ids of a batch; return how many. Stops at a record that cannot be one. */
uint32_t stella_lines_cgroups(const uint8_t *data, uint64_t length, uint64_t *ids, uint32_t room)
{
	uint32_t found = 0;
	uint64_t at = 0, last = 0;
	while (at + HEADER <= length) {
		const struct header *h = (const struct header *)(data + at);
		if (h->size < HEADER || h->size % 8)
			break;
		at += h->size;
		if (found && h->cgroup_id == last)
			continue;
		last = h->cgroup_id;
		uint32_t i = 0;
		while (i < found && ids[i] != last)
			i++;
		if (i < found)
			continue;
		if (found == room)
			break;
		ids[found++] = last;
	}
	return found;
}
