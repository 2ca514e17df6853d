/* SPDX-License-Identifier: Apache-2.0 */
/* RFC 6962 tree hashing over newline-ended lines. merkle.py says what it computes. */
#include "sha256.h"

enum { LEAF = 0, NODE = 1 };

struct frontier {
	uint64_t size;		/* leaves; bit n set: level[n] holds a complete subtree of 2^n leaves */
	uint8_t level[64][32];
};

/*
 * Put the leaf hashes of the first `max` lines of `data` to `out`, back to back. Return how many there were, and in
 * `consumed` how many bytes these lines were.
 */
uint64_t stella_merkle_leaves(const uint8_t *data, uint64_t length, uint64_t max, uint8_t *out, uint64_t *consumed)
{
	const uint8_t *p = data, *end = data + length;
	struct batch batch;
	uint64_t lines = 0;
	sha256_begin(&batch);
	while (lines < max && p < end) {
		const uint8_t *newline = memchr(p, '\n', end - p);
		if (!newline)
			break;
		sha256_put(&batch, LEAF, p, newline - p, out + lines * 32);
		p = newline + 1;
		lines++;
	}
	sha256_flush(&batch);
	*consumed = p - data;
	return lines;
}

/*
 * Append `count` leaf hashes that stand back to back in `row`, which is used up: it holds the nodes of each level in
 * turn. The nodes of a level do not depend on each other.
 */
void stella_merkle_add(struct frontier *f, uint8_t *row, uint64_t count)
{
	uint64_t size = f->size;
	struct batch batch;
	sha256_begin(&batch);
	f->size += count;
	for (int n = 0; count; n++, size >>= 1) {
		uint64_t nodes = 0, at = 0;
		if (size & 1) { /* the subtree that waits here, and the first of the row */
			uint8_t both[64];
			memcpy(both, f->level[n], 32);
			memcpy(both + 32, row, 32);
			/* Its place in the row is free as soon as it was copied. */
			sha256_put(&batch, NODE, both, 64, row);
			nodes = at = 1;
		}
		for (; at + 1 < count; at += 2)
			sha256_put(&batch, NODE, row + at * 32, 64, row + nodes++ * 32);
		sha256_flush(&batch);
		if (at < count)
			memcpy(f->level[n], row + at * 32, 32);
		count = nodes;
	}
}
