"""`stella signals bus-config`: nats.conf and account files for a NATS server of the user's own."""

from __future__ import annotations

from pathlib import Path

import click

from stella_cli import nats_server
from stella_shared.errors import NotPermitted, UsageError

_PORT_MAX = 65535


def write(directory: str, store: str, *, replace: bool, sync_seconds: int, **given: str) -> None:
    """Write the files, and say which goes where.  `given`: the text fields of `External` but the store."""
    folder = Path(directory).absolute()
    place = Path(store).absolute() if store else folder / "jetstream"
    server = nats_server.External(store=place, sync_seconds=sync_seconds, **given)
    for option, value in (("--listen", server.listen), ("--monitor", server.monitor)):
        if value and not _is_address(value):
            raise UsageError(f"{option} {value} is not ADDRESS:PORT", hint=f"for instance {option} 127.0.0.1:4222")
    if bool(server.certificate) != bool(server.key):
        raise UsageError("--tls-certificate and --tls-key go together", hint="name both PEM files, or neither")
    if server.authority and not server.certificate:
        raise UsageError(
            "--tls-ca needs --tls-certificate and --tls-key", hint="a server without TLS sees no certificate"
        )
    try:
        accounts = nats_server.write_external(folder, server, replace=replace)
    except OSError as e:
        raise NotPermitted(
            f"cannot write {e.filename or folder}: {e.strerror}", hint="run as the owner of that directory"
        ) from None
    click.echo(f"server    {folder / 'nats.conf'}: nats-server --config {folder / 'nats.conf'}")
    for user, account in accounts.items():
        old = "" if account.seed else "  (a password of an older release; --replace-keys makes keys)"
        click.echo(f"account   {folder / user}.json{old}")
    click.echo("\nEach service takes its own account file: bus.json in its state directory, or")
    click.echo("signals.bus.credentials_file; signals.bus.url names the server.")


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon and port.isdecimal() and 0 < int(port) <= _PORT_MAX)
