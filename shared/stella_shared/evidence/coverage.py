"""What a statement says about the monitor comes from the collector's coverage document; this reads it.

The document itself is kept whole in the ledger.  Everything in it is optional: an older or newer collector
must not stop the signer.
"""

from __future__ import annotations

from typing import Any

import msgspec

# Bounds that keep a statement under its limit, whatever a document holds.
_TEXT_MAX = 96
_PROBES_MAX = 24


class Probe(msgspec.Struct, frozen=True):
    """A probe's name and whether it was attached."""

    name: str
    attached: bool


class Btf(msgspec.Struct, frozen=True):
    """Where the kernel's type information came from, and its digest."""

    source: str
    sha256: str


class Monitor(msgspec.Struct, frozen=True):
    """The part of a coverage document that goes into the statement; "" where it says nothing."""

    collector_version: str
    config_sha256: str
    probes: list[Probe]
    bpf_object_sha256: str
    btf: Btf
    kernel_release: str
    arch: str


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key, "")
    plain = isinstance(value, str) and value.isascii() and value.isprintable()
    return value[:_TEXT_MAX] if plain else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read(document: Any) -> Monitor:
    """Return what `document` says of the monitor; whatever is missing or of another shape reads as ""."""
    top = _mapping(document)
    probes = top.get("probes")
    rows = [_mapping(row) for row in probes] if isinstance(probes, list) else []
    btf = _mapping(top.get("btf"))
    return Monitor(
        collector_version=_text(top, "collector_version"),
        config_sha256=_text(top, "config_sha256").removeprefix("sha256:"),
        probes=[
            Probe(_text(row, "name"), row.get("attached") is True) for row in rows[:_PROBES_MAX] if _text(row, "name")
        ],
        bpf_object_sha256=_text(top, "bpf_object_sha256").removeprefix("sha256:"),
        btf=Btf(_text(btf, "source"), _text(btf, "sha256").removeprefix("sha256:")),
        kernel_release=_text(top, "kernel_release"),
        arch=_text(top, "arch"),
    )
