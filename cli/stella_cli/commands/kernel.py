"""Commands about the probes in the kernel."""

from __future__ import annotations

from stella_cli.commands.groups import signals
from stella_cli.commands.options import everywhere, output_form, settings


@signals.command("test-probes", short_help="Say which probes attach on this kernel.")
@everywhere
@output_form("text", "json")
def test_probes(form: str | None) -> None:
    """Attach every probe once, detach it again, and say which work on this kernel.

    \b
    Example:
      sudo stella signals test-probes
    Exit codes: 0 all attach, 1 some do not
    """
    from stella_cli import probing

    probing.run(settings(), as_json=form == "json")
