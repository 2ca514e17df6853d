"""Accounts on the bus: made, kept, and moved from the passwords of older releases to nkeys.

    bus.json, mode 0600    {"users": {"collector": {"seed": "SU…"}, …}}
    of older releases      {"users": {"collector": {"user": "collector", "password": "…"}, …}}

An nkey is an Ed25519 key.  The server knows its public half and asks the client to sign a nonce: nothing that could
be used to log in crosses the connection or stands in the server's configuration.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

import msgspec

from stella_cli.node_file import write_private
from stella_shared.config import BusUser, BusUsers
from stella_shared.errors import BrokenPromise

USERS: Final = ("collector", "enricher", "signer", "gateway", "operator")


def new() -> BusUser:
    """Return an account with a new nkey."""
    import nkeys

    return BusUser(seed=nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode())


def as_server_knows(account: BusUser) -> dict[str, str]:
    """Return what the server's configuration says of `account`: its public nkey, or user and password."""
    import nkeys

    if not account.seed:
        return {"user": account.user, "password": account.password}
    return {"nkey": nkeys.from_seed(bytearray(account.seed.encode())).public_key.decode()}


def of_node(state: Path) -> dict[str, BusUser]:
    """Return the embedded server's accounts, made once and kept in `bus.json`.

    A file that an older release made for this server holds a password for everybody: it becomes one of nkeys, in one
    step, as only this server knew the passwords.  Single passwords belong to a server elsewhere, and stay.
    """
    path = state / "bus.json"
    there = kept(path)
    if all(user in there and there[user].password for user in USERS):
        there = {user: account for user, account in there.items() if user not in USERS}
    accounts = {user: there.get(user) or new() for user in USERS}
    write(path, {**there, **accounts})
    return accounts


def kept(path: Path) -> dict[str, BusUser]:
    """Return the accounts that the file `path` has; none when it is not there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BusUsers).users
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as e:
        raise BrokenPromise(f"{path} is no account file: {e}", hint="remove it; it is made again") from None


def write(path: Path, accounts: dict[str, BusUser]) -> None:
    """Replace the file `path`, for its owner only."""
    write_private(path, msgspec.json.format(msgspec.json.encode(BusUsers(accounts))) + b"\n")
