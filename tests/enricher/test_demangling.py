"""The demangler's own process: names in, names out, and what happens when it does not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from stella_enricher.symbols.demangling import Demangler


@pytest.fixture
def demangler() -> Iterator[Demangler]:
    """A demangler whose child ends with the test."""
    made = Demangler()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN4shop4Till4takeEi", "shop::Till::take(int)"),
        ("_RNvCs1234_7mycrate3foo", "mycrate::foo"),
        ("_ZNSt6vectorIiSaIiEE9push_backEOi", "std::vector<int, std::allocator<int>>::push_back(int&&)"),
        ("_Znot_mangled_at_all", None),
        ("_Z" + "\n" * 40, None),
        ("_Z" + "N1a" * 1300, None),
    ],
)
def test_names_come_out_as_people_write_them(demangler: Demangler, mangled: str, name: str | None) -> None:
    """C++ and Rust; what is no mangled name has none, and the next one is answered all the same."""
    assert name == demangler.demangled(mangled)
    assert "a()" == demangler.demangled("_Z1av")


def test_a_child_that_has_ended_is_replaced(demangler: Demangler) -> None:
    """The name under way has no answer; after a pause another child is started."""
    assert "a()" == demangler.demangled("_Z1av")
    assert demangler._process is not None
    os.kill(demangler._process.pid, signal.SIGKILL)
    demangler._process.wait()
    assert demangler.demangled("_Z1bv") is None
    assert demangler.demangled("_Z1cv") is None, "not at once"
    assert "a()" == demangler.demangled("_Z1av"), "what is known stays known"
    demangler._not_before = 0.0
    assert "c()" == demangler.demangled("_Z1cv")


def test_the_child_has_no_powers(demangler: Demangler) -> None:
    """It has no capability and cannot gain one."""
    demangler.demangled("_Z1av")
    assert demangler._process is not None
    with open(f"/proc/{demangler._process.pid}/status", encoding="ascii") as file:
        rows = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert ("0000000000000000", "1") == (rows["CapEff"], rows["NoNewPrivs"])
