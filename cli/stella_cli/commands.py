"""Every command of `stella`: names, options and help.  The work is in the module each command names.

Those modules are imported when their command runs: `stella version` should not wait for a bus client.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from stella_cli import failure
from stella_shared.errors import StellaError

_F = TypeVar("_F", bound=Callable[..., Any])
_META = "stella_cli."

EXIT_CODES = """\b
Exit codes:
  0   done, and the answer is good
  1   done, and the answer is bad (chain invalid, unhealthy)
  2   wrong use, or a configuration that cannot be used
  3   not permitted: the message names what is missing
  4   not found: nothing runs, no such file
  5   the network is needed, and offline was asked for
  10  try again: busy, starting, time-out
"""


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    # An option given after the command wins over the same one given before it.
    if value:
        context.meta[_META + str(parameter.name)] = value


def _remembered(name: str) -> Any:
    return click.get_current_context().meta.get(_META + name)


def _everywhere(function: _F) -> _F:
    """Add the options that every command takes, before or after its name."""
    for option in (
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=_remember, help="Show tracebacks of faults."
        ),
        click.option(
            "--target",
            type=click.Path(file_okay=False),
            expose_value=False,
            callback=_remember,
            help="Evidence directory, in place of signals.output_directory.",
        ),
        click.option(
            "--config",
            type=click.Path(dir_okay=False),
            expose_value=False,
            callback=_remember,
            help="Configuration file. Otherwise $STELLA_CONFIG, ./stellaops.yaml, "
            "/etc/stellaops/stellaops.yaml, or built-in defaults.",
        ),
    ):
        function = option(function)
    return function


def _format(*choices: str, default: str = "text") -> Callable[[_F], _F]:
    return click.option("--format", "form", type=click.Choice(choices), help=f"Output form. Without it: {default}.")


def _trust_options(function: _F) -> _F:
    """Add the options that say whom to believe."""
    for option in (
        click.option(
            "--trusted-root",
            type=click.Path(dir_okay=False),
            help="Sigstore trusted_root.json: whose logs and authorities count. Otherwise the one this node used last; "
            "never one out of the evidence.",
        ),
        click.option(
            "--identity",
            "identities",
            multiple=True,
            nargs=2,
            metavar="SUBJECT ISSUER",
            help="A keyless signer to trust: the certificate's subject, and the OIDC issuer. May be repeated.",
        ),
        click.option(
            "--key",
            "keys",
            multiple=True,
            metavar="KEY",
            help="A key to trust: its fingerprint (sha256:…) or a PEM file. May be repeated. "
            "Otherwise the keys this node knows; never one out of the evidence.",
        ),
    ):
        function = option(function)
    return function


def _named(keys: tuple[str, ...], identities: tuple[tuple[str, str], ...], trusted_root: str | None) -> Any:
    from stella_cli.verifying import NamedTrust
    from stella_shared.evidence.transparency.certificate import Identity

    return NamedTrust(list(keys), [Identity(*pair) for pair in identities], trusted_root or "")


def _settings(**overrides: object) -> Any:
    from stella_cli import settings

    return settings.load(_remembered("config"), _remembered("target"), **overrides)


@click.group(
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@_everywhere
def stella() -> None:
    """Runtime evidence from the kernel: collected, signed, verifiable.

    \b
    First steps, as root:
      stella signals init
      stella signals start
    """


@stella.command()
@_format("text", "json")
def version(form: str | None) -> None:
    """Show the version of Stella Signals and of what it runs on.

    \b
    Example:
      stella version --format json
    """
    from stella_cli import versions

    versions.show(as_json=form == "json")


@stella.group(epilog=EXIT_CODES)
@_everywhere
def signals() -> None:
    """Run a node, watch it, and check its evidence."""


@signals.command(short_help="Make key, directories and configuration file.")
@_everywhere
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

    initialising.run(_remembered("config"), output_directory or _remembered("target"))


@signals.command(short_help="Run a node until it is stopped.")
@_everywhere
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

    starting.run(_remembered("config"), _remembered("target"), detach=detach, demo=demo, ready_fd=ready_fd)


@signals.command(short_help="End the running node in order.")
@_everywhere
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

    stopping.run(_settings(), reason)


@signals.command(short_help="Have the running node take up its changed configuration.")
@_everywhere
@_format("text", "json")
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

    reloading.run(_settings(), form or "text")


@signals.command(short_help="Show what the running node does.")
@_everywhere
@click.option("--verbose", "-v", is_flag=True, help="Everything the node knows about itself.")
@_format("text", "json")
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

    asking.status(_settings(), verbose=verbose, as_json=form == "json")


@signals.command(short_help="Say whether the node is healthy, and why not.")
@_everywhere
@_format("text", "json")
def health(form: str | None) -> None:
    """Say whether the node is healthy, and which part is not and why.

    \b
    Example:
      stella signals health && echo good
    Exit codes: 0 healthy, 1 not healthy, 4 nothing runs, 10 the gateway does not answer
    """
    from stella_cli import asking

    asking.health(_settings(), as_json=form == "json")


@signals.command(short_help="Show counters and gauges, one a line.")
@_everywhere
@click.option("--memory", is_flag=True, help="Memory of each process, and sizes of caches.")
@_format("text", "json")
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

    asking.stats(_settings(), memory=memory, as_json=form == "json")


@signals.command(short_help="Show events as they come.")
@_everywhere
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only this event type. May be repeated.")
@click.option("--count", type=click.IntRange(min=1), help="Stop after this many events.")
@_format("table", "json", default="table on a terminal, json in a pipe")
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

    tailing.run(_settings(), list(types), count, form)


@signals.command("test-probes", short_help="Say which probes attach on this kernel.")
@_everywhere
@_format("text", "json")
def test_probes(form: str | None) -> None:
    """Attach every probe once, detach it again, and say which work on this kernel.

    \b
    Example:
      sudo stella signals test-probes
    Exit codes: 0 all attach, 1 some do not
    """
    from stella_cli import probing

    probing.run(_settings(), as_json=form == "json")


@signals.command("verify-chain", short_help="Check evidence: a directory or an archive.")
@_everywhere
@click.argument("path", type=click.Path())
@click.option("--verbose", "-v", is_flag=True, help="Show every chunk and every fault.")
@_format("text", "json")
@click.option("--offline", is_flag=True, help="Use no network. Verification never does; the flag says so.")
@click.option(
    "--head",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="A newer statement kept elsewhere, to see a cut at the end: head.json, a manifest, or the dsse.json or "
    "sigstore.json of a later chunk.",
)
@click.option(
    "--require-log", is_flag=True, help="Every signed chunk must be in a trusted log, itself or by a later one."
)
@_trust_options
def verify_chain(
    *,
    path: str,
    verbose: bool,
    form: str | None,
    offline: bool,
    head: str | None,
    require_log: bool,
    keys: tuple[str, ...],
    identities: tuple[tuple[str, str], ...],
    trusted_root: str | None,
) -> int:
    """Check evidence: every line, chunk, signature and the chain, and that nothing is unaccounted for.

    PATH is an evidence directory, what `import` made, or an archive (.tar.gz): of a directory, or by `export`.

    \b
    Examples:
      stella signals verify-chain /var/lib/stellaops/evidence/
      stella signals verify-chain evidence.tar.gz --key signer.pem --trusted-root trusted_root.json
      stella signals verify-chain january-evidence.tar.gz --head manifest.json
      stella signals verify-chain /var/lib/stellaops/evidence/ --verbose --format json
    Exit codes: 0 valid, 1 invalid (the output says at which chunk and why), 4 no such path
    """
    from stella_cli import verifying

    return verifying.run(
        Path(path),
        config=_remembered("config"),
        target=_remembered("target"),
        named=_named(keys, identities, trusted_root),
        head=head,
        require_log=require_log,
        verbose=verbose,
        as_json=form == "json",
    )


@signals.command("resubmit-pending", short_help="Submit to the log what is not in it yet.")
@_everywhere
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0, 86400),
    default=0.0,
    metavar="SECONDS",
    help="Go on trying this long while the log does not answer. Without it: not at all.",
)
@_format("text", "json")
def resubmit_pending(wait_seconds: float, form: str | None) -> None:
    """Submit signed chunks to the transparency log that are not in it yet, and those it refused before.

    Safe to run while the node runs, and to run twice: the same bytes are submitted, and nothing is logged twice.
    Works with signals.signing.submit_to_rekor switched off, as long as a log is configured.

    \b
    Examples:
      stella signals resubmit-pending
      stella signals resubmit-pending --wait 600
    Exit codes: 0 nothing is left, 1 the log refused some for good, 2 no log is configured, 10 some are left
    """
    from stella_cli import resubmitting

    resubmitting.run(_settings(), wait_seconds=wait_seconds, as_json=form == "json")


@stella.group(epilog=EXIT_CODES)
@_everywhere
def signer() -> None:
    """Ask the signer: which key signs, and what waits for the transparency log."""


@signer.command("status", short_help="Show key, services, queue and last error of the signer.")
@_everywhere
@_format("text", "json")
def signer_status(form: str | None) -> None:
    """Show which key signs, which log and authorities are used, what waits to be logged, and the last error.

    \b
    Examples:
      stella signer status
      stella signer status --format json
    Exit codes: 0 it works, 1 it cannot sign or submit, 4 nothing runs, 10 the gateway does not answer
    """
    from stella_cli import signer_status as status_of_signer

    status_of_signer.run(_settings(), as_json=form == "json")


@signals.command(short_help="Write a proof that a line is in a signed chunk.")
@_everywhere
@click.argument("events", metavar="EVENT...", nargs=-1, required=True)
@click.option(
    "--evidence",
    type=click.Path(file_okay=False),
    help="Evidence directory to prove from, if it is not the node's.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="File to write one proof to. Without it: stdout.")
@click.option(
    "--output-directory",
    type=click.Path(file_okay=False),
    help="Directory to write proofs to, as proof-CHUNK-LINE.json. Without it several go to the current directory.",
)
def prove(events: tuple[str, ...], evidence: str | None, output: str | None, output_directory: str | None) -> None:
    """Write a small file that proves one evidence line to be in a signed chunk, without showing the others.

    EVENT names a line: RUN/LANE/SEQ as they stand in it, or CHUNK:LINE counted from 1, or - to read
    evidence lines from stdin and prove each of them.  Chunks that are open or not signed prove nothing yet.

    \b
    Examples:
      stella signals prove 57e2e7ab61a13058/4/1 --output proof.json
      stella signals prove 42:17 42:18 --output-directory proofs
      grep '"path":"/etc/shadow"' 000042.ndjson | stella signals prove -
    Exit codes: 0 written, 1 the evidence is damaged, 4 no such line, 10 not signed yet
    """
    from stella_cli import proving

    place = Path(evidence or _settings().signals.output_directory)
    proving.prove(list(events), place, output=output, directory=output_directory)


@signals.command("verify-proof", short_help="Check proofs that lines are in signed chunks.")
@_everywhere
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@_format("text", "json")
@_trust_options
def verify_proof(
    *,
    files: tuple[str, ...],
    form: str | None,
    keys: tuple[str, ...],
    identities: tuple[tuple[str, str], ...],
    trusted_root: str | None,
) -> int:
    """Check proofs of `stella signals prove`: the line, its way to the Merkle root, and the signature.

    Needs no evidence and no network.  FILE - is stdin.

    \b
    Examples:
      stella signals verify-proof proof.json --key sha256:…
      stella signals prove 42:17 | stella signals verify-proof -
      stella signals verify-proof proofs/*.json --key signer.pem --format json
    Exit codes: 0 all valid, 1 one is not (the output says why), 4 no such file
    """
    from stella_cli import proving

    return proving.verify(
        list(files),
        config=_remembered("config"),
        target=_remembered("target"),
        named=_named(keys, identities, trusted_root),
        as_json=form == "json",
    )


@signals.command(short_help="Remove the lines of old chunks; the chain stays.")
@_everywhere
@click.option("--keep-chain-state", is_flag=True, help="Keep ledgers and signatures. Must be given.")
@click.option("--older-than", metavar="AGE", required=True, help="Chunks that ended longer ago: 90m, 12h, 7d, 4w.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
def cleanup(keep_chain_state: bool, older_than: str, dry_run: bool) -> None:
    """Remove the lines of old chunks and keep what proves the chain: ledgers, signatures, proofs.

    A signed note in the chain says first what goes, so that verify-chain finds the chunks ARCHIVED and not
    missing.  The first chunk and the newest signed one stay, and so does what is not in its log yet.
    Works while the node runs and while it does not.

    \b
    Examples:
      stella signals cleanup --keep-chain-state --older-than 7d
      stella signals cleanup --keep-chain-state --older-than 12h --dry-run
    Exit codes: 0 done, or nothing to do; 1 the chain does not verify; 10 the signer did not answer in time
    """
    from stella_cli import cleaning

    cleaning.run(_settings(), older_than, keep_chain_state=keep_chain_state, dry_run=dry_run)


@signals.command("reset-chain", short_help="Leave the chain for a new one that names it.")
@_everywhere
@click.option("--confirm", is_flag=True, help="Do it. Without this the command only says what it would do.")
@click.option("--reason", metavar="TEXT", help="Why; it stands in the new chain.")
def reset_chain(confirm: bool, reason: str | None) -> None:
    """Move the evidence aside, whole, and begin a new chain that names the old one and the reason.

    The node must be stopped.  The old evidence goes to a directory beside it and verifies there as before.
    What a crash leaves half done is completed by the same command, or by init.

    \b
    Example:
      stella signals reset-chain --confirm --reason "disk was replaced"
    Exit codes: 0 done, 2 without --confirm, 4 there is no chain, 10 a node or a signer runs
    """
    from stella_cli import resetting

    resetting.run(_settings(), confirm=confirm, reason=reason)


@signals.command(short_help="Write a part of the chain into one signed archive.")
@_everywhere
@click.option("--from", "start", metavar="TIME", default="", help="First day (UTC, inclusive) or RFC 3339 time.")
@click.option("--to", "end", metavar="TIME", default="", help="Last day (UTC, inclusive) or RFC 3339 time.")
@click.option("--include-proofs", is_flag=True, help="With the bundles, timestamps and certificates of logs.")
@click.option("--output", metavar="FILE", required=True, help="The archive to write: a name in .tar.gz.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def export(start: str, end: str, include_proofs: bool, output: str, force: bool) -> None:
    """Write the signed chunks that were open in a time into one archive, with a manifest signed by this node.

    Without --from and --to it is the whole chain.  The same chunks give the same bytes.

    \b
    Example:
      stella signals export --from 2026-01-01 --to 2026-01-31 --include-proofs --output january-evidence.tar.gz
    Exit codes: 0 written, 1 the chain does not verify, 2 the file is there, 4 no chunk was open in that time
    """
    from stella_cli import exporting

    exporting.run(_settings(), start, end, output, proofs=include_proofs, force=force)


@signals.command(short_help="Show what an exported archive holds, as JSON.")
@_everywhere
@click.argument("archive", type=click.Path())
def manifest(archive: str) -> None:
    """Show what an exported archive holds: its digest, its signed manifest, every file.

    Carry the output apart from the archive: import and verify-chain compare the archive with it.

    \b
    Example:
      stella signals manifest january-evidence.tar.gz > manifest.json
    Exit codes: 0 it is whole, 1 it is not, 4 no such file
    """
    from stella_cli import exporting

    exporting.manifest(archive)


@signals.command("import", short_help="Check an exported archive and put it in place.")
@_everywhere
@click.argument("archive", type=click.Path())
@click.option("--to", default="/imported/evidence", show_default=True, metavar="DIR", help="Where to put it.")
@click.option("--manifest", "carried", metavar="FILE", help="What `stella signals manifest` said of this archive.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="A key to trust, remembered beside DIR: its fingerprint (sha256:…) or a PEM file. May be repeated. "
    "Otherwise the keys known there and on this node.",
)
def import_(archive: str, to: str, carried: str | None, keys: tuple[str, ...]) -> None:
    """Check an exported archive, wholly, and only then put its evidence in place.

    An archive that is refused leaves nothing behind.  The next part of the same chain joins what is there.

    \b
    Examples:
      stella signals import january-evidence.tar.gz --key signer.pem
      stella signals import february-evidence.tar.gz --manifest february.json --to ./evidence
    Exit codes: 0 imported, 1 refused, 2 no key is trusted or the place is taken, 4 no such file
    """
    from stella_cli import importing

    importing.run(
        archive,
        to,
        carried=carried,
        given=list(keys),
        config=_remembered("config"),
        target=_remembered("target"),
    )


@signals.command(short_help="Name the functions of stack frames.")
@_everywhere
@click.argument("inputs", metavar="[FILE|BUILD_ID+OFFSET|-]...", nargs=-1)
@click.option(
    "--debug-directory",
    "directories",
    multiple=True,
    type=click.Path(file_okay=False),
    help="Folder of binaries and debug files, searched through before the configured ones. May be repeated.",
)
@click.option("--offline", is_flag=True, help="Ask no debuginfod server, whatever the configuration says.")
@_format("text", "json")
def symbolize(inputs: tuple[str, ...], directories: tuple[str, ...], offline: bool, form: str | None) -> int:
    """Name the functions that stack frames point into, beside the evidence lines; the lines are never changed.

    Reads evidence lines, or words BUILD_ID+OFFSET, from files, arguments or stdin.
    An address needs no live process and no node: give the binary, or its debug file with it, on any machine.
    Answers are kept tables of this node first, then --debug-directory, then the configured directories.

    \b
    Examples:
      stella signals tail --type net_connect | stella signals symbolize
      stella signals symbolize 000042.ndjson --debug-directory ./binaries --format json
      stella signals symbolize 93ac61ec5a8eb1396f9fbd350e3169a558528a40+0x104cf0
    Exit codes: 0 something was resolved, 1 nothing was (the output has the reasons), 4 no such file
    """
    from stella_cli import symbolizing

    return symbolizing.run(_settings(), list(inputs), list(directories), offline=offline, as_json=form == "json")


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.  Every failure has been told on stderr by then."""
    as_json = failure.wants_json(arguments)
    try:
        code = stella.main(args=arguments, prog_name="stella", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else failure.EXIT_OK
    except StellaError as e:
        return failure.tell_stella_error(e, as_json=as_json)
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        return e.exit_code
    except click.ClickException as e:
        return failure.tell_usage(e, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return failure.EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader has seen enough (click turns a refused write into SystemExit).  That is no failure of ours,
        # and Python must not complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return failure.EXIT_OK
    except Exception as e:
        return failure.tell_unknown(e, debug="--debug" in arguments, as_json=as_json)
