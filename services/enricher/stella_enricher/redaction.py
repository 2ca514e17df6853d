"""Redaction of arguments: what is a secret in them becomes `***` before they are written anywhere.  Pure.

The built-in rules stand in `secret_text` (what a text shows by itself) and `secret_words` (what its place on
the command line says); the user's own patterns are added to them.  `***` says neither length nor kind.

An argument with which redaction fails becomes `***` as a whole and is counted.  So does one that changes again
when it is redacted anew, so that a redacted command line always stays as it is.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from stella_enricher.secret_text import Span, has_signs
from stella_enricher.secret_words import has_rules, program_name, spans_of_words
from stella_shared import expressions

MARK: Final = "***"
#: Changes with the built-in rules; the heartbeat says it.
RULES_VERSION: Final = "1"
#: Distinct command lines that are remembered; beyond it, and beyond `max_bytes`, the table starts anew.
REMEMBERED_MAX: Final = 1024
#: Their share of `max_cache_memory_mb`.
SHARE: Final = 0.0625
#: A remembered command line without its arguments, and an argument's slots.
_ENTRY_BYTES, _WORD_BYTES = 700, 16
#: Redacting what is redacted must change nothing; this often it is tried.
_ROUNDS: Final = 3
#: What one pattern of the user's may find in one argument; one that finds more takes it whole.
_MATCHES_MAX: Final = 64


class Redacted(msgspec.Struct, frozen=True):
    """A redacted command line, and the indexes of the arguments that were changed, ascending."""

    argv: list[str]
    changed: list[int]


class Redactor:
    """Redacts command lines by one set of rules.

    `patterns` are regular expressions of the user's: a group named `secret` is replaced, else the whole match.
    `keep` are programs, by file name, whose arguments stay as they are.
    `counts` has how many arguments were redacted, by what: `rule`, `pattern`, `failure`.
    """

    def __init__(
        self,
        patterns: Sequence[str] = (),
        keep: Iterable[str] = (),
        *,
        enabled: bool = True,
        max_bytes: int = 16 << 20,
    ) -> None:
        self._patterns = [expressions.compile_pattern(text) for text in patterns] if enabled else []
        self._keep = frozenset(keep)
        self._enabled = enabled
        self.hits = self.misses = 0
        self._bytes, self._max_bytes = 0, max_bytes
        self._remembered: dict[tuple[str, bool, bool, tuple[str, ...]], tuple[Redacted, dict[str, int]]] = {}
        self.counts = {"rule": 0, "pattern": 0, "failure": 0}
        own = hashlib.sha256("\0".join(patterns).encode()).hexdigest()[:12]
        self.version = ("off", RULES_VERSION, f"{RULES_VERSION}+{own}")[enabled and 1 + bool(patterns)]

    def redact(self, argv: Sequence[str], filename: str, *, script: bool = False, cut: bool = False) -> Redacted:
        """Return the command line of a program without its secrets.

        `filename` is what was started.  `script`: it is one, and stands in `argv` behind its interpreter.  `cut`:
        the last argument may go on where the text ends.  Never raises.
        """
        if not self._enabled or filename.rpartition("/")[2] in self._keep:
            return Redacted(list(argv), [])
        key = (filename, script, cut, tuple(argv))
        known = self._remembered.get(key)
        if known is not None:
            self.hits += 1
        else:
            self.misses += 1
            # Each argument stands in the key and in the answer.
            size = _ENTRY_BYTES + len(argv) * _WORD_BYTES + 2 * sum(map(sys.getsizeof, argv))
            if len(self._remembered) >= REMEMBERED_MAX or self._bytes + size > self._max_bytes:
                self._remembered.clear()
                self._bytes = 0
            known = self._redact(argv, filename, script=script, cut=cut)
            if size <= self._max_bytes:
                self._remembered[key] = known
                self._bytes += size
        redacted, counts = known
        for cause, times in counts.items():
            self.counts[cause] += times
        return redacted

    def stats(self) -> dict[str, int]:
        """Return how many command lines are remembered, and how often one was."""
        return {
            "entries": len(self._remembered),
            "max_entries": REMEMBERED_MAX,
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
            "hits": self.hits,
            "misses": self.misses,
        }

    def _redact(
        self, argv: Sequence[str], filename: str, *, script: bool, cut: bool
    ) -> tuple[Redacted, dict[str, int]]:
        causes: dict[int, str] = {}
        try:
            words = self._by_patterns(argv, causes)
            first, program = _program(argv, filename, script)
            if _may_hold_secrets(argv, program):
                for _ in range(_ROUNDS):
                    before, words = words, _by_rules(words, first, program, cut, causes)
                    if before == words:
                        break
                else:
                    again = _by_rules(words, first, program, cut, {})
                    for i, word in enumerate(again):
                        if word != words[i]:
                            causes[i] = "failure"
                    words = [MARK if causes.get(i) == "failure" else word for i, word in enumerate(words)]
        except Exception:  # fail closed: whatever it is, nothing must pass
            words = [MARK] * len(argv)
            causes = dict.fromkeys(range(len(argv)), "failure")
        changed = [i for i, word in enumerate(words) if word != argv[i]]
        counts: dict[str, int] = {}
        for i in changed:
            cause = causes.get(i, "rule")
            counts[cause] = counts.get(cause, 0) + 1
        return Redacted(words, changed), counts

    def _by_patterns(self, argv: Sequence[str], causes: dict[int, str]) -> list[str]:
        words = list(argv)
        for i, word in enumerate(argv if self._patterns else ()):
            try:
                found: list[Span] = []
                for pattern in self._patterns:
                    found += pattern.spans(word, _MATCHES_MAX)
                words[i] = replaced(word, found)
                causes[i] = "pattern"
            except Exception:  # fail closed
                words[i] = MARK
                causes[i] = "failure"
        return words


def replaced(word: str, spans: Iterable[Span]) -> str:
    """Return a text with `***` for each span; spans that touch or overlap are one."""
    out: list[str] = []
    at = 0
    open_at = -1
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if open_at < 0 or begin > at:
            out += [word[at:begin], MARK]
            open_at = begin
        at = max(at, end)
    out.append(word[at:])
    return "".join(out)


def _program(argv: Sequence[str], filename: str, script: bool) -> tuple[int, str]:
    """Return the index of the word that names the program, behind a script's interpreter, and its name."""
    if script and filename in argv[1:4]:
        return argv.index(filename, 1), program_name(filename)
    name = program_name(filename)
    return 0, name if has_rules(name) or not argv else program_name(argv[0])


def _may_hold_secrets(argv: Sequence[str], program: str) -> bool:
    """Return False for the many command lines in which no rule could find anything."""
    if has_rules(program):
        return True
    text = "\0".join(argv)
    return has_signs(text)


def _by_rules(words: list[str], first: int, program: str, cut: bool, causes: dict[int, str]) -> list[str]:
    out = list(words)
    spans = [*spans_of_words(words[:first], ""), *spans_of_words(words[first:], program, cut=cut)]
    for i, found in enumerate(spans):
        if found is None:
            out[i] = MARK
            causes[i] = "failure"
        elif found:
            out[i] = replaced(words[i], found)
            if out[i] != words[i] and causes.get(i) != "failure":
                causes[i] = "rule"
    return out
