"""Demangles names: `python -m stella_enricher.symbols.demangler`, started by `demangling`.

A name can be made to cost without bound, so this process has given up everything before it reads the first one: no
capability, no path, bounded memory and CPU time.

    stdin, stdout     u16 length and so many bytes, in the same order
"""

from __future__ import annotations

import struct
import sys
from typing import Final

from stella_enricher.symbols.names import demangled
from stella_shared.confinement import shut_in

_LENGTH: Final = struct.Struct("<H")
_ANSWER_BYTES_MAX: Final = 4096
_MEMORY_BYTES: Final = 256 << 20
_CPU_SECONDS: Final = 3600


def main() -> int:
    """Answer until the input ends."""
    shut_in(_MEMORY_BYTES, 0, _CPU_SECONDS)
    while len(head := sys.stdin.buffer.read(_LENGTH.size)) == _LENGTH.size:
        answer = demangled(sys.stdin.buffer.read(_LENGTH.unpack(head)[0])).encode()[:_ANSWER_BYTES_MAX]
        sys.stdout.buffer.write(_LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
