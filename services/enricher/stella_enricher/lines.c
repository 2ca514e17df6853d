/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loop of lines.py: puts evidence lines together from parts that are already text.
 *
 * Distinct things are rendered once, in Python, and kept here: an event by its *what* (thread name and body of
 * the record), the fields of a place by cgroup and program. A batch says each distinct thing once
 * (stella_shared/raw_batches.py), so the look-ups are per distinct thing too, and the loop over the events only
 * copies parts and writes numbers in between. Where something is not known yet it stops and says so; Python adds
 * it and calls again.
 *
 * The bytes that are looked up come from traced programs, so the table is seeded, and it forgets rather than
 * grows. Every count and index of a batch is checked before it is used.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TYPES 8
#define ALLOCATIONS 64 /* what the C library adds to the four of an event */
#define NUMBERS 256 /* room for the fixed words and the decimal numbers of one line */
#define MAX_TABLE 65536 /* whos, or whats, of one batch */

enum { DONE = 0, NEED_EVENT = 1, NEED_PLACE = 2, MALFORMED = -1, NO_MEMORY = -2 };

struct who {
	uint64_t cgroup_id, start_ns, program;
	uint32_t tgid, tid, uid, lane;
};

struct what {
	uint16_t type, call;
	uint32_t stride;
	char comm[16]; /* the body follows */
};

struct number { /* one event of the batch */
	uint64_t ts_ns, seq;
	uint32_t who, what;
};

struct text {
	char *at;
	uint32_t length;
};

struct event {
	uint64_t hash; /* 0: free */
	uint8_t *key;
	uint32_t key_length;
	uint8_t type;	   /* 0: the filters drop it */
	uint8_t anonymous; /* no process is named */
	struct text comm, event, source;
};

struct place { /* what is the same for one program in one cgroup */
	uint64_t cgroup_id, program;
	uint8_t used;
	struct text before, between, after, late;
};

struct out {
	char *at;
	uint64_t length, capacity, lines;
};

struct lines {
	uint64_t seed;
	uint32_t events_mask, places_mask;
	uint32_t events_used, places_used;
	uint64_t events_bytes, events_max_bytes; /* keys and texts */
	struct event *events;
	struct place *places;
	struct text node, run; /* `"node":"…",` and `"run":"…",` */
	struct out out[TYPES];
	uint32_t lanes;
	uint64_t *counted, *filtered; /* by lane; behind the last lane stands the sum */
	/* The batch at hand: what its indexes mean, as far as that is known. */
	const struct event **whats;
	const struct place **whos;
	uint32_t *what_at;
	uint32_t whats_known, whos_known;
	uint32_t *who_lines; /* lines of each who */
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

struct lines *stella_lines_new(uint32_t events_log2, uint32_t places_log2, uint32_t lanes, uint64_t seed,
			       uint64_t events_max_bytes)
{
	struct lines *l = calloc(1, sizeof(*l));
	if (!l)
		return NULL;
	l->seed = seed | 1;
	l->events_mask = (1u << events_log2) - 1;
	l->places_mask = (1u << places_log2) - 1;
	l->lanes = lanes;
	l->events_max_bytes = events_max_bytes;
	l->events = calloc((size_t)l->events_mask + 1, sizeof(*l->events));
	l->places = calloc((size_t)l->places_mask + 1, sizeof(*l->places));
	l->counted = calloc((size_t)lanes + 1, sizeof(uint64_t));
	l->filtered = calloc((size_t)lanes + 1, sizeof(uint64_t));
	l->whats = calloc(MAX_TABLE, sizeof(*l->whats));
	l->whos = calloc(MAX_TABLE, sizeof(*l->whos));
	l->what_at = calloc(MAX_TABLE, sizeof(*l->what_at));
	l->who_lines = calloc(MAX_TABLE, sizeof(*l->who_lines));
	if (!l->events || !l->places || !l->counted || !l->filtered || !l->whats || !l->whos || !l->what_at ||
	    !l->who_lines)
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
		drop(&l->places[i].late);
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
	l->events_bytes = 0;
	forget_places(l);
}

/* Events are forgotten between batches and nowhere else, so that what a batch has found stays where it is. */
void stella_lines_trim(struct lines *l)
{
	if (l->events_used > l->events_mask / 2 || l->events_bytes > l->events_max_bytes)
		stella_lines_forget(l);
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
	free(l->whats);
	free(l->whos);
	free(l->what_at);
	free(l->who_lines);
	free(l);
}

/* A new batch: outputs and counts start anew, and places are asked for again, for containers change. */
int stella_lines_begin(struct lines *l, const char *node, uint32_t node_length, const char *run,
		       uint32_t run_length)
{
	stella_lines_trim(l);
	forget_places(l);
	l->whats_known = l->whos_known = 0;
	drop(&l->node);
	drop(&l->run);
	for (int i = 0; i < TYPES; i++)
		l->out[i].length = l->out[i].lines = 0;
	memset(l->counted, 0, ((size_t)l->lanes + 1) * sizeof(uint64_t));
	memset(l->filtered, 0, ((size_t)l->lanes + 1) * sizeof(uint64_t));
	return copy(&l->node, node, node_length) | copy(&l->run, run, run_length);
}

static uint64_t hash_of(const struct lines *l, const uint8_t *key, uint32_t length)
{
	uint64_t h = l->seed ^ length;
	/* Whats are padded to 8 bytes. */
	for (uint32_t i = 0; i + 8 <= length; i += 8) {
		uint64_t word;
		memcpy(&word, key + i, 8);
		h = (h ^ word) * 0x9e3779b97f4a7c15ull;
		h ^= h >> 32;
	}
	return h | 1;
}

/* The slot of a what: its own, or the free one where it belongs. The table is never more than half full, but
 * for one batch's worth. */
static struct event *slot_of(const struct lines *l, uint64_t hash, const uint8_t *key, uint32_t length)
{
	for (uint32_t i = 0; i <= l->events_mask; i++) {
		struct event *e = &l->events[(hash + i) & l->events_mask];
		if (!e->hash || (e->hash == hash && e->key_length == length && !memcmp(e->key, key, length)))
			return e;
	}
	return NULL;
}

static struct place *find_place(const struct lines *l, uint64_t cgroup_id, uint64_t program)
{
	uint64_t hash = ((cgroup_id ^ l->seed) * 0x9e3779b97f4a7c15ull ^ program) * 0x9e3779b97f4a7c15ull;
	for (uint32_t i = 0; i <= l->places_mask; i++) {
		struct place *p = &l->places[((hash >> 32) + i) & l->places_mask];
		if (!p->used || (p->cgroup_id == cgroup_id && p->program == program))
			return p;
	}
	return NULL;
}

/* Keep a rendered event. `key` is the whole what. */
int stella_lines_add_event(struct lines *l, const uint8_t *key, uint32_t key_length, uint8_t type,
			   uint8_t anonymous, const char *comm, uint32_t comm_length, const char *event,
			   uint32_t event_length, const char *source, uint32_t source_length)
{
	uint64_t hash = hash_of(l, key, key_length);
	struct event *e = slot_of(l, hash, key, key_length);
	if (type >= TYPES || !e || e->hash)
		return MALFORMED;
	e->key = malloc(key_length);
	if (!e->key || copy(&e->comm, comm, comm_length) || copy(&e->event, event, event_length) ||
	    copy(&e->source, source, source_length))
		return NO_MEMORY;
	memcpy(e->key, key, key_length);
	e->key_length = key_length;
	e->type = type;
	e->anonymous = anonymous;
	e->hash = hash;
	l->events_used++;
	l->events_bytes += (uint64_t)key_length + comm_length + event_length + source_length + ALLOCATIONS;
	return DONE;
}

/* `texts` are before, between, after and late, `lengths` theirs. */
int stella_lines_add_place(struct lines *l, uint64_t cgroup_id, uint64_t program, const char *const *texts,
			   const uint32_t *lengths)
{
	struct place *p = find_place(l, cgroup_id, program);
	if (!p || p->used)
		return MALFORMED;
	if (copy(&p->before, texts[0], lengths[0]) || copy(&p->between, texts[1], lengths[1]) ||
	    copy(&p->after, texts[2], lengths[2]) || copy(&p->late, texts[3], lengths[3]))
		return NO_MEMORY;
	p->cgroup_id = cgroup_id;
	p->program = program;
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

/* Build the batch's lines, or return what is missing: the index of a what, or of a who, is in `*missing`. */
int stella_lines_run(struct lines *l, const uint8_t *data, uint64_t length, uint64_t *missing)
{
	uint32_t counts[4];
	if (!length)
		return DONE;
	if (length < sizeof(counts))
		return MALFORMED;
	memcpy(counts, data, sizeof(counts));
	const uint64_t whats_begin = sizeof(counts) + (uint64_t)counts[0] * sizeof(struct who);
	const uint64_t whats_end = whats_begin + counts[3];
	const uint64_t events = counts[2];
	if (counts[0] > MAX_TABLE || counts[1] > MAX_TABLE || counts[0] > l->places_mask / 2 ||
	    length != whats_end + events * sizeof(struct number))
		return MALFORMED;
	const struct who *whos = (const struct who *)(data + sizeof(counts));
	const struct number *numbers = (const struct number *)(data + whats_end);

	for (uint32_t i = l->whats_known; i < counts[1]; i++) {
		uint64_t at = i ? l->what_at[i] : whats_begin;
		const struct what *w = (const struct what *)(data + at);
		*missing = at;
		if (at > whats_end || whats_end - at < sizeof(*w) || w->stride < sizeof(*w) || w->stride % 8 ||
		    w->stride > whats_end - at)
			return MALFORMED;
		const struct event *e = slot_of(l, hash_of(l, data + at, w->stride), data + at, w->stride);
		if (!e)
			return NO_MEMORY;
		if (!e->hash)
			return NEED_EVENT;
		l->whats[i] = e;
		if (i + 1 < MAX_TABLE)
			l->what_at[i + 1] = (uint32_t)(at + w->stride);
		l->whats_known = i + 1;
	}
	for (uint32_t i = l->whos_known; i < counts[0]; i++) {
		*missing = i;
		if (whos[i].lane >= l->lanes)
			return MALFORMED;
		const struct place *p = find_place(l, whos[i].cgroup_id, whos[i].program);
		if (!p || !p->used)
			return NEED_PLACE;
		l->whos[i] = p;
		l->whos_known = i + 1;
	}
	memset(l->who_lines, 0, counts[0] * sizeof(*l->who_lines));
	for (uint64_t i = 0; i < events; i++) {
		const struct number *n = &numbers[i];
		if (n->who >= counts[0] || n->what >= counts[1])
			return MALFORMED;
		const struct who *who = &whos[n->who];
		const struct event *e = l->whats[n->what];
		const struct place *place = l->whos[n->who];
		l->counted[who->lane]++;
		l->counted[l->lanes]++;
		if (!e->type) {
			l->filtered[who->lane]++;
			continue;
		}
		l->who_lines[n->who]++;
		struct out *out = &l->out[e->type];
		if (reserve(out, (uint64_t)place->before.length + place->between.length + place->after.length +
					 place->late.length + e->comm.length + e->event.length + e->source.length + l->node.length +
					 l->run.length + NUMBERS))
			return NO_MEMORY;
		char *o = out->at + out->length;
		o = put(o, &place->before);
		if (!e->anonymous)
			o = put(o, &e->comm);
		o = put(o, &place->between);
		o = put(o, &e->event);
		o = put(o, &place->after);
		o = put_number(PUT(o, "\"lane\":"), who->lane);
		o = put(PUT(o, ","), &l->node);
		if (!e->anonymous)
			o = PUT(put_number(PUT(o, "\"pid\":"), who->tgid), ",");
		o = put(o, &place->late);
		o = put(o, &l->run);
		o = put_number(PUT(o, "\"seq\":"), n->seq);
		o = put(PUT(o, ","), &e->source);
		if (!e->anonymous) {
			if (who->start_ns)
				o = PUT(put_number(PUT(o, "\"start_ns\":"), who->start_ns), ",");
			o = PUT(put_number(PUT(o, "\"tid\":"), who->tid), ",");
		}
		o = put_number(PUT(o, "\"ts_ns\":"), n->ts_ns);
		if (!e->anonymous)
			o = put_number(PUT(o, ",\"uid\":"), who->uid);
		o = PUT(o, "}\n");
		out->length = o - out->at;
		out->lines++;
	}
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

/* Return how many events are kept; `*bytes` is what they take beside their slots. */
uint32_t stella_lines_kept(const struct lines *l, uint64_t *bytes)
{
	*bytes = l->events_bytes;
	return l->events_used;
}

const uint32_t *stella_lines_of_whos(const struct lines *l)
{
	return l->who_lines;
}
