"""Secrets that a text shows by itself: token forms, URLs, headers, `name=value`, SQL, private keys.  Pure.

Every rule takes a text and gives spans `(start, end)` of what is to be replaced.  A text may come from any
traced program, so the expressions are written to take time in proportion to its length: repeats are possessive
or bounded, and what a repeat takes cannot be the beginning of what follows it.

`cut` says that the text ends before its end: then a token that is too short to be one counts when it reaches
the end, and so does the beginning of a URL's password.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

Span = tuple[int, int]

#: How the name of a secret ends; what stands before is free (`PGPASSWORD`, `db.password`, `--vault-token`).
_ENDINGS: Final = (
    r"(?:passwords?|passwd|passwort|passphrase|passcode|passkey|storepass|keypass|requirepass|masterauth|rpcauth"
    r"|secret|token|credentials?"
    r"|(?:api|access|private|secret|auth|account|shared|master|signing|encryption|license|service|sas)[_.-]?key"
    r"|(?<![a-z])(?:pass|pwd|psk)|(?<=_)pw|bearer|connection[_.-]?string)"
)
_NAME_END: Final = re.compile(rf"(?i:{_ENDINGS})\Z")
_CAMEL_PASS: Final = re.compile(r"[a-z0-9](?:Pass|Pwd|Psk)\Z")
#: Names that end so and hold no secret: how many, where to go on, who asks.
_HARMLESS: Final = re.compile(
    r"(?i:(?:^|[_.-])(?:max|min|num|eos|bos|pad|unk|mask|sep|cls|stop|next|page|start|starting|continuation|per)"
    r"[_.-]?token\Z|ask[_.-]?pass\Z|image[_.-]?pull[_.-]?secret\Z|tls[_.-]?secret\Z)"
)
#: `--no-password`, `--ask-password`: switches, whose next argument is something else.
SWITCH: Final = re.compile(
    r"(?i:(?:no|without|with|use|ask|prompt|require|disable|enable|allow|skip|show|print|get|create|generate|random"
    r"|reset|change|save|verify|validate|rotate)[_.-])"
)
#: Values that say how, not what.
_SWITCH_VALUE: Final = frozenset({"true", "false", "yes", "no", "on", "off", "none", "null", "stdin", "prompt", "-"})
_PASSWORD: Final = re.compile(r"(?i:pass|pwd|pw\Z)")
#: `token: rename the field` is a commit's subject.
_PROSE: Final = re.compile(r"[a-z]{1,15}(?![^\s.,;:!?)])")
_FILE: Final = re.compile(r"(?:file://)?(?:~|\.{1,2}|[\w.-]+)?(?:/[\w.+@-]+)+/?|[\w+@-][\w.+@-]*")
_FILE_ENDING: Final = re.compile(
    r"(?i:\.(?:pem|key|pub|crt|cer|der|p12|pfx|jks|json|ya?ml|toml|ini|conf|env|txt|gpg|asc|token|secret|cfg))\Z"
)
_DENSE: Final = re.compile(r"(?=[^/]*[a-z])(?=[^/]*[A-Z])(?=[^/]*[0-9])[^/]{10,}")
_BASE64: Final = re.compile(r"(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=[^0-9]*[0-9])[A-Za-z0-9/+=]++")
_REFERENCE: Final = re.compile(r"\$(?:[A-Za-z_]\w*\Z|\{\w+\}\Z|\(|\Z)|`")


def is_secret_name(name: str) -> bool:
    """Return whether an option, a variable or a key of this name holds a secret."""
    name = name[-80:]
    return bool(_NAME_END.search(name) or _CAMEL_PASS.search(name)) and not _HARMLESS.search(name)


def is_secret_value(name: str, value: str, *, shell: bool = False) -> bool:
    """Return whether what `name` was given is the secret itself: no file, no switch, no variable of a shell."""
    bare = value.strip("\"'")
    if not bare or bare.lower() in _SWITCH_VALUE:
        return False
    if shell and not value.startswith("'") and _REFERENCE.match(bare):
        return False
    if name in ("PWD", "OLDPWD"):
        return not bare.startswith("/")
    if bare in ("0", "1") and SWITCH.search(name):
        return False
    lower = name.lower()
    if _PASSWORD.search(name):
        return True
    if lower.endswith("secret") and re.match(r"(?:id|type|source|src|env)=", bare):
        return False
    # `credentials=/etc/c,vers=3`: what else there is has names of its own.
    return not _is_file(bare.partition(",")[0])


def _is_file(value: str) -> bool:
    """Return whether a value is a path rather than base64: rooted or with an ending, and no part looks random."""
    if len(value) > 255 or not _FILE.fullmatch(value):
        return False
    rooted = value.startswith(("/", "./", "../", "~/", "file://"))
    if len(value) >= 16 and _BASE64.fullmatch(value):
        return False
    return (rooted or bool(_FILE_ENDING.search(value))) and not any(_DENSE.match(p) for p in value.split("/"))


# ---- tokens ---------------------------------------------------------------------------------------------------

#: (what it begins with, what it goes on with, how many of these at the least), as the issuers document them.
_TOKENS: Final = (
    (r"gh[pousr]_", r"[A-Za-z0-9]", 20),
    (r"github_pat_", r"[A-Za-z0-9_]", 20),
    (r"gl(?:pat|ptt|dt|rt|cbt|ft|soat|imt|agent|oas)-", r"[\w-]", 16),
    (r"(?:AKIA|ASIA|ABIA|ACCA)", r"[A-Z0-9]", 16),
    (r"xox[a-z]-", r"[A-Za-z0-9-]", 8),
    (r"xapp-[0-9]-", r"[A-Za-z0-9-]", 8),
    (r"hooks\.slack\.com/services/", r"[\w/]", 8),
    (r"(?:sk|rk)_(?:live|test)_", r"[A-Za-z0-9]", 10),
    (r"sk-(?=[\w-]{0,200}[A-Z])(?=[\w-]{0,200}[0-9])", r"[\w-]", 20),
    (r"AIza", r"[\w-]", 30),
    (r"ya29\.", r"[\w-]", 10),
    (r"GOCSPX-", r"[\w-]", 16),
    (r"npm_", r"[A-Za-z0-9]", 30),
    (r"pypi-AgE", r"[\w-]", 30),
    (r"SG\.", r"[\w.-]", 32),
    (r"do[opr]_v1_", r"[a-f0-9]", 32),
    (r"hf_", r"[A-Za-z0-9]", 30),
    (r"hv[sbr]\.", r"[\w-]", 20),
    (r"dckr_[po]at_", r"[\w-]", 20),
    (r"shp(?:at|ca|pa|ss)_", r"[a-fA-F0-9]", 32),
    (r"glsa_", r"\w", 30),
    (r"sq0[a-z]{3}-", r"[\w-]", 20),
    (r"AGE-SECRET-KEY-1", r"[0-9A-Z]", 40),
    (r"key-", r"[0-9a-f]", 32),
    (r"(?:bot)?[0-9]{8,10}:AA", r"[\w-]", 30),
)
_JWT: Final = r"eyJ[\w-]{5,}+\.[\w-]{5,}+(?:\.[\w-]*+)*+"
_TOKEN: Final = re.compile(
    rf"(?<![A-Za-z0-9])(?:{'|'.join(f'{b}{c}{{{n},}}+' for b, c, n in _TOKENS)}|{_JWT})", re.ASCII
)
_TOKEN_CUT: Final = re.compile(
    rf"(?<![A-Za-z0-9])(?:{'|'.join(f'{b}{c}*+' for b, c, _ in _TOKENS if '?=' not in b)}|eyJ[\w-]*+(?:\.[\w-]*+)*+)\Z",
    re.ASCII,
)
#: Without one of these no token is there; searching them is a good deal cheaper.
_TOKEN_SIGNS: Final = (
    "eyJ", "AKIA", "ASIA", "ABIA", "ACCA", "AIza", "AGE-", "GOCSPX-", "SG.", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
    "_pat_", "_oat_", "gl", "xox", "xapp-", "slack.com", "sk", "rk_", "ya29.", "npm_", "pypi-", "_v1_", "hf_", "hv",
    "shp", "sq0", "key-", ":AA",
)  # fmt: skip


def _tokens(text: str, cut: bool) -> Iterator[Span]:
    if not any(sign in text for sign in _TOKEN_SIGNS):
        return
    for match in _TOKEN.finditer(text):
        yield match.span()
    if cut and (last := _TOKEN_CUT.search(text, max(0, len(text) - 2048))):
        yield last.span()


_PEM: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


def _private_keys(text: str) -> Iterator[Span]:
    at = 0
    while match := _PEM.search(text, at):
        at = text.find("-----END", match.end())
        at = len(text) if at < 0 else at
        yield match.end(), at


# ---- URLs -----------------------------------------------------------------------------------------------------

_AUTHORITY: Final = re.compile(r"://(?=([^\s\"'<>`]{0,4096}))")
_USERINFO: Final = re.compile(r"([^/?#@:\[]*+):([^/?#]*)@")
#: A password with a slash in it; a port would be digits.
_ODD_USERINFO: Final = re.compile(r"([^/?#@:\[]*+):(?![0-9]*[/?#])([^@]*+)@")
_LONE_USER: Final = re.compile(r"(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{20,}(?=@)", re.ASCII)
_QUERY: Final = re.compile(
    r"(?i:[?&](?:sig|signature|[a-z-]{0,20}-signature|auth|key|apikey|access[_-]?code|session(?:id)?|jwt)=)([^&#\s\"'<>`]++)"
)


#: `user:secret@host` without a scheme, all of a word.  A host has a dot or a port; a digest and a version are none.
_LOGIN: Final = re.compile(
    r"(?:[\w.-]{1,64}=)?[\w.+-]{1,64}:([^\s/:@]{1,256})@(?!sha[0-9])"
    r"[A-Za-z][\w-]{0,63}(?:\.[\w.-]{1,255}|:[0-9]{1,5})(?![\w.-])",
    re.ASCII,
)


def _urls(text: str, cut: bool) -> Iterator[Span]:
    for match in _AUTHORITY.finditer(text):
        rest, at = match[1], match.start(1)
        found = _USERINFO.match(rest) or _ODD_USERINFO.match(rest)
        if found:
            yield at + found.start(2), at + found.end(2)
        elif lone := _LONE_USER.match(rest):
            yield at, at + lone.end()
        elif cut and match.end(1) == len(text) and (open_end := re.match(r"[^/?#@:\[]*+:([^/?#@]+)\Z", rest)):
            yield at + open_end.start(1), len(text)
    for match in _QUERY.finditer(text):
        yield match.span(1)


# ---- headers ---------------------------------------------------------------------------------------------------

_AUTHORIZATION: Final = re.compile(
    r"(?i:(?<![\w-])(?:[\w-]{0,32}-)?(?P<name>authorization|cookie2?)[\"']?[ \t]{0,8}[:=][ \t]{0,8}[\"']?)"
)
_SCHEME: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9-]{0,31})[ \t]{1,8}(?=\S)")
_BEARER: Final = re.compile(r"(?i:\bbearer[ \t]{1,8})([A-Za-z0-9._~+/=-]++)")


def _headers(text: str, lower: str, cut: bool, shell: bool) -> Iterator[Span]:
    if "authorization" in lower or "cookie" in lower:
        for match in _AUTHORIZATION.finditer(text):
            before = text[match.start() - 1 : match.start()]
            last = text[match.end() - 1]
            end = len(text)
            for quote in {before, last} & {'"', "'"}:
                found = text.find(quote, match.end())
                end = min(end, found if found >= 0 else end)
            line = text.find("\n", match.end(), end)
            end = line if line >= 0 else end
            scheme = _SCHEME.match(text, match.end(), end) if match["name"].lower() == "authorization" else None
            begin = scheme.end() if scheme else match.end()
            if not (shell and _REFERENCE.match(text[begin:end])):
                yield begin, end
    if "bearer" in lower:
        for match in _BEARER.finditer(text):
            word = match[1]
            # "bearer authentication" is prose.
            if (
                len(word) >= 24
                or (len(word) >= 8 and any(c.isdigit() for c in word))
                or (cut and match.end() == len(text))
            ):
                yield match.span(1)


# ---- name=value ------------------------------------------------------------------------------------------------

_NAMED: Final = re.compile(
    rf"(?P<end>(?i:{_ENDINGS}))(?P<close>\\?[\"'])?\]?"
    r"(?P<sep>[ \t]{0,8}(?:=>|:=|==?|:)[ \t\n]{0,8}|[ \t]{1,8}(?='))"
)
_SQL: Final = re.compile(
    r"(?i:\bidentified\s{1,8}(?:with\s{1,8}\S{1,40}\s{1,8})?(?:by|as)\s{1,8}(?:password\s{1,8})?|\bpassword\s{0,8}\(\s{0,8})"
    r"(?=['\"])"
)
_NETRC: Final = re.compile(r"(?i:\blogin\s{1,8}\S{1,200}\s{1,8}password\s{1,8})(\S*[^\s\"'])")
_QUOTED: Final = {
    quote: re.compile(rf"[^{quote}\\]*+(?:(?:\\.|{quote}{quote})[^{quote}\\]*+)*+", re.DOTALL) for quote in "'\""
}
_WORD: Final = re.compile(r"[^\s&;,|<>\"'`(){}\[\]]++")
_IN_QUERY: Final = re.compile(r"[^&#\s\"'<>`]++")


def quoted_end(text: str, at: int) -> int:
    """Return where a quoted text that begins at `at` (its quote) ends, before the closing quote."""
    match = _QUOTED[text[at]].match(text, at + 1)
    return match.end() if match else len(text)


def _name_begin(text: str, end: int) -> int:
    begin, least = end, max(0, end - 80)
    while begin > least and (text[begin - 1].isalnum() or text[begin - 1] in "_.-"):
        begin -= 1
    return begin


def _named(text: str, shell: bool) -> Iterator[Span]:
    for match in _NAMED.finditer(text):
        begin = _name_begin(text, match.start())
        name = text[begin : match.end("end")]
        at = match.end()
        if at >= len(text) or not is_secret_name(name):
            continue
        sep = match["sep"].strip()
        escaped = text.startswith('\\"', at) or text.startswith("\\'", at)
        if escaped:
            end = text.find(text[at : at + 2], at + 2)
            yield at + 2, end if end >= 0 else len(text)
            continue
        quoted = text[at] in "\"'"
        if quoted and not match["close"] and text.count(text[at], 0, at) % 2:
            # `expect "password:"`: the quote ends what began before the name.
            at, quoted = at + 1, False
        if quoted:
            end = quoted_end(text, at)
            if is_secret_value(name, text[at:end], shell=shell):
                yield at + 1, end
            continue
        if sep.startswith(":") and not match["close"]:
            # `password: x` and `X-Api-Key:x`, but neither `arn:…:secret:name` nor `token:` of a URL.
            spaced = match["sep"][-1:] in " \t\n"
            header = "-" in name and begin <= 1
            if sep == ":" and not spaced and not header:
                continue
            if not header and not _PASSWORD.search(name) and _PROSE.match(text, at):
                continue
        value = (_IN_QUERY if text[begin - 1 : begin] in ("?", "&") else _WORD).match(text, at)
        if value and is_secret_value(name, value[0], shell=shell):
            yield value.span()


def _statements(text: str, lower: str) -> Iterator[Span]:
    if "identified" in lower or "password" in lower:
        for match in _SQL.finditer(text):
            yield match.end() + 1, quoted_end(text, match.end())
        for match in _NETRC.finditer(text):
            yield match.span(1)


#: Without one of these no rule on names can find anything.
_NAME_SIGNS: Final = (
    "pass",
    "pwd",
    "psk",
    "_pw",
    "secret",
    "token",
    "key",
    "credential",
    "bearer",
    "auth",
    "connection",
)


def spans_of(text: str, *, cut: bool = False, shell: bool = False) -> list[Span]:
    """Return every span of a text that is a secret, in no order; they may overlap.

    `shell`: the text is a shell's, so `$NAME` in it is a variable and not the secret.
    """
    found = list(_tokens(text, cut))
    if "://" in text or "=" in text:
        found += _urls(text, cut)
    if "@" in text and (login := _LOGIN.match(text)):
        found.append(login.span(1))
    if "-----BEGIN " in text:
        found += _private_keys(text)
    lower = text.lower()
    if any(sign in lower for sign in _NAME_SIGNS) or "cookie" in lower or "identified" in lower:
        found += _headers(text, lower, cut, shell)
        found += _named(text, shell)
        found += _statements(text, lower)
    return found


def has_signs(text: str) -> bool:
    """Return False when neither a text nor words that stand in it can hold a secret that a rule would find."""
    lower = text.lower()
    return (
        any(sign in lower for sign in _SIGNS)
        or any(sign in text for sign in _TOKEN_SIGNS)
        # Words in words, and programs that are started behind an option.
        or any(c in text for c in " \t\n;|&")
        or "\0--\0" in text
        or "\0-exec" in text
        or "\0-ok\0" in text
    )


_SIGNS: Final = (
    *_NAME_SIGNS,
    "cookie",
    "identified",
    "://",
    "private key",
    "@",
    "--user",
    "--creds",
    "--from-literal",
    "sig",
)
