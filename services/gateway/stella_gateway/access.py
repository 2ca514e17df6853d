"""Who may read: people on this machine, and whoever knows the token.

A request from another machine needs the token.  A request over loopback needs none, but must name this
machine in its Host header: a web page whose own host name resolves to 127.0.0.1 (DNS rebinding) would
otherwise read through the browser of whoever sits here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from stella_shared.errors import ConfigError

TOKEN_MIN_CHARACTERS: Final = 16
_TOKEN_MAX_BYTES: Final = 4096


class Answer(Enum):
    """What a request gets before anything else is looked at: its HTTP status and why."""

    ALLOWED = (200, "")
    TOKEN_NEEDED = (401, "a bearer token is needed from other machines (signals.metrics.token_file)")
    WRONG_HOST = (421, "the Host header names another machine; ask for localhost")


def judge(peer: str, host: str, authorization: str, token: str) -> Answer:
    """Decide about a request from address `peer` with these headers; `token` "" means that none exists."""
    if token and _is_token(authorization, token):
        return Answer.ALLOWED
    if not is_loopback(peer):
        return Answer.TOKEN_NEEDED
    return Answer.ALLOWED if is_loopback(_host_name(host)) else Answer.WRONG_HOST


def is_loopback(name: str) -> bool:
    """True for `localhost` and loopback addresses, ::ffff:127.0.0.1 included."""
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def read_token(path: str, address: str) -> str:
    """Return the token in `path` ("": none).

    Raises `ConfigError` when `address` is beyond loopback and there is none, or when the file cannot serve.
    """
    if not path:
        if not is_loopback(address):
            raise ConfigError(
                f"signals.metrics.address is {address}, which other machines can reach, "
                "but signals.metrics.token_file is empty",
                hint="write a secret of at least 16 characters into a file of mode 0600 and name it there, "
                "or listen on 127.0.0.1",
            )
        return ""
    try:
        with Path(path).open("rb") as file:
            token = file.read(_TOKEN_MAX_BYTES + 1).strip()
    except OSError as e:
        raise ConfigError(f"signals.metrics.token_file {path}: {e.strerror}") from None
    if not TOKEN_MIN_CHARACTERS <= len(token) <= _TOKEN_MAX_BYTES or not token.isascii() or b" " in token:
        raise ConfigError(
            f"signals.metrics.token_file {path} must hold {TOKEN_MIN_CHARACTERS} or more ASCII characters "
            "without spaces"
        )
    return token.decode("ascii")


def _is_token(authorization: str, token: str) -> bool:
    """True when the header carries the token: as Bearer, or as Basic's password, which browsers ask for."""
    scheme, _, given = authorization.partition(" ")
    given = given.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
