"""Build hook: makes the native parts before a wheel is put together.

`make install` builds them first and then installs; this hook serves a plain `pip install .`.  Where clang or
a C compiler is missing the wheel is made all the same, and the collector says at its start what to install.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeParts(BuildHookInterface):  # type: ignore[type-arg]
    """Runs bpf/Makefile when something is missing; marks the wheel as one for this kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, unless everything stands."""
        wanted = [
            Path(self.root) / path
            for path in (
                "services/collector/stella_collector/native/stella.bpf.o",
                "services/collector/stella_collector/native/ring.so",
                "services/collector/stella_collector/native/libbpf.so.1",
                "services/enricher/stella_enricher/native/lines.so",
                "shared/stella_shared/evidence/native/merkle.so",
                "shared/stella_shared/evidence/native/lines.so",
                "shared/stella_shared/native/confine.so",
            )
        ]
        if not all(path.exists() for path in wanted):
            if shutil.which("make") is None:
                self.app.display_warning("make is missing: the collector's native parts are not built")
            else:
                done = subprocess.run(
                    ["make", "-s", "-k", "-C", "bpf", f"PYTHON={sys.executable}"], cwd=self.root, check=False
                )
                if done.returncode:
                    self.app.display_warning("some native parts were not built; see bpf/Makefile for what they need")
        if any(path.exists() for path in wanted):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
