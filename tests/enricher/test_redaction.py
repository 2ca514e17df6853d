"""Secrets in arguments: real command lines, planted secrets, hostile bytes, and redaction that fails."""

from __future__ import annotations

import re
import shlex
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_enricher import redaction, secret_words
from stella_enricher.redaction import MARK, REMEMBERED_MAX, Redactor
from stella_shared import kernel_records
from tests.enricher.command_lines import GITHUB, JWT, KEPT, PEM, REDACTED

SECRET = "Zq8-hunter2.Xy"


def run(argv: list[str], *, cut: bool = False, **options: object) -> list[str]:
    """Return a command line as it is recorded."""
    name = argv[0] if argv else "x"
    return Redactor(**options).redact(argv, f"/usr/bin/{name}", cut=cut).argv  # type: ignore[arg-type]


@pytest.mark.parametrize("line", REDACTED)
def test_secrets_are_taken_and_the_rest_stays(line: str) -> None:
    """Exactly what is marked becomes `***`, and the arguments that hold it are named."""
    marked = shlex.split(line)
    argv = [re.sub("[«»]", "", word) for word in marked]
    expected = [re.sub("«.*?»", MARK, word, flags=re.DOTALL) for word in marked]
    redactor = Redactor()
    redacted = redactor.redact(argv, f"/usr/bin/{argv[0]}")
    assert expected == redacted.argv
    assert [i for i, word in enumerate(marked) if "«" in word] == redacted.changed
    assert {"rule": len(redacted.changed), "pattern": 0, "failure": 0} == redactor.counts
    assert expected == redactor.redact(expected, f"/usr/bin/{argv[0]}").argv


@pytest.mark.parametrize("line", KEPT)
def test_what_is_no_secret_stays(line: str) -> None:
    """File names, switches, ports, users, variables of a shell and words that merely speak of secrets."""
    argv = shlex.split(line)
    assert argv == run(argv)


def test_the_table_is_large_enough() -> None:
    """It is what the rules are judged by."""
    assert len(REDACTED) >= 100
    assert len(KEPT) >= 60


def test_the_program_is_the_one_that_is_run() -> None:
    """By its file, by its name, behind its interpreter, as a script."""
    redactor = Redactor()
    for argv, filename, script in (
        (["mysql", "-pabc"], "/opt/weird-name", False),
        (["weird", "-pabc"], "/usr/bin/mysql", False),
        (["-mysql", "-pabc"], "/x", False),
        (["mysql", "/usr/bin/mysql", "-pabc"], "/usr/bin/mysql", False),
        (["/usr/bin/perl", "-w", "/usr/bin/mytop", "-pabc"], "/usr/bin/mytop", True),
        (["/usr/bin/perl", "./mytop", "-pabc"], "/usr/bin/mytop", True),
        (["python3.11", "/usr/bin/sshpass", "-pabc"], "/usr/bin/python3.11", False),
    ):
        assert "-p***" == redactor.redact(argv, filename, script=script).argv[-1]
    az = ["/usr/bin/python3", "/usr/bin/az", "login", "-u", "u", "-p", "abc"]
    assert [*az[:-1], MARK] == redactor.redact(az, "/usr/bin/az", script=True).argv
    twice = ["mysql", "-pabc", "/usr/bin/mysql"]
    assert ["mysql", "-p***", "/usr/bin/mysql"] == redactor.redact(twice, "/usr/bin/mysql").argv


@pytest.mark.parametrize(
    ("whole", "left"),
    [
        (["app", f"--password={SECRET}"], "--password=***"),
        (["app", "--password", SECRET], MARK),
        (["mysql", f"-p{SECRET}"], "-p***"),
        (["curl", "-u", f"user:{SECRET}"], "user:***"),
        (["app", f"https://user:{SECRET}"], "https://user:***"),
        (["app", GITHUB], MARK),
        (["app", JWT], MARK),
        (["app", f"x bearer {SECRET}"], "x bearer ***"),
        (["curl", "-H", f"Authorization: Bearer {SECRET}"], "Authorization: Bearer ***"),
        (["app", re.sub("[«»]", "", PEM)[:38]], "-----BEGIN RSA " + "PRIVATE KEY-----***"),
        (["mysql", "-e", f"set password = '{SECRET}"], "set password = '***"),
        (["sh", "-c", f"app --password '{SECRET}"], "app --password ***"),
        (["curl", "-d", f'{{"password":"{SECRET}'], '{"password":"***'),
    ],
)
def test_a_secret_that_is_cut_off_is_still_taken(whole: list[str], left: str) -> None:
    """Wherever the kernel's copy of the arguments ends in it, what is there of the secret does not show."""
    assert left == run(whole, cut=True)[-1]
    text = whole[-1]
    for end in range(len(text) - 5, len(text)):
        assert left == run([*whole[:-1], text[:end]], cut=True)[-1].replace(
            "'***", "***" if whole[0] == "sh" else "'***"
        )


#: Where a secret may stand: `{}`.  One row for each rule.
PLACES = [
    ["app", "--password={}"], ["app", "--db-password", "{}"], ["app", "-token={}"], ["env", "X_SECRET={}", "app"],
    ["mysql", "-p{}"], ["mysqldump", "-p", "{}"], ["curl", "-u", "user:{}"], ["curl", "-uuser:{}"],
    ["app", "--user", "u:{}x"], ["curl", "-H", "X-Api-Key: {}"], ["curl", "-H", "Authorization: Bearer {}"],
    ["curl", "-H", "Authorization: {}"], ["curl", "-b", "a={}"], ["curl", "-d", '{{"password": "{}"}}'],
    ["app", "https://user:{}@example.com/x"], ["app", "https://example.com/x?token={}&y=1"],
    ["app", "https://example.com/x?y=1&password={}"], ["sshpass", "-p", "{}", "ssh", "h"],
    ["openssl", "rsa", "-passin", "pass:{}"], ["docker", "login", "-p", "{}"], ["az", "login", "-p", "{}"],
    ["redis-cli", "-a", "{}"], ["ldapsearch", "-w", "{}"], ["smbclient", "-U", "u%{}"], ["lftp", "-u", "u,{}"],
    ["7z", "x", "-p{}"], ["sqlplus", "scott/{}@db"], ["nmcli", "c", "password", "{}"],
    ["aws", "configure", "set", "aws_secret_access_key", "{}"], ["vault", "login", "{}"], ["xfreerdp", "/p:{}"],
    ["mysqlsh", "--uri", "u:{}@h:3306"], ["htpasswd", "-b", "f", "u", "{}"], ["ssh-keygen", "-N", "{}"],
    ["ssh", "-o", "ProxyCommand=sshpass -p {} ssh x", "h"], ["docker-compose", "exec", "db", "mysql", "-p{}"],
    ["kubectl", "create", "secret", "generic", "s", "--from-literal=k={}"], ["sudo", "-u", "root", "mysql", "-p{}"],
    ["docker", "exec", "-it", "db", "mysql", "-p{}"], ["find", ".", "-exec", "mysql", "-p{}", ";"],
    ["ssh", "h", "mysql -p{} db"], ["sh", "-c", "app --password {} --x"], ["sh", "-c", "X_TOKEN={} app"],
    ["sh", "-c", "app --password='{}'"], ["sh", "-c", 'mysql -u root -p"{}" db'],
    ["bash", "-c", "true && sudo mysql -p{}; true"], ["mysql", "-e", "CREATE USER u IDENTIFIED BY '{}'"],
    ["psql", "-c", "ALTER ROLE u PASSWORD '{}'"], ["app", "machine h login u password {}"],
    ["app", "Server=h;Pwd={};X=1"], ["mount", "-o", "user=u,password={},x"],
    ["python3", "-c", "f(password='{}', x=1)"],
]  # fmt: skip
#: Letters of a secret that no quoting and no URL has a use for; what these end at is in the table of real lines.
SECRETS = st.from_regex(r"Zq[A-Za-z0-9._~!-]{6,40}7", fullmatch=True)


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
@settings(max_examples=20, deadline=None)
@given(secret=SECRETS, before=st.lists(st.sampled_from(["x", "--verbose", "-v", "a b", "é"]), max_size=2))
def test_a_planted_secret_never_shows(place: list[str], secret: str, before: list[str]) -> None:
    """For each rule, any secret: not a piece of it is left, redacting again changes nothing, and the rest is there."""
    argv = [word.replace("{{", "{").replace("}}", "}").replace("{}", secret) for word in place]
    if before and argv[0] in ("app", "curl"):
        argv[1:1] = ["--", *before]
    redactor = Redactor()
    redacted = redactor.redact(argv, f"/usr/bin/{argv[0]}")
    assert secret[:-1] not in " ".join(redacted.argv)
    assert secret[2:] not in " ".join(redacted.argv)
    assert redacted.changed
    assert len(argv) == len(redacted.argv)
    again = Redactor().redact(redacted.argv, f"/usr/bin/{argv[0]}")
    assert (redacted.argv, []) == (again.argv, again.changed)


#: Pieces that rules begin at, in any order, and anything between them.
PIECES = st.sampled_from(
    [
        "--password", "=", "'", '"', "\\", " ", "://", ":", "@", "/", "token", "-p", "sh", "-c", "mysql", "curl",
        "-u", "***", "*", "&", ";", "$", "(", "bearer ", "Authorization: ", "password=",
        "-----BEGIN PRIVATE KEY-----", "eyJ", "\n", "?", "identified by '", "login a password ", "ghp_", "docker",
        "run", "exec", "sudo", "--", "%", ",", "{", "SECRET_KEY=",
    ]
)  # fmt: skip
HOSTILE = st.lists(
    st.one_of(
        st.lists(PIECES, max_size=8).map("".join),
        st.binary(max_size=40).map(kernel_records.text),
        st.text(max_size=20),
    ),
    max_size=8,
)


@settings(max_examples=600, deadline=None)
@given(
    argv=HOSTILE, cut=st.booleans(), program=st.sampled_from(["sh", "mysql", "curl", "docker", "app", "sqlplus", ""])
)
def test_anything_is_redacted_once_and_for_all(argv: list[str], cut: bool, program: str) -> None:
    """Hostile text: no exception, a text of at most three times the length, and the second time nothing changes."""
    words = [program, *argv]
    redactor = Redactor()
    redacted = redactor.redact(words, program, cut=cut)
    assert len(words) == len(redacted.argv)
    for i, (before, after) in enumerate(zip(words, redacted.argv, strict=True)):
        assert len(after) <= 3 * max(len(before), 1)
        assert (i in redacted.changed) == (before != after)
    again = Redactor().redact(redacted.argv, program, cut=cut)
    assert (redacted.argv, []) == (again.argv, again.changed)
    assert redacted == redactor.redact(words, program, cut=cut)


@pytest.mark.parametrize(
    "piece",
    [
        "://", "://a:", "a:b@", "password=", "password", "pass", "-", "\"", "'", "\\", "\\'", "x ", "' ", "\" ",
        "eyJ", "eyJaaaaaa.", "sk-", "sk-A", "ghp_", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "authorization:",
        "authorization: x ", "bearer ", "?key=", "identified by ", "identified by 'x ", "login x password ",
        "login ", "=", "_", "A=", ";", "&x", "$(", "sh -c '", "\\xff", "sudo ", "docker run ", "-exec mysql ", "a/",
        "/a", "sig=", "token: ", "token:", "secret ", "    ", "\t", "0", "0:AA", "[", "--user a:b ", "cookie='",
        "\"password\" ", "a\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("program", ["app", "sh"])
def test_no_text_is_slow(piece: str, program: str) -> None:
    """The longest command line the kernel hands over, all of one piece: a fraction of a second, not minutes."""
    text = (piece * 8192)[:8192]
    spent = []
    for argv in (
        [program, "-c", text],
        [program, *([piece] * 1000)],
        [program, "-c", f"{text} --password x mysql -px"],
    ):
        begin = time.process_time()
        run(argv, cut=True)
        spent.append(time.process_time() - begin)
    assert max(spent) < 1.0


def test_own_patterns_are_added() -> None:
    """The group `secret` is replaced, else the match; an empty group is nothing; a flood takes the argument whole."""
    patterns = [r"(?i)badge-(?P<secret>[0-9]+)", r"INTERNAL[A-Z]+", r"z(?P<secret>)y", "z"]
    redactor = Redactor(patterns)
    argv = ["app", "Badge-123 badge-x", "xINTERNALKEYx", "plain", "z" * 64, "z " * 65, f"--password={SECRET}"]
    redacted = redactor.redact(argv, "/bin/app")
    assert ["app", "Badge-*** badge-x", "x***x", "plain", MARK, MARK, "--password=***"] == redacted.argv
    assert [1, 2, 4, 5, 6] == redacted.changed
    assert {"rule": 1, "pattern": 4, "failure": 0} == redactor.counts
    assert re.fullmatch(r"1\+[0-9a-f]{12}", redactor.version)
    assert "1" == Redactor().version
    assert "off" == Redactor(patterns, enabled=False).version


def test_an_own_pattern_cannot_be_made_slow() -> None:
    """What kills a backtracking engine takes its time in proportion to the text."""
    redactor = Redactor([r"(x+x+)+y", r"(a|a)*b", r"a(.*b)?", r"(?P<secret>\w+\s?)+$"])
    begin = time.process_time()
    for text in ("x" * 8192, "a" * 8192, "a " * 4096):
        redactor.redact(["app", text], "/bin/app")
    assert time.process_time() - begin < 1.0


def test_kept_programs_and_redaction_that_is_off() -> None:
    """`keep` goes by the file's name alone; switched off nothing changes."""
    argv = ["mysql", "-pabc", "--password=x"]
    assert argv == Redactor(["x"], ["mysql"]).redact(argv, "/usr/bin/mysql").argv
    assert ["mysql", "-p***", "--password=***"] == Redactor([], ["mysql"]).redact(argv, "/usr/bin/other").argv
    assert argv == Redactor(enabled=False).redact(argv, "/usr/bin/mysql").argv


def test_redaction_that_fails_lets_nothing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument becomes `***` whole and is counted, and so does the next one, whose meaning it may have told."""

    def break_at(text: str, **options: object) -> list[tuple[int, int]]:
        if "boom" in text:
            raise RuntimeError("x")
        return []

    monkeypatch.setattr(secret_words, "spans_of", break_at)
    redactor = Redactor()
    argv = ["app", "a", "secret boom", "b", "--password", "c", "d"]
    redacted = redactor.redact(argv, "/bin/app")
    assert ["app", "a", MARK, MARK, "--password", MARK, "d"] == redacted.argv
    assert [2, 3, 5] == redacted.changed
    assert {"rule": 1, "pattern": 0, "failure": 2} == redactor.counts
    assert {"rule": 2, "pattern": 0, "failure": 4} == (redactor.redact(argv, "/bin/app"), redactor.counts)[1]


def test_a_failure_of_the_whole_takes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no single argument is to blame, and where a pattern fails."""

    class Broken:
        def spans(self, text: str, most: int) -> list[tuple[int, int]]:
            raise ValueError(text)

    redactor = Redactor()
    redactor._patterns = [Broken()]  # type: ignore[list-item]
    assert [MARK, MARK] == redactor.redact(["app", "x"], "/bin/app").argv
    assert 2 == redactor.counts["failure"]

    def refuse(*_: object, **__: object) -> None:
        raise RecursionError

    monkeypatch.setattr(redaction, "spans_of_words", refuse)
    redactor = Redactor()
    assert [MARK] * 3 == redactor.redact(["app", "--token", "x"], "/bin/app").argv
    assert 3 == redactor.counts["failure"]


def test_a_redaction_that_does_not_settle_takes_the_argument_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that would change each time it is redacted does not stay."""
    monkeypatch.setattr(secret_words, "spans_of", lambda text, **_: [] if text == MARK else [(0, 1)])
    redactor = Redactor()
    redacted = redactor.redact(["ab", "--token", "abcdefgh"], "/bin/app")
    assert [MARK, MARK, MARK] == redacted.argv
    assert redactor.counts["failure"]


def test_memory_is_bounded() -> None:
    """Ever new command lines do not fill it."""
    redactor = Redactor()
    for i in range(REMEMBERED_MAX + 10):
        redactor.redact(["app", "--password", str(i)], "/bin/app")
    assert 10 == len(redactor._remembered)
    assert REMEMBERED_MAX + 10 == redactor.counts["rule"]
    small = Redactor(max_bytes=100_000)
    for i in range(200):
        assert MARK == small.redact(["app", "x" * 1500, "--password", str(i)], "/bin/app").argv[-1]
        assert 0 < small.stats()["bytes"] <= 100_000
    before = small.stats()
    assert MARK == small.redact(["app", "x" * 60_000, "--password", "y"], "/bin/app").argv[-1]
    assert small.stats()["bytes"] <= before["bytes"]
