/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls FOLDER CERTIFICATE SECONDS RATE: OpenSSL speaks to itself over a socket pair, RATE records a second, each one
 * SSL_write and one SSL_read; begins when FOLDER/go is there and prints how many records there were.
 * Declares what it calls, so that libssl's headers need not be installed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct ssl_ctx_st SSL_CTX;
typedef struct ssl_st SSL;
extern const void *TLS_method(void);
extern SSL_CTX *SSL_CTX_new(const void *);
extern int SSL_CTX_use_certificate_file(SSL_CTX *, const char *, int);
extern int SSL_CTX_use_PrivateKey_file(SSL_CTX *, const char *, int);
extern SSL *SSL_new(SSL_CTX *);
extern int SSL_set_fd(SSL *, int), SSL_do_handshake(SSL *), SSL_write(SSL *, const void *, int);
extern int SSL_read(SSL *, void *, int);
extern void SSL_set_accept_state(SSL *), SSL_set_connect_state(SSL *);

#define PEM 1
#define TICK_NS 10000000L

int main(int argc, char **argv)
{
	int pair[2];
	char go[512], data[64] = { 0 };
	SSL_CTX *context = SSL_CTX_new(TLS_method());
	if (argc != 5 || !context || socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) ||
	    SSL_CTX_use_certificate_file(context, argv[2], PEM) != 1 ||
	    SSL_CTX_use_PrivateKey_file(context, argv[2], PEM) != 1)
		return 2;
	SSL *server = SSL_new(context), *client = SSL_new(context);
	SSL_set_fd(server, pair[0]);
	SSL_set_fd(client, pair[1]);
	SSL_set_accept_state(server);
	SSL_set_connect_state(client);
	for (int tries = 0;; tries++) {
		int one = SSL_do_handshake(client), other = SSL_do_handshake(server);
		if (one == 1 && other == 1)
			break;
		if (tries > 100)
			return 3;
	}
	puts("ready");
	fflush(stdout);
	snprintf(go, sizeof(go), "%s/go", argv[1]);
	while (access(go, F_OK))
		usleep(10000);
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	long next = t.tv_sec * 1000000000L + t.tv_nsec, end = next + (long)(atof(argv[3]) * 1e9), records = 0;
	double owed = 0;
	while (next < end) {
		t = (struct timespec){ next / 1000000000L, next % 1000000000L };
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
		for (owed += atof(argv[4]) * TICK_NS / 1e9; owed >= 1; owed--, records++)
			if (SSL_write(client, data, sizeof(data)) != sizeof(data) ||
			    SSL_read(server, data, sizeof(data)) != sizeof(data))
				return 4;
		next += TICK_NS;
	}
	printf("%ld\n", records);
	return 0;
}
