/* SPDX-License-Identifier: Apache-2.0 */
/*
 * storm PROGRAMS COUNT: waits for a line on standard input, then runs COUNT programs, one after the other: those that
 * PROGRAMS names, a path a line, in turn. Each starts in the next of the cgroups whose cgroup.procs files are the
 * further lines behind an empty one, and has arguments that no other has, as many as the kernel's record takes.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 16384
static char *programs[MOST];
static int cgroups[MOST];

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	FILE *list = fopen(argv[1], "r");
	char line[4096];
	int programs_count = 0, cgroups_count = 0, behind = 0;
	while (list && fgets(line, sizeof(line), list)) {
		line[strcspn(line, "\n")] = 0;
		if (!*line) {
			behind = 1;
			continue;
		}
		if (behind) {
			int fd = open(line, O_WRONLY | O_CLOEXEC);
			if (fd < 0 || cgroups_count == MOST)
				return 1;
			cgroups[cgroups_count++] = fd;
		} else if (programs_count < MOST) {
			programs[programs_count++] = strdup(line);
		}
	}
	if (!programs_count || !cgroups_count)
		return 1;
	puts("ready");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	static char number[32], filler[1990];
	memset(filler, 'x', sizeof(filler) - 1);
	for (long i = 0, count = atol(argv[2]); i < count; i++) {
		char *program = programs[i % programs_count];
		char *words[] = { program, number, filler, NULL }, *none[] = { NULL };
		snprintf(number, sizeof(number), "%ld", i);
		pid_t child = vfork();
		if (child < 0)
			return 1;
		if (!child) {
			if (write(cgroups[i % cgroups_count], "0", 1) == 1)
				execve(program, words, none);
			_exit(127);
		}
		int status;
		if (waitpid(child, &status, 0) != child || status)
			return 1;
	}
	puts("done");
	return 0;
}
