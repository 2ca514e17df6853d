"""Commands that read evidence: verify it, prove from it, name its functions."""

from __future__ import annotations

from pathlib import Path

import click

from stella_cli.commands.groups import signals
from stella_cli.commands.options import everywhere, named_trust, output_form, remembered, settings, trust_options


@signals.command("verify-chain", short_help="Check evidence: a directory or an archive.")
@everywhere
@click.argument("path", type=click.Path())
@click.option("--verbose", "-v", is_flag=True, help="Show every chunk and every fault.")
@output_form("text", "json")
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
@trust_options
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
        config=remembered("config"),
        target=remembered("target"),
        named=named_trust(keys, identities, trusted_root),
        head=head,
        require_log=require_log,
        verbose=verbose,
        as_json=form == "json",
    )


@signals.command(short_help="Write a proof that a line is in a signed chunk.")
@everywhere
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
      stella signals lines 42 | grep '"path":"/etc/shadow"' | stella signals prove -
    Exit codes: 0 written, 1 the evidence is damaged, 4 no such line, 10 not signed yet
    """
    from stella_cli import proving

    place = Path(evidence or settings().signals.output_directory)
    proving.prove(list(events), place, output=output, directory=output_directory)


@signals.command(short_help="Print the evidence lines of chunks.")
@everywhere
@click.argument("chunks", metavar="[CHUNK|FIRST-LAST]...", nargs=-1)
@click.option("--evidence", type=click.Path(), help="Evidence directory to read from, if it is not the node's.")
def lines(chunks: tuple[str, ...], evidence: str | None) -> None:
    """Print the evidence lines of chunks as they were recorded, of all of them when none is named.

    Chunk files are zstd frames of lines, so `zstdcat` prints them as well.
    Nothing is checked here; that is for `stella signals verify-chain`.

    \b
    Examples:
      stella signals lines 42 | grep '"path":"/etc/shadow"'
      stella signals lines 40-42 | stella signals symbolize
      stella signals lines --evidence january/evidence > january.ndjson
    Exit codes: 0 printed, 1 a chunk's file is damaged, 3 it may not be read, 4 no such chunk
    """
    from stella_cli import reading

    reading.lines(Path(evidence or settings().signals.output_directory), list(chunks))


@signals.command("verify-proof", short_help="Check proofs that lines are in signed chunks.")
@everywhere
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@output_form("text", "json")
@trust_options
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
        config=remembered("config"),
        target=remembered("target"),
        named=named_trust(keys, identities, trusted_root),
        as_json=form == "json",
    )


@signals.command(short_help="Name the functions of stack frames.")
@everywhere
@click.argument("inputs", metavar="[FILE|BUILD_ID+OFFSET|-]...", nargs=-1)
@click.option(
    "--debug-directory",
    "directories",
    multiple=True,
    type=click.Path(file_okay=False),
    help="Folder of binaries and debug files, searched through before the configured ones. May be repeated.",
)
@click.option("--offline", is_flag=True, help="Ask no debuginfod server, whatever the configuration says.")
@output_form("text", "json")
def symbolize(inputs: tuple[str, ...], directories: tuple[str, ...], offline: bool, form: str | None) -> int:
    """Name the functions that stack frames point into, beside the evidence lines; the lines are never changed.

    Reads evidence lines, or words BUILD_ID+OFFSET, from files, arguments or stdin.
    An address needs no live process and no node: give the binary, or its debug file with it, on any machine.
    Answers are kept tables of this node first, then --debug-directory, then the configured directories.

    \b
    Examples:
      stella signals tail --type net_connect | stella signals symbolize
      stella signals lines 42 | stella signals symbolize --debug-directory ./binaries --format json
      stella signals symbolize 93ac61ec5a8eb1396f9fbd350e3169a558528a40+0x104cf0
    Exit codes: 0 something was resolved, 1 nothing was (the output has the reasons), 4 no such file
    """
    from stella_cli import symbolizing

    return symbolizing.run(settings(), list(inputs), list(directories), offline=offline, as_json=form == "json")


@signals.command(short_help="Say what was seen of an image or a container.")
@everywhere
@click.argument("subject", metavar="SUBJECT")
@click.option(
    "--evidence", type=click.Path(), help="Evidence directory or archive to look into, if it is not the node's."
)
@click.option("--top", type=click.IntRange(1, 50_000), default=10, show_default=True, help="Rows of each kind.")
@output_form("text", "json")
@trust_options
def inspect(
    *,
    subject: str,
    evidence: str | None,
    top: int,
    form: str | None,
    keys: tuple[str, ...],
    identities: tuple[tuple[str, str], ...],
    trusted_root: str | None,
) -> int:
    """Say what an image or a container was seen to do, since when, and how far that is all of it.

    SUBJECT is an image digest (sha256:…), a container id (docker://…, or its beginning), or the beginning of a
    container's name.  The evidence is verified first, then searched; no node and no network is needed.
    For each kind (files, programs, connections, functions, TLS) it lists what was seen, with the place of a line to
    prove it by, and says whether silence means absence: which probes watched, what was lost, when nothing ran.

    \b
    Examples:
      stella signals inspect sha256:9f1c…
      stella signals inspect 4be1c2d3e4f5 --top 50
      stella signals inspect sha256:9f1c… --evidence january-evidence.tar.gz --key signer.pem --format json
    Exit codes: 0 answered, seen or not; 1 the evidence does not verify (what it shows is shown), 4 no evidence
    """
    from stella_cli import inspecting

    return inspecting.run(
        subject,
        evidence=evidence,
        config=remembered("config"),
        target=remembered("target"),
        named=named_trust(keys, identities, trusted_root),
        top=top,
        as_json=form == "json",
    )
