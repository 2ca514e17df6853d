"""Secrets that a command line shows by its words: options, and what comes behind them.  Pure.

A list of words is read as its program reads it: which program is it (behind `sudo`, `env`, `docker exec` and
their like it is the one that they start), which of its options take a secret, and is one of its words a script?
A script is taken apart into words the way a shell does, and read the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from stella_enricher.secret_text import SWITCH, Span, is_secret_name, is_secret_value, spans_of

#: A script in a script in a script: deeper ones are looked at as text only.
DEPTH_MAX: Final = 3
#: `7z -px`: no shorter text has a word that only its place makes a secret.
SCRIPT_LEAST: Final = 6

# ---- programs that start programs ------------------------------------------------------------------------------

#: name → (words before the command, short options with a value, long options with a value).
_WRAPPERS: Final[dict[str, tuple[int, str, frozenset[str]]]] = {
    name: (skip, short, frozenset(long.split()))
    for names, skip, short, long in (
        ("sudo", 0, "CDghpRrTtUu", "user group host prompt chdir chroot role type command-timeout other-user"),
        ("doas", 0, "Cu", ""),
        ("env", 0, "uSC", "unset chdir"),
        ("nice", 0, "n", "adjustment"),
        ("ionice", 0, "cn", "class classdata"),
        ("nohup setsid unbuffer tini dumb-init catatonit busybox toybox exec command", 0, "", ""),
        ("xvfb-run torsocks unshare", 0, "", ""),
        ("time", 0, "fo", "format output"),
        ("stdbuf", 0, "ioe", "input output error"),
        ("timeout", 1, "ks", "kill-after signal"),
        ("taskset chrt chroot gosu su-exec s6-setuidgid faketime", 1, "", ""),
        ("flock", 1, "wE", "timeout wait conflict-exit-code"),
        ("xargs", 0, "adEIiLlnPs", "arg-file delimiter max-lines max-args max-procs"),
        ("watch", 0, "nq", "interval"),
        ("strace ltrace", 0, "abeEIoOpPsSuUX", ""),
        ("nsenter", 0, "tSG", "target"),
        ("setpriv", 0, "", "reuid regid groups"),
        ("systemd-run", 0, "HMpuEt", "unit property setenv uid gid slice description machine"),
        ("sshpass", 0, "pPdfe", ""),
        ("ssh", 1, "BbcDEeFIiJLlmOopQRSWw", ""),
        ("python perl ruby node php", 0, "cmWXeEr", ""),
        ("sh bash dash ash zsh ksh fish", 0, "oOc", "rcfile init-file"),
    )
    for name in names.split()
}  # fmt: skip
_CONTAINERS: Final = frozenset({"docker", "podman", "nerdctl", "docker-compose", "podman-compose"})
#: Their options that take no value of their own; every other one does.
_CONTAINER_SWITCHES: Final = frozenset(
    [
        "-d",
        "-i",
        "-t",
        "-P",
        "-q",
        "--detach",
        "--interactive",
        "--tty",
        "--rm",
        "--privileged",
        "--init",
        "--read-only",
        "--publish-all",
        "--quiet",
        "--help",
        "--no-healthcheck",
        "--oom-kill-disable",
        "--sig-proxy",
        "--no-TTY",
        "-T",
        "--no-deps",
        "--debug",
        "-D",
        "--tls",
        "--tlsverify",
    ]
)
_SHELLS: Final = frozenset(["sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "su", "runuser", "script"])
_SCRIPT_OPTION: Final = re.compile(r"-[A-Za-z]*c|--command|--session-command")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=", re.ASCII)
_KEYWORDS: Final = frozenset(
    [
        "if",
        "then",
        "else",
        "elif",
        "while",
        "until",
        "do",
        "!",
        "{",
        "export",
        "local",
        "declare",
        "readonly",
        "typeset",
        "eval",
    ]
)
_STARTS: Final = frozenset({"-exec", "-execdir", "-ok", "--"})


def program_name(word: str) -> str:
    """Return a program's name without its folder, a login shell's dash and a version (`python3.11`)."""
    name = word.rpartition("/")[2].lstrip("-").strip("\"'")
    return re.sub(r"(?<=python)[0-9.]+\Z", "", name)


def _command_at(words: Sequence[str], at: int, program: str) -> int:
    """Return where the command begins that `program`, whose own words begin at `at`, starts."""
    if program in _CONTAINERS:
        return _container_command_at(words, at)
    skip, short, long = _WRAPPERS[program]
    while at < len(words):
        word = words[at]
        if word == "--":
            return at + 1 + skip
        if word.startswith("--"):
            at += 2 if word[2:] in long else 1
        elif word.startswith("-") and len(word) > 1:
            at += 2 if word[-1] in short and not any(c in short for c in word[1:-1]) else 1
        elif _ASSIGNMENT.match(word):
            at += 1
        elif skip:
            skip -= 1
            at += 1
        else:
            return at
    return at


def _container_command_at(words: Sequence[str], at: int) -> int:
    verbs = 0
    while at < len(words):
        word = words[at]
        if word.startswith("-"):
            boolean = "=" in word or word in _CONTAINER_SWITCHES or re.fullmatch(r"-[dit]+", word)
            at += 1 if boolean else 2
        elif verbs and words[verbs] in ("run", "exec"):
            return at + 1  # behind the image's or the container's name
        elif word in ("run", "exec", "compose", "container"):
            verbs = at
            at += 1
        else:
            return len(words)
    return at


# ---- options that take a secret --------------------------------------------------------------------------------

#: How a value holds the secret: all of it; all of it, but only in the option's own word; behind its first `:`,
#: `%`, `,` or `=`; `pass:…`; `user/…@db`; a cookie rather than the name of a file with cookies.
_ALL, _ATTACHED, _COLON, _PERCENT, _COMMA, _EQUALS = "all", "attached", ":", "%", ",", "="
_PASS, _SLASH, _COOKIE = "pass", "user/…", "cookie"
_Options = dict[str, str]


def _table(*rows: tuple[str, str, str]) -> dict[str, _Options]:
    found: dict[str, _Options] = {}
    for names, options, kind in rows:
        for name in names.split(","):
            found.setdefault(name.strip(), {}).update(dict.fromkeys(options.split() or [""], kind))
    return found


#: Program, or program and verb → options → kind.  The option "" stands for words that are no options.
_OPTIONS: Final = _table(
    ("mysql, mariadb, pt-, mytop, mydumper, myloader, xtrabackup, innobackupex", "-p", _ALL),
    ("curl", "-u --user -U --proxy-user -E --cert --proxy-cert", _COLON),
    ("curl", "-b --cookie", _COOKIE),
    ("curl", "--proxy-pass", _ALL),
    ("http, https, xh, xhs", "-a --auth", _COLON),
    ("ab", "-A -P", _COLON),
    ("siege, lftp, open", "-u --user", _COMMA),
    ("sshpass, rdesktop, cqlsh, mongo, twine, ncftp, ncftpput, ncftpget, ncftpls", "-p", _ALL),
    ("ssh-keygen", "-N -P", _ALL),
    ("plink, pscp, psftp, putty, nodetool", "-pw", _ALL),
    ("openssl", "-pass -passin -passout -password", _PASS),
    ("openssl", "-k -K -hmac -psk", _ALL),
    ("docker login, podman login, nerdctl login, buildah login, skopeo login, oras login, crane login", "-p", _ALL),
    ("helm login, az login, oc login, cf login, ibmcloud login", "-p", _ALL),
    ("redis-cli", "-a", _ALL),
    ("ldap", "-w", _ALL),
    ("ldappasswd", "-w -a -s", _ALL),
    ("smbclient, rpcclient, net, smbget, winexe", "-U --user", _PERCENT),
    ("sqlcmd, bcp, tsql, zip, unzip, zipcloak, mosquitto_pub, mosquitto_sub, mosquitto_rr, ipmitool", "-P", _ALL),
    ("7z, 7za, 7zr, 7zz, rar, unrar", "-p -hp", _ATTACHED),
    ("useradd, usermod", "-p", _ALL),
    ("snmp", "-A -X -c", _ALL),
    ("evil-winrm, hydra, netexec, crackmapexec", "-p", _ALL),
    ("xfreerdp, xfreerdp3, wlfreerdp", "/p /gp", _ATTACHED),
    ("sqlplus, sqlldr, expdp, impdp, exp, imp, rman, sqlcl", "", _SLASH),
    ("doctl init", "-t", _ALL),
    ("gh secret", "-b --body", _ALL),
)
#: Program, or program and verb, whose last word is the secret; some only with an option that has this letter.
_LAST: Final[dict[str, str]] = {
    **dict.fromkeys(("vault login", "vault unseal", "rclone obscure", "wpa_passphrase", "openssl passwd"), ""),
    **dict.fromkeys(("rabbitmqctl add_user", "rabbitmqctl change_password"), ""),
    **dict.fromkeys(("htpasswd", "mosquitto_passwd"), "b"),
}
_REDIRECTION: Final = re.compile(r"[0-9]?[<>]")
#: Rows that hold for every program whose name begins so.
_FAMILIES: Final = ("mysql", "mariadb", "pt-", "ldap", "snmp", "mongo")
#: Programs whose options of one letter do not go on in the same word (`openssl -keyout`).
_EXACT: Final = frozenset({"openssl", "redis-cli", "lftp", "net"})
#: Words without a dash of which the next one is the secret.
_BARE: Final[dict[str, frozenset[str]]] = {
    "nmcli": frozenset(["password", "wifi-sec.psk", "802-11-wireless-security.psk", "wifi-sec.wep-key0"]),
    "redis-cli": frozenset({"auth", "requirepass", "masterauth"}),
}
#: `aws configure set aws_secret_access_key x`: programs that are told the name of a setting, then its value.
_SETTERS: Final = frozenset(
    ["aws", "git", "npm", "pnpm", "yarn", "pip", "pip3", "gcloud", "poetry", "rclone", "composer", "heroku", "wp"]
)
_VERBED: Final = frozenset(name.split()[0] for name in (*_OPTIONS, *_LAST) if " " in name)
_USERS: Final = frozenset({"--user", "--auth", "--basic-auth", "--proxy-user", "--credentials", "--creds"})
_CURL_SWITCHES: Final = re.compile(r"-[#aBfgGiIjJkLnNOpqRsSvZ0-9]+[uU]")
_LIKE_AN_OPTION: Final = re.compile(r"--[A-Za-z]|-[A-Za-z]\Z")
_PLAIN_NAME: Final = re.compile(r"[\w.:/@\[\]-]+")


def _options_of(program: str) -> _Options:
    found = _OPTIONS.get(program)
    if found is None:
        found = next((_OPTIONS[stem] for stem in _FAMILIES if program.startswith(stem)), {})
    return found


def has_rules(program: str) -> bool:
    """Return whether the words of a program can hold secrets that no word shows by itself."""
    return (
        program in _WRAPPERS
        or program in _CONTAINERS
        or program in _SHELLS
        or program in _VERBED
        or program in _BARE
        or program in _SETTERS
        or program in _LAST
        or bool(_options_of(program))
    )


def _inner(word: str, begin: int, end: int) -> Span:
    """Return the place of a text without the quotes around it, and without what a programming language puts behind."""
    if end - begin >= 3 and word[begin] in "\"'":
        last = word.rfind(word[begin], begin + 1, end)
        if last > 0 and not word[last + 1 : end].strip(",;)]}"):
            end = last + 1
    if end - begin >= 2 and word[begin] in "\"'" and word[end - 1] == word[begin]:
        return begin + 1, end - 1
    return begin, end


def _value(kind: str, name: str, word: str, place: Span, shell: bool) -> list[Span]:
    """Return the place of the secret in an option's value, which lies at `place` of `word`."""
    begin, end = place
    given = word[begin:end]
    begin, end = _inner(word, begin, end)
    value = word[begin:end]
    if kind in (_ALL, _ATTACHED):
        return [(begin, end)] if is_secret_value(name or "password", given, shell=shell) else []
    if kind == _PASS:
        return [(begin + 5, end)] if value.startswith("pass:") else []
    if kind == _COOKIE:
        return [(begin, end)] if "=" in value else []
    if kind == _SLASH:
        found = re.match(r"(?:userid=)?[^\s/@=-][^\s/@=]*/([^@]+)", value)
        return [(begin + found.start(1), begin + found.end(1))] if found else []
    before, separator, secret = value.partition(kind)
    known = not separator or not is_secret_value("password", secret, shell=shell)
    return [] if known else [(begin + len(before) + 1, end)]


# ---- words -----------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the words of one command line from left to right.

    `raw`: they are a script's, in their quotes, and the rules for texts have seen them already.
    """

    def __init__(self, words: Sequence[str], program: str, *, cut: bool, raw: bool, shell: bool, depth: int) -> None:
        self._words = words
        self._cut = cut
        self._raw = raw
        self._shell = shell
        self._depth = depth
        self._kind = ""  # what the last word said that this one is, and under which name
        self._name = ""
        self._begin(0, program)

    def _begin(self, at: int, program: str) -> None:
        self._program = program
        self._command = at
        self._options = _options_of(program)
        self._last = _LAST.get(program)
        self._end = -1  # where the program's own words end, when that is known
        self._nested = self._next_command(at + 1)
        self._kind = ""

    def _next_command(self, at: int) -> int:
        if self._program in _WRAPPERS or self._program in _CONTAINERS:
            return _command_at(self._words, at, self._program)
        for i in range(at, len(self._words) - 1):
            if self._words[i] in _STARTS and has_rules(program_name(self._words[i + 1])):
                return i + 1
        return -1

    def read(self, i: int) -> list[Span]:
        """Return the secrets of word `i`; to be called for each word in turn."""
        word = self._words[i]
        if i == self._nested:
            self._begin(i, program_name(word))
        elif self._program in _VERBED:
            self._options = _OPTIONS.get(f"{self._program} {word}", self._options)
            self._last = _LAST.get(f"{self._program} {word}", self._last)
        command = i == self._command
        script = not command and self._program in _SHELLS and bool(_SCRIPT_OPTION.fullmatch(self._words[i - 1]))
        kind, name, self._kind, self._name = self._kind, self._name, "", ""
        found: list[Span] = []
        begin, end = _inner(word, 0, len(word)) if self._raw else (0, len(word))
        if kind and not _LIKE_AN_OPTION.match(word, begin, end):
            found += _value(kind, name, word, (0, len(word)), self._shell)
        elif not command and not script:
            found += self._option(i, word, begin, end)
        if not self._raw:
            found += spans_of(word, cut=self._cut and i == len(self._words) - 1, shell=script)
        if self._depth < DEPTH_MAX and len(word) >= SCRIPT_LEAST and any(c in word for c in " \t\n;|&"):
            inside = spans_of_script(
                word[begin:end], cut=self._cut, shell=self._shell or script or command, depth=self._depth + 1
            )
            found += [(begin + b, begin + e) for b, e in inside]
        return found

    def _option(self, i: int, word: str, begin: int, end: int) -> list[Span]:
        """Return the secrets of a word that says itself what is one; note what it says of the next word."""
        bare, options, shell = word[begin:end], self._options, self._shell
        if bare and bare in options:
            self._kind = options[bare] if options[bare] != _ATTACHED else ""
            return []
        name, equals, value = bare.partition("=")
        at = begin + len(name) + 1
        if bare[:1] in ("-", "/") and len(bare) > 1:
            if equals and name in options and len(name) > 2:
                return _value(options[name], "", word, (at, end), shell)
            for option, kind in options.items():
                one_letter = (len(option) == 2 and self._program not in _EXACT) or kind == _ATTACHED
                if option and one_letter and bare.startswith(option):
                    at = begin + len(option) + (option[0] == "/" and bare[len(option)] == ":")
                    return _value(kind, "", word, (at, end), shell)
            if self._program == "curl" and _CURL_SWITCHES.fullmatch(bare):
                self._kind = _COLON
                return []
        if equals:
            if name == "--from-literal" and "=" in value:
                return _value(_EQUALS, "", word, (at, end), shell)
            if name in _USERS and _is_pair(value, self._program):
                return _value(_COLON, "", word, (at, end), shell)
            if _PLAIN_NAME.fullmatch(name) and is_secret_name(name):
                return _value(_ALL, name, word, (at, end), shell)
            if "" not in options:
                return []
        following = self._words[i + 1] if i + 1 < len(self._words) else ""
        if bare.startswith("-"):
            switch = SWITCH.match(bare.lstrip("-")) or (bare == "-pass" and self._program == "ffmpeg")
            if is_secret_name(bare) and len(bare) > 2 and not switch:
                self._kind, self._name = _ALL, bare
            elif bare in _USERS and _is_pair(following, self._program):
                self._kind = _COLON
            elif bare == "--from-literal":
                self._kind = _EQUALS
        elif "" in options:
            return _value(options[""], "", word, (begin, end), shell)
        elif self._is_last(i):
            return _value(_ALL, "", word, (begin, end), shell)
        elif bare.lower() in _BARE.get(self._program, ()) or (
            self._program in _SETTERS
            and (is_secret_name(bare) or bare.startswith("pypi-token."))
            and not {"set", "config"}.isdisjoint(self._words[self._command + 1 : i])
        ):
            self._kind = _ALL
        return []

    def _is_last(self, i: int) -> bool:
        """Return whether word `i` is the last one, and so the secret of a program that has it there."""
        words = self._words
        if self._last is None or f"{self._program} {words[i]}" in _LAST:
            return False
        if self._end < 0:
            behind = range(self._command + 1, len(words))
            self._end = next((k for k in behind if _REDIRECTION.match(words[k])), len(words))
        if i != self._end - 1:
            return False
        own = words[self._command + 1 : i]
        return not self._last or any(re.fullmatch(rf"-\w*{self._last}\w*", word) for word in own)


def _is_pair(value: str, program: str) -> bool:
    """Return whether `user:secret` is one, and not the user and the group of a container."""
    user, colon, secret = value.partition(":")
    return bool(colon and user and secret) and program not in _CONTAINERS and not secret.isdigit() and user != secret


def spans_of_words(words: Sequence[str], program: str, *, cut: bool = False) -> Iterator[list[Span] | None]:
    """Yield for each word the places of its secrets, in no order; `words[0]` is what `program` is called.

    None: they could not be found out, so all of the word counts.  `cut`: the last word ends before its end.
    """
    reader = _Reader(words, program, cut=cut, raw=False, shell=False, depth=0)
    failed = False
    for i in range(len(words)):
        try:
            found: list[Span] | None = reader.read(i)
            if failed:
                found = None  # what the last word said of this one is not known
            failed = False
        except Exception:  # fail closed: whatever it is, the word must not pass
            found, failed = None, True
        yield found


# ---- scripts ---------------------------------------------------------------------------------------------------

#: One word of a shell's, in its quotes; or what ends a command.
_PIECE: Final = re.compile(
    r"(?P<word>(?:'[^']*+'?|\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\\?\"?|\\.?|[^\s'\"\\;|&()]++)++)"
    r"|(?P<end>[;|&()\n]++)|[^\S\n]++",
    re.DOTALL,
)


def _is_assignment(word: str) -> bool:
    """Return whether a script's word sets a variable; `ProxyCommand=sshpass` is a setting with a command in it."""
    match = _ASSIGNMENT.match(word)
    return bool(match) and not has_rules(program_name(word[len(match[0]) :] if match else ""))


def spans_of_script(text: str, *, cut: bool = False, shell: bool = True, depth: int = 1) -> list[Span]:
    """Return the places of secrets that a script's words say; what its text shows by itself is not among them.

    `shell`: it is known to be a shell's, so `$NAME` in it is a variable and not the secret.
    """
    found: list[Span] = []
    words: list[str] = []
    places: list[int] = []

    def read_command() -> None:
        first = 0
        while first < len(words) - 1 and (_is_assignment(words[first]) or words[first] in _KEYWORDS):
            first += 1
        rest = words[first:]
        for i, word in enumerate(words[: first + 1]):
            if assigned := _ASSIGNMENT.match(word):
                name = assigned[0][:-1]
                if is_secret_name(name):
                    spans = _value(_ALL, name, word, (assigned.end(), len(word)), shell)
                    found.extend((places[i] + b, places[i] + e) for b, e in spans)
        program = program_name(rest[0].partition("=")[2] if _ASSIGNMENT.match(rest[0]) else rest[0])
        reader = _Reader(rest, program, cut=cut, raw=True, shell=shell, depth=depth)
        for i in range(len(rest)):
            place = places[first + i]
            found.extend((place + b, place + e) for b, e in reader.read(i))
        words.clear()
        places.clear()

    for piece in _PIECE.finditer(text):
        if piece["word"]:
            words.append(piece["word"])
            places.append(piece.start())
        elif piece["end"] and words:
            read_command()
    if words:
        read_command()
    return found
