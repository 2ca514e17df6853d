/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mixed FOLDER GROUP PROCESSES SECONDS OPENS EXECS CONNECTS PROGRAM
 *
 * A container's worth of work: PROCESSES processes, each of which makes OPENS opens, runs PROGRAM EXECS times and
 * makes CONNECTS connections to itself, all a second, in ticks of 10 ms, for SECONDS. It begins when FOLDER/go is
 * there. FOLDER/result-GROUP then says: opens execs connects elapsed_ns cpu_us, the first three exactly what was made.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FILES 16
#define TICK_NS 10000000L

struct counts {
	long opens, execs, connects, elapsed_ns;
};

static long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

/* How many are due now, of `rate` a second; what is left over stays in *owed. */
static long due(double rate, double *owed)
{
	*owed += rate * TICK_NS / 1e9;
	long n = (long)*owed;
	*owed -= n;
	return n;
}

static void run(char *program)
{
	extern char **environ;
	char *argv[] = { program, "stella-mixed-exec", NULL };
	pid_t child;
	if (posix_spawn(&child, program, NULL, NULL, argv, environ))
		fail("posix_spawn");
	if (waitpid(child, NULL, 0) < 0)
		fail("waitpid");
}

static void call(int listener, const struct sockaddr_in *to)
{
	int caller = socket(AF_INET, SOCK_STREAM, 0);
	if (caller < 0 || connect(caller, (const struct sockaddr *)to, sizeof(*to)))
		fail("connect");
	int called = accept4(listener, NULL, NULL, 0);
	if (called < 0)
		fail("accept4");
	close(called);
	close(caller);
}

static struct counts work(char **argv, int worker)
{
	char path[FILES][512], go[512];
	double rates[3] = { atof(argv[5]), atof(argv[6]), atof(argv[7]) }, owed[3] = { 0 };
	struct counts made = { 0 };
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(to);
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	if (listener < 0 || bind(listener, (struct sockaddr *)&to, length) || listen(listener, 8) ||
	    getsockname(listener, (struct sockaddr *)&to, &length))
		fail("listen");
	for (int i = 0; i < FILES; i++) {
		snprintf(path[i], sizeof(path[i]), "%s/libmodule-%s-%d-%02d.so.1", argv[1], argv[2], worker, i);
		int fd = open(path[i], O_CREAT | O_RDONLY, 0644);
		if (fd < 0)
			fail(path[i]);
		close(fd);
		made.opens++;
	}
	snprintf(go, sizeof(go), "%s/go", argv[1]);
	while (access(go, F_OK))
		usleep(10000);
	/* The processes do not tick all at once. */
	long start = now(), next = start + worker * TICK_NS / 8, end = start + (long)(atof(argv[4]) * 1e9);
	while (next < end) {
		struct timespec t = { next / 1000000000L, next % 1000000000L };
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
		for (long n = due(rates[0], &owed[0]); n > 0; n--)
			close(openat(AT_FDCWD, path[made.opens++ % FILES], O_RDONLY));
		for (long n = due(rates[1], &owed[1]); n > 0; n--, made.execs++)
			run(argv[8]);
		for (long n = due(rates[2], &owed[2]); n > 0; n--, made.connects++)
			call(listener, &to);
		next += TICK_NS;
	}
	made.elapsed_ns = now() - start;
	return made;
}

int main(int argc, char **argv)
{
	int channel[2], processes;
	if (argc != 9 || (processes = atoi(argv[3])) < 1 || pipe(channel))
		return 2;
	for (int i = 0; i < processes; i++) {
		pid_t child = fork();
		if (child < 0)
			fail("fork");
		if (!child) {
			struct counts made = work(argv, i);
			_exit(write(channel[1], &made, sizeof(made)) != sizeof(made));
		}
	}
	close(channel[1]);
	struct counts all = { 0 }, one;
	while (read(channel[0], &one, sizeof(one)) == sizeof(one)) {
		all.opens += one.opens;
		all.execs += one.execs;
		all.connects += one.connects;
		if (one.elapsed_ns > all.elapsed_ns)
			all.elapsed_ns = one.elapsed_ns;
	}
	int status, failed = 0;
	while (wait(&status) > 0)
		failed |= status;
	if (failed)
		return 1;
	struct rusage u;
	getrusage(RUSAGE_CHILDREN, &u);
	char part[512], result[512];
	snprintf(part, sizeof(part), "%s/part-%s", argv[1], argv[2]);
	snprintf(result, sizeof(result), "%s/result-%s", argv[1], argv[2]);
	FILE *f = fopen(part, "w");
	if (!f)
		fail(part);
	fprintf(f, "%ld %ld %ld %ld %ld\n", all.opens, all.execs, all.connects, all.elapsed_ns,
		(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000L + u.ru_utime.tv_usec + u.ru_stime.tv_usec);
	fclose(f);
	return rename(part, result) != 0;
}
