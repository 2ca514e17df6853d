"""Programs and libraries for the tests of watched functions, and what nm says of them."""

from __future__ import annotations

import select
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stella_collector.kernel import Kernel
from stella_shared.events import FunctionCall

#: For each line of its input: each of argv[2] threads calls `first` argv[1] times, then one calls `second` once.
CALLER = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((noinline)) int first(int n) { __asm__ volatile(""); return n + 1; }
__attribute__((noinline)) int second(int n) { __asm__ volatile(""); return n * 2; }
static int times;
static void *work(void *ignored)
{
	for (int i = 0; i < times; i++)
		first(i);
	return NULL;
}
int main(int argc, char **argv)
{
	int threads = argc > 2 ? atoi(argv[2]) : 1;
	char line[16];
	times = atoi(argv[1]);
	while (fgets(line, sizeof(line), stdin)) {
		pthread_t ids[64];
		for (int i = 1; i < threads; i++)
			pthread_create(&ids[i], NULL, work, NULL);
		work(NULL);
		for (int i = 1; i < threads; i++)
			pthread_join(ids[i], NULL);
		second(1);
		puts("done");
		fflush(stdout);
	}
	return 0;
}
"""


def compiled(folder: Path, name: str, source: str, *options: str, compiler: str = "gcc") -> Path:
    """Compile a program and return it."""
    suffix = ".cc" if compiler == "g++" else ".c"
    (folder / f"{name}{suffix}").write_text(source)
    program = folder / name
    subprocess.run([compiler, "-O1", "-g0", "-o", program, folder / f"{name}{suffix}", *options], check=True)
    return program


def offset_of(path: Path, symbol: str) -> int:
    """Return the file offset of a symbol, out of what nm and readelf say."""
    rows = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.splitlines()
    (address,) = [int(row.split()[0], 16) for row in rows if row.split()[-1] == symbol and len(row.split()) == 3]
    loads = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout.splitlines()
    for row in loads:
        fields = row.split()
        if fields[:1] == ["LOAD"]:
            offset, start, size = int(fields[1], 16), int(fields[2], 16), int(fields[4], 16)
            if start <= address < start + size:
                return address - start + offset
    raise AssertionError(f"{symbol} is not loaded")


def build_id_of(path: Path) -> str:
    """Return the build-id as readelf has it."""
    said = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True).stdout
    return said.partition("Build ID: ")[2].split()[0]


def entry(binary: str | Path, *functions: str, **more: Any) -> dict[str, Any]:
    """Return one entry of the configuration."""
    return {"binary": str(binary), "functions": list(functions), **more}


def calls(events: list[FunctionCall]) -> Counter[str]:
    """Return how often each function was called."""
    found: Counter[str] = Counter()
    for event in events:
        found[event.symbol] += event.count or 1
    return found


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Holder(Protocol):
    """What has a kernel side."""

    kernel: Kernel


@contextmanager
def heeding(watch: Holder) -> Iterator[None]:
    """Look at notices as they come, as the collector does."""
    stop = threading.Event()

    def look() -> None:
        notices = watch.kernel.binaries.notices
        assert notices is not None
        while not stop.is_set():
            if select.select([notices.fd], [], [], 0.05)[0]:
                watch.kernel.binaries.look_at_notices()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
