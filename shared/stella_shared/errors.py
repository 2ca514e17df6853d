"""Every way this system says no, in one tree.

    StellaError
    ├── BadAnswer        exit 1   the question was answered, and the answer is bad (chain invalid, unhealthy)
    ├── UsageError       exit 2   wrong use of a command
    │   └── ConfigError  exit 2   a configuration that cannot be used
    ├── NotPermitted     exit 3   the kernel or the file system refused; the hint names capability and fix
    ├── NotFound         exit 4   the thing asked about does not exist
    ├── OfflineError     exit 5   the network is needed and was forbidden or absent
    ├── TryAgain         exit 10  a passing condition: busy, starting, time-out
    └── BrokenPromise    exit 1   a contract between two of our own parts does not hold

`str(error)` names the thing and the reason; `hint` says what to do; `runbook` names the section of the
operator runbook (docs/runbook.md) that explains it.  Foreign exceptions are translated into these at the
edge modules; nothing above them catches a foreign type.
"""

from __future__ import annotations

from typing import ClassVar


class StellaError(Exception):
    """Base of every error we raise on purpose."""

    exit_code: ClassVar[int] = 1
    runbook: str = ""

    def __init__(self, message: str, *, hint: str = "", runbook: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if runbook:
            self.runbook = runbook


class BadAnswer(StellaError):
    """The answer is bad.  What was asked about has been examined completely."""

    exit_code = 1


class BrokenPromise(StellaError):
    """Two of our own parts disagree (layout, ledger arithmetic).  Always a bug: report it."""

    exit_code = 1


class UsageError(StellaError):
    """A command was used wrongly.  Nothing was done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration cannot be used.  The message names the key and, when one is near, the key meant."""

    runbook = "configuration-reference"


class NotPermitted(StellaError):
    """The kernel or the file system refused.  The hint names the capability or the owner that is missing."""

    exit_code = 3
    runbook = "issue-probe-failed-to-attach"


class NotFound(StellaError):
    """The thing asked about is not there."""

    exit_code = 4


class OfflineError(StellaError):
    """The network is needed for this, and it is absent or was forbidden."""

    exit_code = 5


class TryAgain(StellaError):
    """A passing condition.  The same call may work later."""

    exit_code = 10
