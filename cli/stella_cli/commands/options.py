"""Options that many commands share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

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


def remembered(name: str) -> Any:
    """Return what was given for an option of `everywhere`, or None."""
    return click.get_current_context().meta.get(_META + name)


def everywhere(function: _F) -> _F:
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


def output_form(*choices: str, default: str = "text") -> Callable[[_F], _F]:
    """Add `--format`, which arrives as `form`; None when it was not given."""
    return click.option("--format", "form", type=click.Choice(choices), help=f"Output form. Without it: {default}.")


def trust_options(function: _F) -> _F:
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


def named_trust(keys: tuple[str, ...], identities: tuple[tuple[str, str], ...], trusted_root: str | None) -> Any:
    """Return the trust that `trust_options` gave."""
    from stella_cli.verifying import NamedTrust
    from stella_shared.evidence.transparency.certificate import Identity

    return NamedTrust(list(keys), [Identity(*pair) for pair in identities], trusted_root or "")


def settings(**overrides: object) -> Any:
    """Return the configuration that this command works with."""
    from stella_cli import settings

    return settings.load(remembered("config"), remembered("target"), **overrides)
