"""The command's pure parts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stella_cli import asking, caches, event_rows, failure, process, service_log
from stella_cli.console import printable
from stella_cli.service_log import ServiceLog, parse
from stella_shared.errors import NotFound


def row(event: dict[str, object], **record: object) -> str:
    line = {"ts_ns": 0, "event": event, "pid": 7, "comm": "cat", **record}
    return event_rows.row(json.dumps(line).encode(), 0)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"type": "file_open", "access": "read", "path": "/etc/passwd", "result": -2},
            "read /etc/passwd → ENOENT",
        ),
        ({"type": "file_open", "access": "read", "path": "/etc/passwd", "result": 3}, "read /etc/passwd → 3"),
        ({"type": "process_exec", "filename": "/bin/ls", "argv": ["ls", "-l"]}, "/bin/ls -l"),
        (
            {"type": "net_connect", "direction": "connect", "address": "::1", "port": 443, "result": 0},
            "connect [::1]:443 → 0",
        ),
        (
            {"type": "net_connect", "direction": "accept", "address": "/run/x", "result": 4},
            "accept /run/x → 4",
        ),
        (
            {"type": "ssl_op", "direction": "read", "bytes": 5, "library": "/l/libssl.so.3"},
            "read 5 bytes, /l/libssl.so.3",
        ),
        (
            {"type": "function_call", "symbol": "EVP_DigestInit", "binary": "/l/libcrypto.so.3", "count": 7},
            "EVP_DigestInit ×7 in /l/libcrypto.so.3",
        ),
        (
            {
                "type": "function_call",
                "symbol": "first",
                "binary": "/bin/x",
                "stack": [{"symbol": "first"}, {"symbol": "main"}, {"build_id": "ab" * 20, "offset": 16}],
            },
            "first in /bin/x ← main ← abababab+0x10",
        ),
        (
            {
                "type": "tcp_state",
                "source_address": "10.0.0.1",
                "source_port": 1,
                "destination_address": "10.0.0.2",
                "destination_port": 2,
                "old_state": "SYN_SENT",
                "new_state": "ESTABLISHED",
            },
            "10.0.0.1:1 → 10.0.0.2:2 SYN_SENT → ESTABLISHED",
        ),
    ],
)
def test_a_row_says_what_happened(event: dict[str, object], words: str) -> None:
    """Each event type has its own short form."""
    assert row(event).endswith(words)


@given(st.binary(max_size=200))
def test_any_bytes_become_one_printable_row(line: bytes) -> None:
    """A line that is no evidence is shown, and cannot drive the terminal."""
    assert event_rows.row(line, 0).isprintable()


@given(st.text(max_size=50), st.text(max_size=50))
def test_no_file_name_drives_the_terminal(path: str, comm: str) -> None:
    """Escape sequences in a path or a name are made visible."""
    assert row({"type": "file_open", "access": "read", "path": path}, comm=comm).isprintable()
    assert printable(path).isprintable()


def test_log_lines_are_read_in_every_form() -> None:
    """JSON, text, nats-server's form, a service's last words."""
    assert (4, "ring full") == parse('{"at":"x","level":"warning","service":"c","message":"ring full"}')[:2]
    assert (3, "it broke") == parse("2026-01-28T02:30:48.000Z error   signer it broke")[:2]
    assert (4, "slow") == parse("[12] 2026/01/28 02:30:48.1 [WRN] slow")[:2]
    assert (3, "no key") == parse("Error: no key")[:2]
    assert (6, "hello") == parse("hello")[:2]
    assert 6 == parse('{"level": 3}').severity


def test_a_service_log_is_followed_bounded_and_asked_for_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only new lines are shown, half lines wait for their end, and a large file is moved aside."""
    monkeypatch.setattr(service_log, "MAX_BYTES", 100)
    path = tmp_path / "signer.log"
    path.write_text("old\n" * 40)
    log = ServiceLog(path)
    assert ("", 160) == (path.read_text(), len((tmp_path / "signer.log.1").read_bytes()))
    with path.open("a") as file:
        file.write("one\ntw")
        file.flush()
        assert ["one"] == [line.text for line in log.new_lines()]
        file.write("o\nError: no signing key\nHint: run init\nlast\n")
    assert ("no signing key", "run init") == log.last_words()
    assert ["two", "no signing key", "Hint: run init", "last"] == [line.text for line in log.new_lines()]
    assert [] == log.new_lines()


def test_a_process_is_known_by_its_start_too() -> None:
    """The same pid with another start time is somebody else."""
    me = process.identity(os.getpid())
    assert me is not None and process.is_alive(me)
    assert not process.is_alive(process.Identity(me.pid, me.start_ticks + 1))
    assert process.identity(2**22 + 1) is None
    assert process.rss_bytes(me.pid) > 1 << 20
    assert "python" in process.command_line(me.pid)[0]


def test_the_exposition_is_read_with_its_labels() -> None:
    """Name, labels and value of each sample; comments and nonsense are passed over."""
    text = '# HELP x y\nx{a="1",b="two words"} 3.5\ny 2\nnonsense\nz{a="{}"} NaN?\n'
    assert [("x", {"a": "1", "b": "two words"}, 3.5), ("y", {}, 2.0)] == list(asking.parse_exposition(text))


def test_a_group_of_errors_is_about_ours() -> None:
    """However deep it stands, and whatever else failed beside it."""
    ours = NotFound("gone")
    group = BaseExceptionGroup("", [ValueError("x"), BaseExceptionGroup("", [KeyError("y"), ours])])
    assert failure.leaf(group) is ours
    assert isinstance(failure.leaf(BaseExceptionGroup("", [ValueError("x")])), ValueError)


def test_status_names_targets_that_are_not_there() -> None:
    """A node that records nothing because its target is not there says so; one without targets says nothing."""
    there, absent = {"asked": "/a", "id": 7}, {"asked": "/b", "id": 0}
    for found, words in (([], ""), ([there], "1 of 1 found"), ([there, absent], "1 of 2 found; not there (yet): /b")):
        body = {"services": [{"service": "signer"}, {"service": "collector", "detail": {"targets": found}}]}
        assert words == asking.targets(body)


def test_caches_are_shown_with_bound_rate_and_reasons() -> None:
    """Each cache of each instance has a row; what is no cache is passed over."""
    said = {"entries": 3, "bytes": 1200, "max_bytes": 1 << 20, "hits": 9, "misses": 1, "reasons": {"cgroup_gone": 1}}
    detail = {"caches": {"containers": said, "symbols": {"entries": 0, "max_entries": 5}, "odd": 7}}
    body = {"services": [{"service": "signer"}, {"service": "enricher", "instance": "n-1", "detail": detail}]}
    containers, symbols = caches.found(body)
    assert (0.9, {"cgroup_gone": 1}, 1200) == (containers["hit_rate"], containers["reasons"], containers["bytes"])
    assert (None, {}, 5) == (symbols["hit_rate"], symbols["reasons"], symbols["max_entries"])
    assert ("1.0 MiB", "512 B", "2.0 GiB") == (caches.size(1 << 20), caches.size(512), caches.size(2 << 30))


def test_runtimes_are_shown_with_socket_state_and_failures() -> None:
    """A row for each socket that is asked."""
    runtime = {"runtime": "docker", "api": "docker", "socket": "/s", "state": "waiting", "reason": "runtime_timeout"}
    more = {"calls": 4, "failures": {"runtime_timeout": 2}, "last_answer_at": 0.0}
    body = {"services": [{"service": "enricher", "detail": {"runtimes": [runtime | more]}}]}
    expected = ["docker", "docker", "/s", "waiting", "never", "4", "2 runtime_timeout", "runtime_timeout"]
    assert [expected] == caches.runtimes(body)
