/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RFC 6962 tree hashing over newline-ended lines, with libcrypto's SHA-256.  merkle.py says what it computes.
 *
 * The low-level SHA256_* functions are used on purpose: EVP allocates for every digest, which costs as much as
 * hashing a line.  They are declared here so that no development package is needed.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
	uint64_t room[32]; /* more than any libcrypto's SHA256_CTX (112 bytes) */
} SHA256_CTX;
int SHA256_Init(SHA256_CTX *c);
int SHA256_Update(SHA256_CTX *c, const void *data, size_t len);
int SHA256_Final(unsigned char *md, SHA256_CTX *c);

struct frontier {
	uint64_t size;		/* leaves; bit n set: level[n] holds a complete subtree of 2^n leaves */
	uint8_t level[64][32];
};

static void node(const uint8_t left[32], const uint8_t right[32], uint8_t out[32])
{
	uint8_t both[65];
	SHA256_CTX c;
	both[0] = 1;
	memcpy(both + 1, left, 32);
	memcpy(both + 33, right, 32);
	SHA256_Init(&c);
	SHA256_Update(&c, both, sizeof(both));
	SHA256_Final(out, &c);
}

static void append(struct frontier *f, const uint8_t leaf[32])
{
	uint8_t hash[32];
	int n = 0;
	memcpy(hash, leaf, 32);
	for (; f->size >> n & 1; n++)
		node(f->level[n], hash, hash);
	memcpy(f->level[n], hash, 32);
	f->size++;
}

static void leaf(const uint8_t *line, size_t length, uint8_t out[32])
{
	static const uint8_t prefix = 0;
	SHA256_CTX c;
	SHA256_Init(&c);
	SHA256_Update(&c, &prefix, 1);
	SHA256_Update(&c, line, length);
	SHA256_Final(out, &c);
}

/* Append every line of `data`, which ends with a newline or is empty. Return how many there were. */
uint64_t stella_merkle_add_lines(struct frontier *f, const uint8_t *data, uint64_t length)
{
	const uint8_t *end = data + length;
	uint64_t lines = 0;
	while (data < end) {
		const uint8_t *newline = memchr(data, '\n', end - data);
		if (!newline)
			break;
		uint8_t hash[32];
		leaf(data, newline - data, hash);
		append(f, hash);
		data = newline + 1;
		lines++;
	}
	return lines;
}

/*
 * Put the leaf hashes of the first `max` lines of `data` to `out`, back to back. Return how many there were, and in
 * `consumed` how many bytes these lines were.
 */
uint64_t stella_merkle_leaves(const uint8_t *data, uint64_t length, uint64_t max, uint8_t *out, uint64_t *consumed)
{
	const uint8_t *p = data, *end = data + length;
	uint64_t lines = 0;
	while (lines < max && p < end) {
		const uint8_t *newline = memchr(p, '\n', end - p);
		if (!newline)
			break;
		leaf(p, newline - p, out + lines * 32);
		p = newline + 1;
		lines++;
	}
	*consumed = p - data;
	return lines;
}

/* How many newlines there are. The plain loop is what the compiler turns into vector code. */
uint64_t stella_merkle_count_lines(const uint8_t *data, uint64_t length)
{
	uint64_t lines = 0;
	for (uint64_t i = 0; i < length; i++)
		lines += data[i] == '\n';
	return lines;
}

/* Append `count` leaf hashes that stand back to back. */
void stella_merkle_add(struct frontier *f, const uint8_t *leaves, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		append(f, leaves + i * 32);
}
