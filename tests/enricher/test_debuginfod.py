"""debuginfod servers: asked only when configured, bounded, and believed only about the build-id."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from stella_enricher.symbols import debuginfod
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.resolver import Resolver
from tests.enricher import symbol_oracles as oracle
from tests.enricher.test_symbols import C_SOURCE, build, strip_into, symbol_of


@contextmanager
def server(files: dict[str, bytes], *, endless: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Give the URL of a server with these files by path, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            try:
                while data:
                    self.wfile.write(data)
                    if not endless:
                        break
            except OSError:
                pass  # the reader has seen enough

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/", asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def resolver(*urls: str, **more: object) -> Resolver:
    """Return a resolver that asks these servers."""
    return Resolver(
        Finder([]), None, max_answers=10, max_table_bytes=1 << 24,
        fetch=partial(debuginfod.fetch, list(urls), **more) if urls else None,  # type: ignore[arg-type]
    )  # fmt: skip


def test_program_and_debug_file_come_from_a_server(tmp_path: Path) -> None:
    """Nothing is on this machine: both files are fetched by build-id, from the first server that has them."""
    program = build(tmp_path, C_SOURCE, "gcc", "-g")
    whole = tmp_path / "whole"
    whole.write_bytes(program.read_bytes())
    build_id = oracle.build_id(program)
    strip_into(program, tmp_path / "debug")
    place = f"/buildid/{build_id}"
    files = {f"{place}/executable": program.read_bytes(), f"{place}/debuginfo": (tmp_path / "debug").read_bytes()}
    with server({}) as (empty, asked_first), server(files) as (url, asked):
        r = resolver("http://127.0.0.1:1/", empty, url)
        assert "" == r.load(build_id)
        frame = symbol_of(whole, "local_one", r)
        assert ("local_one", "debug_file:symtab") == (frame.symbol, frame.symbol_source)
        assert [f"{place}/executable", f"{place}/debuginfo"] == asked == asked_first
        assert "no_file" == resolver().load(build_id)
        assert 2 == len(asked)


def test_another_file_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    """What a server sends has to carry the build-id itself."""
    program = build(tmp_path, C_SOURCE, "gcc")
    with server({f"/buildid/{'ab' * 20}/executable": program.read_bytes()}) as (url, _):
        assert "build_id_mismatch" == resolver(url).load("ab" * 20)


def test_a_server_that_never_ends_is_left(tmp_path: Path) -> None:
    """Bounded in bytes and in time."""
    with server({f"/buildid/{'ab' * 20}/executable": b"x" * 65536}, endless=True) as (url, _):
        assert "no_file" == resolver(url, bytes_max=1 << 20).load("ab" * 20)
        assert "no_file" == resolver(url, seconds_max=0.2).load("ab" * 20)
