"""Commands that run a node and ask it."""

from __future__ import annotations

import click

from stella_cli.commands.groups import signals
from stella_cli.commands.options import everywhere, output_form, remembered, settings

_FILE = click.Path(dir_okay=False)


@signals.command(short_help="Make key, directories and configuration file.")
@everywhere
@click.option(
    "--output-directory",
    type=click.Path(file_okay=False),
    help="Evidence directory to write into a new configuration file.",
)
def init(output_directory: str | None) -> None:
    """Make the signing key, the directories and, if it is missing, the configuration file.

    Changes nothing that is there: run it as often as you like.

    \b
    Examples:
      stella signals init
      stella signals init --config ./stellaops.yaml
    """
    from stella_cli import initialising

    initialising.run(remembered("config"), output_directory or remembered("target"))


@signals.command("bus-config", short_help="Write the configuration of a NATS server of your own.")
@everywhere
@click.option(
    "--directory", required=True, type=click.Path(file_okay=False), help="Where nats.conf and the account files go."
)
@click.option("--listen", default="127.0.0.1:4222", show_default=True, metavar="ADDRESS:PORT", help="For clients.")
@click.option(
    "--store-directory",
    type=click.Path(file_okay=False),
    help="Where the server keeps its streams. Otherwise `jetstream` in --directory.",
)
@click.option("--monitor", default="", metavar="ADDRESS:PORT", help="Where it answers /healthz. Otherwise nowhere.")
@click.option(
    "--sync-seconds",
    type=click.IntRange(0, 3600),
    default=10,
    show_default=True,
    help="How often it syncs what it stores to the disk; 0: each message, before it is acknowledged.",
)
@click.option("--tls-certificate", "certificate", default="", type=_FILE, help="PEM file; needs --tls-key.")
@click.option("--tls-key", "key", default="", type=_FILE, help="PEM file; needs --tls-certificate.")
@click.option(
    "--tls-ca",
    "authority",
    default="",
    type=_FILE,
    help="PEM file: clients must show a certificate that one of these authorities has signed.",
)
@click.option("--replace-keys", is_flag=True, help="Make new keys for all accounts; the old ones cease to be valid.")
def bus_config(
    directory: str, store_directory: str | None, *, replace_keys: bool, sync_seconds: int, **server: str
) -> None:
    """Write the configuration of a NATS server of your own, for services that run apart.

    Beside nats.conf there is one account file for each service and for `operator` and `reader`: give each
    service its own, as bus.json in its state directory or by signals.bus.credentials_file.
    Accounts that are there are kept, so it can be run again, unless --replace-keys is given: stop the services and
    the server first, and give each service its new file before it starts.

    \b
    Example:
      stella signals bus-config --directory /etc/stellaops/bus --listen 0.0.0.0:4222 \
        --tls-certificate /etc/stellaops/tls/tls.crt --tls-key /etc/stellaops/tls/tls.key
    Exit codes: 0 written, 2 wrong use, 3 the directory cannot be written
    """
    from stella_cli import bus_files

    bus_files.write(directory, store_directory or "", replace=replace_keys, sync_seconds=sync_seconds, **server)


@signals.command(short_help="Run a node until it is stopped.")
@everywhere
@click.option("--detach", is_flag=True, help="Return when the node is ready, and leave it running.")
@click.option("--demo", is_flag=True, help="Replay recorded kernel events: no privilege needed.")
@click.option("--ready-fd", type=int, default=-1, hidden=True)
def start(detach: bool, demo: bool, ready_fd: int) -> None:
    """Run a node: bus, signer, enrichers, collector, gateway.

    Stays in the foreground until Ctrl-C or `stella signals stop`; then everything in flight is recorded
    and the last chunk is closed and signed.  A second Ctrl-C ends it at once.
    A part that dies is started again while the others go on.

    Collecting needs root, or CAP_BPF and CAP_PERFMON.  `--demo` needs nothing.

    \b
    Examples:
      sudo stella signals start
      sudo stella signals start --config ./stellaops.yaml --detach
      sudo stella signals start --target /var/lib/stellaops/evidence
      stella signals start --demo
    """
    from stella_cli import starting

    starting.run(remembered("config"), remembered("target"), detach=detach, demo=demo, ready_fd=ready_fd)


@signals.command(short_help="End the running node in order.")
@everywhere
@click.option("--reason", metavar="TEXT", help="Say in the last chunk, signed, that a planned gap follows, and why.")
def stop(reason: str | None) -> None:
    """End the running node in order: intake, what is in flight, the last chunk, its signature.

    \b
    Examples:
      sudo stella signals stop
      sudo stella signals stop --reason "kernel update"
    Exit codes: 0 ended, 3 not yours to stop, 4 nothing runs, 10 still stopping after the wait
    """
    from stella_cli import stopping

    stopping.run(settings(), reason)


@signals.command(short_help="Have the running node take up its changed configuration.")
@everywhere
@output_form("text", "json")
def reload(form: str | None) -> None:
    """Have the running node take up its changed configuration: as a whole, or not at all.

    Filters, limits, rotation, redaction, symbols, runtimes, the log and the transparency log can change while it
    runs, and no event is lost.  Where the evidence is, which probes there are, the key and the bus can not.

    \b
    Examples:
      stella config check /etc/stellaops/stellaops.yaml && sudo stella signals reload
      sudo systemctl reload stellaops-signals
    Exit codes: 0 taken up, 2 refused: the node goes on as before, 3 not your node, 4 nothing runs
    """
    from stella_cli import reloading

    reloading.run(settings(), form or "text")


@signals.command(short_help="Show what the running node does.")
@everywhere
@click.option("--verbose", "-v", is_flag=True, help="Everything the node knows about itself.")
@output_form("text", "json")
def status(verbose: bool, form: str | None) -> None:
    """Show what the running node does: its parts, what they count, where the evidence goes.

    \b
    Examples:
      stella signals status
      stella signals status --verbose
      stella signals status --format json
    Exit codes: 0 it runs, 4 nothing runs, 10 it runs but its gateway does not answer
    """
    from stella_cli import asking

    asking.status(settings(), verbose=verbose, as_json=form == "json")


@signals.command(short_help="Say whether the node is healthy, and why not.")
@everywhere
@output_form("text", "json")
def health(form: str | None) -> None:
    """Say whether the node is healthy, and which part is not and why.

    \b
    Example:
      stella signals health && echo good
    Exit codes: 0 healthy, 1 not healthy, 4 nothing runs, 10 the gateway does not answer
    """
    from stella_cli import asking

    asking.health(settings(), as_json=form == "json")


@signals.command(short_help="Show counters and gauges, one a line.")
@everywhere
@click.option("--memory", is_flag=True, help="Memory of each process, and sizes of caches.")
@output_form("text", "json")
def stats(memory: bool, form: str | None) -> None:
    """Show counters and gauges, one a line: name, value, unit.

    \b
    Examples:
      stella signals stats | grep ringbuf
      stella signals stats | grep rate
      watch -n 5 'stella signals stats'
      stella signals stats --memory
    """
    from stella_cli import asking

    asking.stats(settings(), memory=memory, as_json=form == "json")


@signals.command("cache-stats", short_help="Show what the node's caches hold.")
@everywhere
@output_form("table", "json")
def cache_stats(form: str | None) -> None:
    """Show each cache of the running node: entries, bound, hit rate, memory, and unknowns by reason.

    \b
    containers     cgroup → container; unknown: lookups since the start that named none
    images         container → image, labels, pod; unknown: containers without an image now
    symbols        resolved addresses
    symbol_tables  tables of files; unknown: files without one
    arguments      command lines that were looked through for secrets
    \b
    Examples:
      stella signals cache-stats
      stella signals cache-stats --format json
    Exit codes: 0 shown, 4 nothing runs, 10 it runs but its gateway does not answer
    """
    from stella_cli import caches

    caches.run(settings(), as_json=form == "json")


@signals.command(short_help="Show events as they come.")
@everywhere
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only this event type. May be repeated.")
@click.option("--count", type=click.IntRange(min=1), help="Stop after this many events.")
@output_form("table", "json", default="table on a terminal, json in a pipe")
def tail(types: tuple[str, ...], count: int | None, form: str | None) -> None:
    """Show events as they come: a table on a terminal, the exact evidence lines in a pipe.

    The lines are byte for byte what gets signed.  Events from before the command are not shown.

    \b
    Examples:
      stella signals tail
      stella signals tail --type process_exec --type net_connect
      stella signals tail --type file_open --count 100 > opens.ndjson
    Types: file_open, process_exec, tcp_state, net_connect, ssl_op, function_call
    """
    from stella_cli import tailing

    tailing.run(settings(), list(types), count, form)


@signals.command("support-bundle", short_help="Pack what a support case needs, without secrets.")
@everywhere
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The archive to write. Without it: stella-support-NODE-TIME.tar.gz here.",
)
@click.option("--no-verify", is_flag=True, help="Leave the verification of the chain out: it reads all evidence.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def support_bundle(output: str | None, no_verify: bool, force: bool) -> None:
    """Pack what a support case needs into one archive: state, figures, configuration, kernel, logs, chain.

    Works whether or not a node runs; what cannot be collected says why in its manifest.json.
    Passwords, keys and tokens of the node are taken out.  Logs may hold names and paths: look through it.

    \b
    Examples:
      sudo stella signals support-bundle
      sudo stella signals support-bundle --output case-17.tar.gz --no-verify
    Exit codes: 0 written, 2 the file is there, 3 it cannot be written
    """
    from stella_cli import bundling

    bundling.run(settings(), output, verify=not no_verify, force=force)


@signals.command(short_help="Show what the node does, live.")
@everywhere
@click.option("--once", is_flag=True, help="Print one frame and end, as in a pipe.")
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
def top(once: bool, interval: float) -> None:
    """Show what the node does, live: rates by type, ring, queues, drops, the chain, what waits for the log.

    q quits.  A node that goes away is said to be away, and is shown again when it is back.
    The same is on the gateway's page: http://localhost:9090/

    \b
    Examples:
      stella signals top
      stella signals top --once | head -20
    Exit codes: 0 ended, 4 nothing runs, 10 it runs but its gateway does not answer
    """
    from stella_cli import live_view

    live_view.run(settings(), once=once, interval_seconds=interval)
