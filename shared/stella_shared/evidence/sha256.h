/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SHA-256 of many short messages: sixteen at a time, one in each lane of AVX-512, where the processor has that.
 * There one block takes a fourth of the time that its SHA instructions take. Elsewhere, and for long messages,
 * libcrypto does the same one after the other. FIPS 180-4 says what is computed, and names what is in `compress`.
 *
 * The low-level SHA256_* functions are used on purpose: EVP allocates for every digest, which costs as much as
 * hashing a line. They are declared here so that no development package is needed.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
	uint64_t room[32]; /* more than any libcrypto's SHA256_CTX (112 bytes) */
} SHA256_CTX;
int SHA256_Init(SHA256_CTX *c);
int SHA256_Update(SHA256_CTX *c, const void *data, size_t len);
int SHA256_Final(unsigned char *md, SHA256_CTX *c);

#define BLOCK 64
#define LANES 16
#define MOST_BLOCKS 64 /* one long message would hold up fifteen others */

/* Messages that wait until there is one for each lane. */
struct batch {
	/* The first block of each, with its prefix, and the last two, with their padding: up to three in a row. */
	uint8_t ends[LANES][3 * BLOCK] __attribute__((aligned(64)));
	const uint8_t *data[LANES]; /* what is between them stays where it is */
	uint32_t blocks[LANES];
	uint8_t *out[LANES];
	int count, wide;
};

/* The block at `n` of the message in a lane, and any bytes for one that has ended. */
static inline const uint8_t *block_of(const struct batch *b, int lane, uint32_t n)
{
	const uint32_t between = b->blocks[lane] > 3 ? b->blocks[lane] - 3 : 0;
	if (n && n <= between)
		return b->data[lane] + n * BLOCK - 1;
	return b->ends[lane] + (n >= b->blocks[lane] ? 0 : n ? n - between : 0) * BLOCK;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512bw")))
typedef uint32_t words __attribute__((vector_size(4 * LANES))); /* one word of each message */

static const uint32_t K[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
static const uint32_t H[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
			       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };

#define ROTATE(x, n) ((words)_mm512_ror_epi32((__m512i)(x), n))

WIDE static inline __m512i big_endian(__m512i x)
{
	return _mm512_shuffle_epi8(x, _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203));
}

/* From a row of words for each message to a row of messages for each word. */
WIDE static void transpose(__m512i r[16])
{
	__m512i t[16];
#pragma GCC unroll 16
	for (int i = 0; i < 16; i += 2) {
		t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
		t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
	}
#pragma GCC unroll 16
	for (int i = 0; i < 16; i += 4)
		for (int j = 0; j < 2; j++) {
			r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
			r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
		}
#pragma GCC unroll 16
	for (int i = 0; i < 16; i += 8)
		for (int j = 0; j < 4; j++) {
			t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
			t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
		}
#pragma GCC unroll 16
	for (int j = 0; j < 8; j++) {
		r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
		r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
	}
}

WIDE static void compress(words state[8], const struct batch *b, uint32_t block, __mmask16 live)
{
	words w[16], v[8];
#pragma GCC unroll 16
	for (int l = 0; l < LANES; l++)
		w[l] = (words)big_endian(_mm512_loadu_si512(block_of(b, l, block)));
	transpose((__m512i *)w);
	memcpy(v, state, sizeof(v));
#pragma GCC unroll 64
	for (int t = 0; t < 64; t++) {
		words *now = &w[t & 15];
		if (t >= 16) {
			const words early = w[(t + 1) & 15], late = w[(t + 14) & 15];
			*now += (ROTATE(early, 7) ^ ROTATE(early, 18) ^ early >> 3) + w[(t + 9) & 15] +
				(ROTATE(late, 17) ^ ROTATE(late, 19) ^ late >> 10);
		}
		/* Instead of moving a to h, each round takes them one place further on. */
#define V(n) v[((n) - t) & 7]
		const words a = V(0), b = V(1), c = V(2), e = V(4), f = V(5), g = V(6);
		const words t1 = V(7) + (ROTATE(e, 6) ^ ROTATE(e, 11) ^ ROTATE(e, 25)) + (g ^ (e & (f ^ g))) + K[t] + *now;
		V(3) += t1;
		V(7) = t1 + (ROTATE(a, 2) ^ ROTATE(a, 13) ^ ROTATE(a, 22)) + ((a & b) | (c & (a | b)));
#undef V
	}
	for (int i = 0; i < 8; i++)
		state[i] = (words)_mm512_mask_add_epi32((__m512i)state[i], live, (__m512i)state[i], (__m512i)v[i]);
}

WIDE static void sha256_wide(const struct batch *b)
{
	words state[16] = { 0 };
	uint32_t most = 0;
	for (int i = 0; i < 8; i++)
		state[i] += H[i];
	for (int l = 0; l < b->count; l++)
		most = b->blocks[l] > most ? b->blocks[l] : most;
	for (uint32_t block = 0; block < most; block++) {
		__mmask16 live = 0;
		for (int l = 0; l < b->count; l++)
			live |= (__mmask16)((block < b->blocks[l]) << l);
		compress(state, b, block, live);
	}
	transpose((__m512i *)state);
	for (int l = 0; l < b->count; l++)
		_mm256_storeu_si256((__m256i *)b->out[l], _mm512_castsi512_si256(big_endian((__m512i)state[l])));
}

static int can_be_wide(void)
{
	return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#else
static void sha256_wide(const struct batch *b)
{
	(void)b;
}

static int can_be_wide(void)
{
	return 0;
}
#endif

static void sha256_begin(struct batch *b)
{
	b->count = 0;
	b->wide = can_be_wide();
}

static void sha256_plain(uint8_t prefix, const uint8_t *data, size_t length, uint8_t *out)
{
	SHA256_CTX c;
	SHA256_Init(&c);
	SHA256_Update(&c, &prefix, 1);
	SHA256_Update(&c, data, length);
	SHA256_Final(out, &c);
}

static void sha256_flush(struct batch *b)
{
	for (int l = b->count; l < LANES; l++)
		b->blocks[l] = 0;
	if (b->count)
		sha256_wide(b);
	b->count = 0;
}

/*
 * The SHA-256 of `prefix` and `data` will be at `out` after `sha256_flush`, or earlier; a message of three blocks or
 * less is copied, else `data` must stay until then.
 */
static void sha256_put(struct batch *b, uint8_t prefix, const uint8_t *data, size_t length, uint8_t *out)
{
	const size_t whole = length + 1, blocks = (whole + 9 + BLOCK - 1) / BLOCK;
	if (!b->wide || blocks > MOST_BLOCKS) {
		sha256_plain(prefix, data, length, out);
		return;
	}
	const int l = b->count;
	uint8_t *m = b->ends[l];
	const uint64_t bits = __builtin_bswap64((uint64_t)whole * 8);
	/* Where in the message the second block of `m` begins, and how much there is from there on. */
	const size_t at = blocks > 3 ? (blocks - 2) * BLOCK : BLOCK, last = (blocks < 3 ? blocks : 3) * BLOCK;
	size_t end = whole;
	m[0] = prefix;
	if (whole <= BLOCK) {
		memcpy(m + 1, data, length);
	} else {
		memcpy(m + 1, data, BLOCK - 1);
		end = whole > at ? BLOCK + whole - at : BLOCK;
		memcpy(m + BLOCK, data + at - 1, end - BLOCK);
	}
	m[end] = 0x80;
	memset(m + end + 1, 0, last - end - 1);
	memcpy(m + last - 8, &bits, 8);
	b->data[l] = data;
	b->blocks[l] = (uint32_t)blocks;
	b->out[l] = out;
	if (++b->count == LANES)
		sha256_flush(b);
}
