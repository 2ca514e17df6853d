"""Commands that carry a chain away, clear it up or begin a new one."""

from __future__ import annotations

import click

from stella_cli.commands.groups import signals
from stella_cli.commands.options import everywhere, remembered, settings


@signals.command(short_help="Remove the lines of old chunks; the chain stays.")
@everywhere
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

    cleaning.run(settings(), older_than, keep_chain_state=keep_chain_state, dry_run=dry_run)


@signals.command("reset-chain", short_help="Leave the chain for a new one that names it.")
@everywhere
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

    resetting.run(settings(), confirm=confirm, reason=reason)


@signals.command(short_help="Write a part of the chain into one signed archive.")
@everywhere
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

    exporting.run(settings(), start, end, output, proofs=include_proofs, force=force)


@signals.command(short_help="Show what an exported archive holds, as JSON.")
@everywhere
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
@everywhere
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
        config=remembered("config"),
        target=remembered("target"),
    )
