"""Watched functions through a whole node: the evidence has each call, by name, and says what was watched."""

from __future__ import annotations

import subprocess
import time
from collections import Counter

import jsonschema
import pytest

from stella_shared.events import json_schema
from tests.collector.functions_kit import CALLER, build_id_of, compiled, entry, wait_for
from tests.system.node import Node, running

pytestmark = pytest.mark.kernel

CPLUSPLUS = """
#include <stdio.h>
namespace shop { struct Till { __attribute__((noinline)) int take(int n) { asm volatile(""); return n; } }; }
int main() { char line[8]; shop::Till till; int sum = 0;
while (fgets(line, sizeof(line), stdin)) for (int i = 0; i < 5; i++) sum += till.take(i);
return sum == 10 ? 0 : 1; }
"""


def is_watched(node: Node, binary: str) -> bool:
    """Return whether the node says that it watches functions of this file."""
    collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
    return any(row["binary"] == binary and row["functions"] for row in collector["detail"]["binaries"])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory):
    """A node that has watched two programs, and was stopped in order."""
    folder = tmp_path_factory.mktemp("functions")
    caller = compiled(folder, "caller", CALLER, "-pthread")
    till = compiled(folder, "till", CPLUSPLUS, compiler="g++")
    asked = [
        entry(caller, "first", mode="count"),
        entry(caller, "second"),
        entry(f"{folder}/**/till", "shop::Till::*"),
        entry("/no/such/file", "x"),
    ]
    probes = {"functions": asked, "sys_enter_openat": False}
    with running(folder / "node", "functions", probes=probes) as running_node:
        for program, words in ((till, []), (caller, ["300", "3"]), (till, [])):
            process = running_node.cgroup.run(program, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            wait_for(lambda name=str(program): is_watched(running_node, name))
            process.communicate(b"go\n", timeout=30)
            assert 0 == process.returncode
            time.sleep(1.5)
        running_node.status_text = running_node.stella("status", "--verbose").stdout
        running_node.caller, running_node.till = caller, till
        running_node.stop()
        yield running_node


def test_each_call_is_in_the_evidence(node: Node) -> None:
    """Counted and traced: exact sums, demangled names, and lines that the schema allows."""
    validator = jsonschema.Draft202012Validator(json_schema())
    found: Counter[tuple[str, str]] = Counter()
    innermost = set()
    for line in node.lines():
        if line["event"]["type"] == "function_call":
            validator.validate(line)
            event = line["event"]
            assert "uprobe:function_entry" == line["src"]
            found[event["binary"], event["symbol"]] += event.get("count", 1)
            if event["binary"] == str(node.till):
                assert "_ZN4shop4Till4takeEi" == event["symbol_mangled"]
                innermost.add(event["stack"][0].get("symbol"))
    assert {
        (str(node.caller), "first"): 900,
        (str(node.caller), "second"): 1,
        (str(node.till), "shop::Till::take(int)"): 10,
    } == found
    # The table of a file is read while the first lines are made; the next ones have its names.
    assert "shop::Till::take(int)" in innermost
    assert node.verify().valid


def test_coverage_says_what_was_watched(node: Node) -> None:
    """Each binary with its build-id, digests and number of functions; what is not there is there with its reason."""
    document = [row["document"] for ledger in node.ledgers() for row in ledger["coverage"]][-1]
    rows = {(row["binary"], row["mode"]): row for row in document["binaries"]}
    counted = rows[str(node.caller), "count"]
    assert (1, build_id_of(node.caller)) == (counted["functions"], counted["build_id"])
    assert 64 == len(counted["sha256"]) == len(counted["table_sha256"])
    assert "no such file is run yet" == rows["/no/such/file", "trace"]["reason"]


def test_status_shows_binaries_and_reasons(node: Node) -> None:
    """People see how many functions are watched in which file, and what is not watched."""
    assert "3 in 3 of 4 binaries; not watched: /no/such/file: no such file is run yet" in node.status_text
    assert "watched binary" in node.status_text
