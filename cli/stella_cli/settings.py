"""Which configuration a command works with, and where the node it talks about keeps its state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stella_shared import config
from stella_shared.config import Signals
from stella_shared.errors import NotFound

SYSTEM_CONFIG: Final = Path("/etc/stellaops/stellaops.yaml")
LOCAL_CONFIG: Final = "stellaops.yaml"
CONFIG_VARIABLE: Final = "STELLA_CONFIG"


@dataclass(frozen=True)
class Settings:
    """The effective configuration and the file it came from (None: built-in defaults)."""

    path: Path | None
    signals: Signals
    state: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", config.state_directory(self.signals))

    @property
    def name(self) -> str:
        """The configuration's name for people."""
        return str(self.path) if self.path else "built-in defaults"


def config_path(given: str | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the configuration file: the one given, $STELLA_CONFIG, ./stellaops.yaml, the system's, or None.

    Raises `NotFound` when a file that was named is not there.
    """
    named = given or environ.get(CONFIG_VARIABLE, "")
    if named:
        path = Path(named).absolute()
        if not path.is_file():
            raise NotFound(
                f"no configuration file {path}",
                hint=f"make it: stella signals init --config {named}",
                runbook="configuration-reference",
            )
        return path
    for path in (Path(LOCAL_CONFIG).absolute(), SYSTEM_CONFIG):
        if path.is_file():
            return path
    return None


def load(given: str | None, target: str | None = None, **overrides: object) -> Settings:
    """Return the settings of a command: file, then environment, then `--target` and other flags.

    A keyword `metrics__port` overrides `metrics.port`.
    """
    path = config_path(given)
    flags = {key.replace("__", "."): value for key, value in overrides.items()}
    if target:
        flags["output_directory"] = str(Path(target).absolute())
    return Settings(path, config.load(path, os.environ, flags))
