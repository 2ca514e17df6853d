"""Archives: nothing is written but the files of evidence into the private directory; a bad one is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from stella_shared.errors import StellaError
from stella_shared.evidence import archive, names


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    room = Path(tempfile.mkdtemp(prefix="fuzz-archive-", dir=folder))
    path = room / "evidence.tar.gz"
    tempfile.tempdir = str(room)

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with archive.unpacked(path) as inside:
                assert {inside.directory, path} == set(room.iterdir())
                for found in inside.directory.rglob("*"):
                    if found == inside.directory / names.KEYS:
                        continue
                    assert found.is_file() and not found.is_symlink()
                    where = found.relative_to(inside.directory)
                    if where.parts[0] == names.KEYS:
                        assert len(where.parts) == 2 and names.parse_key_file(where.name)
                    elif where.name != names.CHAIN:
                        file = names.parse_chunk_file(str(where))
                        assert file and names.chunk_file(file.index, file.kind) == where.name
        except StellaError:
            pass
        assert [path] == list(room.iterdir()), "something was left behind"

    return one
