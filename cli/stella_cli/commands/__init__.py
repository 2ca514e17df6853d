"""Every command of `stella`: names, options and help.  The work is in the module each command names.

Those modules are imported when their command runs: `stella version` should not wait for a bus client.
Groups stand in `groups`, shared options in `options`; each other module here holds commands of one kind.
"""

from __future__ import annotations

import os
import sys

import click

from stella_cli import failure

# Importing them is what adds their commands to the groups; the order is that of the reference page.
from stella_cli.commands import itself, node, kernel, evidence, chain, signing, configuration  # isort: skip
from stella_cli.commands.groups import stella
from stella_shared.errors import StellaError

__all__ = ["chain", "configuration", "evidence", "itself", "kernel", "node", "run", "signing", "stella"]


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.  Every failure has been told on stderr by then."""
    as_json = failure.wants_json(arguments)
    if instruction := os.environ.get("_STELLA_COMPLETE"):
        from stella_cli import completing

        return completing.complete(stella, instruction)
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
