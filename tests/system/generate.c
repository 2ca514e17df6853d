/* SPDX-License-Identifier: Apache-2.0 */
/*
 * generate FOLDER COUNT RATE FILES: waits for one byte on standard input, then opens and closes COUNT times,
 * RATE a second (0: as fast as it goes), in turn over FILES files of FOLDER. Exactly COUNT openat calls are
 * made after that byte, and none by anybody else in this process.
 * Prints: elapsed_ns user_us system_us
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	long count = atol(argv[2]), files = atol(argv[4]);
	double rate = atof(argv[3]), owed = 0;
	char(*path)[256] = calloc(files, sizeof(*path));
	for (long i = 0; i < files; i++) {
		snprintf(path[i], sizeof(*path), "%s/libmodule-%06ld.so.1", argv[1], i);
		int fd = open(path[i], O_CREAT | O_RDONLY, 0644);
		if (fd < 0)
			return 1;
		close(fd);
	}
	char go;
	puts("ready");
	fflush(stdout);
	if (read(0, &go, 1) != 1)
		return 1;
	long start = now(), next = start, done = 0;
	while (done < count) {
		long burst = count - done;
		if (rate > 0) {
			owed += rate / 1000;
			if (burst > (long)owed)
				burst = (long)owed;
			owed -= burst;
		}
		for (long i = 0; i < burst; i++)
			close(openat(AT_FDCWD, path[(done + i) % files], O_RDONLY));
		done += burst;
		if (rate > 0) {
			next += 1000000;
			struct timespec t = { next / 1000000000L, next % 1000000000L };
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
		}
	}
	long elapsed = now() - start;
	struct rusage u;
	getrusage(RUSAGE_SELF, &u);
	printf("%ld %ld %ld\n", elapsed, u.ru_utime.tv_sec * 1000000L + u.ru_utime.tv_usec,
	       u.ru_stime.tv_sec * 1000000L + u.ru_stime.tv_usec);
	return 0;
}
