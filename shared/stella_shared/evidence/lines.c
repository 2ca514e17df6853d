/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The quick half of lines.py: vouches for evidence lines that are beyond doubt, and leaves all others to Python.
 *
 * A line is vouched for when it is a canonical JSON object of the plain kind (ASCII keys without escapes in
 * rising order, integers, strings with the shortest escapes, valid UTF-8, at most DEPTH_MAX deep) whose node,
 * boot_id, run, lane and seq fit the table. Nothing is ever refused here: what is not vouched for may still be
 * right, and the verdict on it is Python's. So only one mistake would count, to vouch for what Python refuses.
 *
 * The input is hostile. Every line ends with a newline inside the block, and a newline is allowed nowhere in
 * canonical JSON; so a reader that stops at the first byte it does not expect never leaves its line.
 */
#include <stdint.h>
#include <string.h>

#define DEPTH_MAX 64
#define DIGITS_MAX 4096 /* Python reads integers of up to 4300 digits */
#define UNSURE UINT32_MAX

struct run {
	const uint8_t *name, *boot; /* as they stand in a line, without the quotes */
	uint32_t name_length, boot_length;
	uint32_t lanes_at, lanes; /* its share of the table's lanes, ascending by number */
};

struct lane {
	int64_t number;
	uint64_t first, next;
	uint64_t bits_at, bits; /* numbers [first, first + bits) have a bit each, from byte `bits_at` on */
	uint64_t count;		/* numbers that were marked, in the bits or beyond them */
	uint64_t twice;		/* the smallest number that was marked twice in the bits; UINT64_MAX for none */
	uint64_t ordered;	/* whether a number must be in [first, next) */
};

struct table {
	const uint8_t *node;
	const struct run *runs; /* ascending by name */
	const struct lane *lanes;
	uint32_t node_length, run_count;
};

struct place { /* of one line */
	uint64_t seq;  /* when UNSURE: where in the block the line begins */
	uint32_t lane; /* index into the table's lanes, or UNSURE */
	uint32_t line; /* which line of the call */
};

struct token {
	const uint8_t *at;
	uint64_t length;
};

enum { BOOT_ID, LANE, NODE, RUN, SEQ, FIELDS };

/* The readers below return the byte after what they read, or NULL when they do not vouch for it. */

static const uint8_t *escape(const uint8_t *p)
{
	switch (*p) {
	case '"':
	case '\\':
	case 'b':
	case 'f':
	case 'n':
	case 'r':
	case 't':
		return p + 1;
	case 'u':
		break;
	default:
		return NULL;
	}
	if (p[1] != '0' || p[2] != '0')
		return NULL;
	if (p[3] == '0') {
		/* 08, 09, 0a, 0c and 0d have shorter forms */
		if ((p[4] >= '0' && p[4] <= '7') || p[4] == 'b' || p[4] == 'e' || p[4] == 'f')
			return p + 5;
		return NULL;
	}
	if (p[3] == '1' && ((p[4] >= '0' && p[4] <= '9') || (p[4] >= 'a' && p[4] <= 'f')))
		return p + 5;
	return NULL;
}

static int follows(uint8_t byte)
{
	return (byte & 0xc0) == 0x80;
}

/* One character beyond ASCII: shortest form, no surrogate, up to U+10FFFF. */
static const uint8_t *wide(const uint8_t *p)
{
	uint8_t lead = p[0];
	if (lead < 0xc2)
		return NULL;
	if (lead < 0xe0)
		return follows(p[1]) ? p + 2 : NULL;
	if (lead < 0xf0) {
		uint8_t low = lead == 0xe0 ? 0xa0 : 0x80, high = lead == 0xed ? 0x9f : 0xbf;
		return p[1] >= low && p[1] <= high && follows(p[2]) ? p + 3 : NULL;
	}
	if (lead < 0xf5) {
		uint8_t low = lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xf4 ? 0x8f : 0xbf;
		return p[1] >= low && p[1] <= high && follows(p[2]) && follows(p[3]) ? p + 4 : NULL;
	}
	return NULL;
}

/* Skip plain characters: ASCII from the space on, no quote, no backslash. */
static const uint8_t *plain(const uint8_t *p, const uint8_t *end)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	const uint64_t ones = 0x0101010101010101;
	while (end - p >= 8) {
		uint64_t x, hit;
		memcpy(&x, p, 8);
		/* A borrow can only mark bytes above one that is marked rightly, and the lowest mark is what counts. */
		hit = ((x - ones * 0x20) | ((x ^ (ones * '"')) - ones) | ((x ^ (ones * '\\')) - ones) | x) & (ones * 0x80);
		if (hit)
			return p + (__builtin_ctzll(hit) >> 3);
		p += 8;
	}
#endif
	while (p < end && *p >= 0x20 && *p < 0x80 && *p != '"' && *p != '\\')
		p++;
	return p;
}

/* The rest of a string, after its first quote. */
static const uint8_t *string(const uint8_t *p, const uint8_t *end)
{
	for (;;) {
		p = plain(p, end);
		if (*p == '"')
			return p + 1;
		p = *p == '\\' ? escape(p + 1) : *p >= 0x80 ? wide(p) : NULL;
		if (!p)
			return NULL;
	}
}

static const uint8_t *integer(const uint8_t *p)
{
	const uint8_t *first;
	if (*p == '-') {
		p++;
		if (*p == '0')
			return NULL;
	}
	first = p;
	if (*p < '0' || *p > '9')
		return NULL;
	while (*p >= '0' && *p <= '9')
		p++;
	if ((*first == '0' && p - first > 1) || p - first > DIGITS_MAX)
		return NULL;
	/* A fraction or an exponent follows no value, so the caller stops at it. */
	return p;
}

static const uint8_t *word(const uint8_t *p, const uint8_t *end, const char *text, int64_t length)
{
	return end - p >= length && !memcmp(p, text, length) ? p + length : NULL;
}

static const uint8_t *object(const uint8_t *p, const uint8_t *end, int depth, struct token *fields);

static const uint8_t *value(const uint8_t *p, const uint8_t *end, int depth)
{
	if (depth > DEPTH_MAX)
		return NULL;
	switch (*p) {
	case '"':
		return string(p + 1, end);
	case '{':
		return object(p + 1, end, depth, NULL);
	case '[':
		p++;
		if (*p == ']')
			return p + 1;
		for (;;) {
			p = value(p, end, depth + 1);
			if (!p || (*p != ',' && *p != ']'))
				return NULL;
			if (*p++ == ']')
				return p;
		}
	case 't':
		return word(p, end, "true", 4);
	case 'f':
		return word(p, end, "false", 5);
	case 'n':
		return word(p, end, "null", 4);
	default:
		return integer(p);
	}
}

static int rising(struct token before, struct token after)
{
	uint64_t shorter = before.length < after.length ? before.length : after.length;
	int order = memcmp(before.at, after.at, shorter);
	return order < 0 || (order == 0 && before.length < after.length);
}

static int field(struct token key)
{
	switch (key.length) {
	case 3:
		return !memcmp(key.at, "seq", 3) ? SEQ : !memcmp(key.at, "run", 3) ? RUN : -1;
	case 4:
		return !memcmp(key.at, "lane", 4) ? LANE : !memcmp(key.at, "node", 4) ? NODE : -1;
	case 7:
		return !memcmp(key.at, "boot_id", 7) ? BOOT_ID : -1;
	default:
		return -1;
	}
}

/* The rest of an object, after its brace. Rising keys are sorted, and none is there twice. */
static const uint8_t *object(const uint8_t *p, const uint8_t *end, int depth, struct token *fields)
{
	struct token before = {NULL, 0}, key;
	int known;
	if (*p == '}')
		return p + 1;
	for (;;) {
		const uint8_t *begin;
		if (*p != '"')
			return NULL;
		key.at = p + 1;
		p = plain(key.at, end);
		key.length = p - key.at;
		if (p[0] != '"' || p[1] != ':' || (before.at && !rising(before, key)))
			return NULL;
		before = key;
		begin = p += 2;
		p = value(p, end, depth + 1);
		if (!p)
			return NULL;
		if (fields && (known = field(key)) >= 0)
			fields[known] = (struct token){begin, p - begin};
		if (*p != ',' && *p != '}')
			return NULL;
		if (*p++ == '}')
			return p;
	}
}

/* Whether a value is the string `text`. There is one canonical form, so the bytes decide. */
static int is_string(struct token value, const uint8_t *text, uint32_t length)
{
	return value.at && value.length == (uint64_t)length + 2 && value.at[0] == '"' && !memcmp(value.at + 1, text, length);
}

/* Read an integer that is surely below 2^63. */
static int number(struct token value, uint64_t *out)
{
	uint64_t n = 0;
	if (!value.at || value.length > 18)
		return 0;
	for (uint64_t i = 0; i < value.length; i++) {
		if (value.at[i] < '0' || value.at[i] > '9')
			return 0;
		n = n * 10 + (value.at[i] - '0');
	}
	*out = n;
	return 1;
}

static const struct run *find_run(const struct table *t, struct token name)
{
	uint32_t low = 0, high = t->run_count;
	if (!name.at || name.length < 2 || name.at[0] != '"')
		return NULL;
	name.at++;
	name.length -= 2;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct run *run = &t->runs[middle];
		struct token here = {run->name, run->name_length};
		if (here.length == name.length && !memcmp(here.at, name.at, name.length))
			return run;
		if (rising(here, name))
			low = middle + 1;
		else
			high = middle;
	}
	return NULL;
}

static uint32_t find_lane(const struct table *t, const struct run *run, uint64_t number)
{
	uint32_t low = run->lanes_at, high = run->lanes_at + run->lanes;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		if (t->lanes[middle].number < (int64_t)number)
			low = middle + 1;
		else
			high = middle;
	}
	return low < run->lanes_at + run->lanes && t->lanes[low].number == (int64_t)number ? low : UNSURE;
}

/* Return the lane of the line [p, end), where `*end` is its newline, and put its number into `seq`. */
static uint32_t vouch(const struct table *t, const uint8_t *p, const uint8_t *end, uint64_t *seq)
{
	struct token fields[FIELDS] = {{NULL, 0}};
	const struct run *run;
	uint64_t lane_number;
	uint32_t lane;
	if (*p != '{' || object(p + 1, end, 0, fields) != end)
		return UNSURE;
	run = find_run(t, fields[RUN]);
	if (!run || !is_string(fields[NODE], t->node, t->node_length) ||
	    !is_string(fields[BOOT_ID], run->boot, run->boot_length) || !number(fields[LANE], &lane_number) ||
	    !number(fields[SEQ], seq))
		return UNSURE;
	lane = find_lane(t, run, lane_number);
	if (lane != UNSURE && t->lanes[lane].ordered && (*seq < t->lanes[lane].first || *seq >= t->lanes[lane].next))
		return UNSURE;
	return lane;
}

/*
 * Place up to `max` lines of `data`, which ends with a newline or is empty. Return how many there were, and in
 * `consumed` how many bytes they were.
 */
uint64_t stella_lines_check(const struct table *t, const uint8_t *data, uint64_t length, uint32_t max,
			    struct place *places, uint64_t *consumed)
{
	const uint8_t *p = data, *end = data + length;
	uint32_t lines = 0;
	while (lines < max && p < end) {
		const uint8_t *newline = memchr(p, '\n', end - p);
		struct place *place = &places[lines];
		if (!newline)
			break;
		place->lane = vouch(t, p, newline, &place->seq);
		if (place->lane == UNSURE)
			place->seq = p - data;
		place->line = lines;
		p = newline + 1;
		lines++;
	}
	*consumed = p - data;
	return lines;
}

/*
 * Note the numbers of lines that were placed. Lines that are UNSURE, and numbers without a bit, are put back to
 * the front of `places`, in order. Return how many these are.
 */
uint64_t stella_lines_mark(struct lane *lanes, uint8_t *bitmap, struct place *places, uint64_t count)
{
	uint64_t left = 0;
	for (uint64_t i = 0; i < count; i++) {
		struct lane *lane;
		uint64_t bit;
		uint8_t *byte, mask;
		if (places[i].lane == UNSURE) {
			places[left++] = places[i];
			continue;
		}
		lane = &lanes[places[i].lane];
		bit = places[i].seq - lane->first; /* below `first` it wraps around, to beyond the bits */
		if (bit >= lane->bits) {
			places[left++] = places[i];
			continue;
		}
		lane->count++;
		byte = &bitmap[lane->bits_at + (bit >> 3)];
		mask = 1 << (bit & 7);
		if (*byte & mask && places[i].seq < lane->twice)
			lane->twice = places[i].seq;
		*byte |= mask;
	}
	return left;
}
