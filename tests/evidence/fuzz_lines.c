/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Drives lines.c with hostile input under the sanitizers: fuzz_lines CORPUS ROUNDS SEED.
 *
 * CORPUS holds one line each. Every round joins a few of them, changes them in a few places, and checks them in
 * a buffer of exactly their length, so that one byte read too far is seen.
 */
#include "lines.c"

#include <stdio.h>
#include <stdlib.h>

#define LINES 4096
#define ROOM (64 << 10)

static uint64_t state, vouched;

static uint64_t chance(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % below;
}

static void change(uint8_t *data, size_t *length)
{
	static const char marks[] = "{}[]\",:\\/0123456789-+.eEtfnu \n\r\t\x01\x7f\x80\xbf\xc2\xe0\xed\xf0\xf4\xff";
	size_t at = chance(*length), n = 1 + chance(24);
	switch (chance(6)) {
	case 0:
		data[at] ^= 1 << chance(8);
		break;
	case 1:
		data[at] = marks[chance(sizeof(marks))];
		break;
	case 2: /* cut out */
		if (n > *length - at)
			n = *length - at;
		memmove(data + at, data + at + n, *length - at - n);
		*length -= n;
		break;
	case 3: /* double */
		if (n > *length - at)
			n = *length - at;
		if (*length + n > ROOM)
			return;
		memmove(data + at + n, data + at, *length - at);
		*length += n;
		break;
	case 4: /* nest */
		if (*length + n > ROOM)
			return;
		memmove(data + at + n, data + at, *length - at);
		memset(data + at, chance(2) ? '[' : '7', n);
		*length += n;
		break;
	default: /* change two places */
		n = chance(*length);
		data[at] ^= data[n];
		data[n] ^= data[at];
		data[at] ^= data[n];
	}
}

static void check(const struct table *table, struct lane *lanes, const uint8_t *data, size_t length)
{
	uint8_t *exact = malloc(length), bitmap[32] = {0};
	struct place *places = calloc(length, sizeof(*places));
	uint64_t consumed = 0, lines = 0, newlines = 0, left, sure = 0;
	uint32_t max = 1 + chance(length);
	memcpy(exact, data, length);
	for (size_t i = 0; i < length; i++)
		newlines += exact[i] == '\n';
	lines = stella_lines_check(table, exact, length, max, places, &consumed);
	if (lines != (newlines < max ? newlines : max) || consumed > length || exact[consumed - 1] != '\n')
		abort();
	for (uint64_t i = 0; i < lines; i++) {
		if (places[i].lane != UNSURE && places[i].lane >= 3)
			abort();
		sure += places[i].lane != UNSURE;
	}
	for (int i = 0; i < 3; i++)
		lanes[i].count = 0;
	vouched += sure;
	left = stella_lines_mark(lanes, bitmap, places, lines);
	if (left + lanes[0].count + lanes[1].count + lanes[2].count != lines || lines - left > sure)
		abort();
	free(places);
	free(exact);
}

int main(int argc, char **argv)
{
	static uint8_t corpus[1 << 20], data[ROOM + 1];
	static uint8_t *begin[LINES];
	static size_t size[LINES];
	size_t count = 0;
	/* The names of test_lines.py, as they stand in a line. */
	static const char boot[] = "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0", other_boot[] = "b\xc3\xb6\\\"ot";
	static const char name[] = "0123456789abcdef", other_name[] = "r\xc3\xbcn\\n";
	struct run runs[] = {
	    {(const uint8_t *)name, (const uint8_t *)boot, sizeof(name) - 1, sizeof(boot) - 1, 0, 2},
	    {(const uint8_t *)other_name, (const uint8_t *)other_boot, sizeof(other_name) - 1, sizeof(other_boot) - 1, 2, 1},
	};
	struct lane lanes[] = {{0, 0, 100, 0, 100, 0, UINT64_MAX, 1},
			       {4, 0, UINT64_MAX, 13, 4, 0, UINT64_MAX, 1},
			       {3, 0, 1000, 14, 100, 0, UINT64_MAX, 0}};
	struct table table = {(const uint8_t *)"node-a", runs, lanes, 6, 2};
	FILE *file = argc == 4 ? fopen(argv[1], "rb") : NULL;
	if (!file)
		return 2;
	size_t total = fread(corpus, 1, sizeof(corpus), file);
	fclose(file);
	for (uint8_t *p = corpus; p < corpus + total && count < LINES; count++) {
		uint8_t *newline = memchr(p, '\n', corpus + total - p);
		if (!newline)
			break;
		begin[count] = p;
		size[count] = newline + 1 - p;
		p = newline + 1;
	}
	state = strtoull(argv[3], NULL, 10) | 1;
	for (uint64_t rounds = strtoull(argv[2], NULL, 10); rounds; rounds--) {
		size_t length = 0;
		for (uint64_t n = 1 + chance(3); n; n--) {
			size_t line = chance(count);
			if (length + size[line] > ROOM)
				break;
			memcpy(data + length, begin[line], size[line]);
			length += size[line];
		}
		for (uint64_t n = chance(5); n && length > 1; n--)
			change(data, &length);
		data[length++] = '\n';
		check(&table, lanes, data, length);
	}
	printf("%llu lines vouched for\n", (unsigned long long)vouched);
	return 0;
}
