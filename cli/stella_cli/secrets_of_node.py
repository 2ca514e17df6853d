"""The secrets of a node, for taking them out of what leaves it.

Services do not log secrets, and the configuration only names files of them.  This is the second line: what is known
to be secret is looked for and replaced, and so is what has the form of one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from stella_cli.settings import Settings
from stella_shared.config import bus_users_file
from stella_shared.evidence.keys import SIGNING_KEY

REPLACEMENT: Final = b"[secret removed]"
_FILE_BYTES: Final = 64 << 10
#: Shorter values (an HSM's PIN) are taken out as whole words only: they stand inside others by chance.
_SHORT: Final = 8
_FORMS: Final = (
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(rb"(?<=://)[^\s/@\"']+:[^\s/@\"']+(?=@)"),
    re.compile(rb"(?i)(?<=bearer )[a-z0-9._~+/=-]{8,}"),
    re.compile(rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    re.compile(rb"(?i)(?<=\"password\": \")[^\"]+|(?<=\"password\":\")[^\"]+"),
    # Seeds of nkeys: of users, accounts, operators, servers, clusters.
    re.compile(rb"(?<![A-Z0-9])S[UAONC][A-Z2-7]{56}(?![A-Z0-9])"),
)


@dataclasses.dataclass
class Secrets:
    """What must not leave the node.  `replaced` counts what was found; `unreadable` names files not looked into."""

    values: list[bytes]
    unreadable: list[str] = dataclasses.field(default_factory=list)
    replaced: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Secrets:
        """Gather the secrets that this user may read; what he may not read, he cannot put into a bundle either."""
        values: set[bytes] = set()
        unreadable: list[str] = []
        signals = settings.signals
        files = {
            bus_users_file(signals),
            settings.state / "bus.json",
            settings.state / "nats" / "nats.conf",
            settings.state / "keys" / SIGNING_KEY,
            *(
                Path(name)
                for name in (
                    signals.metrics.token_file,
                    signals.signing.pin_file,
                    signals.signing.identity_token_file,
                )
                if name
            ),
        }
        for path in sorted(files):
            try:
                with path.open("rb") as file:
                    content = file.read(_FILE_BYTES)
            except FileNotFoundError:
                continue
            except OSError:
                unreadable.append(str(path))
                continue
            values |= {value for value in _secrets_in(content) if value}
        # The longest first: one may be a part of another.
        return cls(sorted(values, key=lambda value: (-len(value), value)), unreadable)

    def scrub(self, data: bytes) -> bytes:
        """Return `data` without any secret in it."""
        for value in self.values:
            if len(value) >= _SHORT:
                self.replaced += data.count(value)
                data = data.replace(value, REPLACEMENT)
        words = (
            re.compile(rb"(?<!\w)" + re.escape(value) + rb"(?!\w)") for value in self.values if len(value) < _SHORT
        )
        for form in (*_FORMS, *words):
            data, count = form.subn(REPLACEMENT, data)
            self.replaced += count
        return data


def _secrets_in(content: bytes) -> Iterator[bytes]:
    """Yield the secret values of a file: the passwords and seeds of a JSON document, else every line of it."""
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if isinstance(document, dict | list):
        yield from _passwords_and_seeds(document)
        return
    yield from (line.strip() for line in content.splitlines() if not line.startswith(b"-----"))


def _passwords_and_seeds(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"password", "seed"} and isinstance(inner, str):
                yield inner.encode()
            else:
                yield from _passwords_and_seeds(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _passwords_and_seeds(inner)
