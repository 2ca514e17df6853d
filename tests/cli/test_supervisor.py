"""The supervisor with the real bus, real processes and small services."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from node_kit import Node, eventually

from stella_cli import node_file, process

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a node needs the collector's capabilities")


def numbers(node: Node) -> list[int]:
    return [int(json.loads(line)["n"]) for line in node.signed()]


def test_a_node_starts_in_order_and_stops_with_everything_in_flight_recorded(node: Node) -> None:
    """Ctrl-C ends the intake first; the collector's last batch still reaches the signer."""
    supervisor = node.start()
    eventually(lambda: len(node.signed()) > 20)
    assert 0o600 == (node.state / "bus.json").stat().st_mode & 0o777
    assert 0o600 == (node.state / "nats" / "nats.conf").stat().st_mode & 0o777
    supervisor.send_signal(signal.SIGINT)
    assert 0 == supervisor.wait(30)
    seen = numbers(node)
    assert seen.count(-1) == 1
    assert sorted(seen)[1:] == list(range(len(seen) - 1))
    assert "stopped:" in node.said() and "verify-chain" in node.said()
    assert "Violation" not in (node.state / "logs" / "nats.log").read_text()
    assert node_file.read(node.state) is None


def test_a_node_of_an_older_release_goes_on_with_keys(node: Node) -> None:
    """Its bus.json of passwords becomes one of seeds, and every part gets in and works."""
    users = ("collector", "enricher", "signer", "gateway", "operator")
    node_file.make_state_directory(node.state)
    old = {user: {"user": user, "password": f"old-{user}"} for user in users}
    (node.state / "bus.json").write_text(json.dumps({"users": old}))
    node.start()
    eventually(lambda: len(node.signed()) > 20)
    accounts = json.loads((node.state / "bus.json").read_text())["users"]
    assert {user: ["seed"] for user in users} == {user: list(account) for user, account in accounts.items()}


def test_each_part_is_started_again_after_kill_9_while_the_others_go_on(node: Node) -> None:
    """A killed part comes back with another pid; nobody else is touched; the work goes on."""
    node.start()
    parts = ("collector", "enricher-1", "enricher-2", "signer", "gateway", "nats")
    for name in parts:
        before = {part: node.pid(part) for part in parts}
        os.kill(before[name], signal.SIGKILL)
        eventually(lambda name=name, old=before[name]: node.pid(name) not in (0, old))  # type: ignore[misc]
        after = {part: node.pid(part) for part in parts}
        assert {part for part in parts if before[part] != after[part]} == {name}
        assert f"{name} was killed by SIGKILL; starting it again in 0.2 s" in node.said()
    count = len(node.signed())
    eventually(lambda: len(node.signed()) > count + 10)
    eventually(lambda: "signer is back" in node.said())
    assert 0 == node.stella("stop").returncode


def test_a_second_start_is_refused_and_names_the_pid(node: Node) -> None:
    """The lock is held by the running supervisor; exit code 10."""
    first = node.start()
    second = node.stella("start")
    assert 10 == second.returncode
    assert f"already running on {node.state} (pid {first.pid})" in second.stderr
    assert first.poll() is None


def test_kill_9_of_the_supervisor_leaves_no_orphans_and_the_next_start_works(node: Node) -> None:
    """The kernel kills every part with its supervisor."""
    supervisor = node.start()
    known = node_file.read(node.state)
    assert known is not None and len(known.children) == 6
    supervisor.kill()
    supervisor.wait()
    eventually(lambda: not any(process.is_alive(c.who) for c in known.children), seconds=5)
    assert 4 == node.stella("stop").returncode
    node.start(log="second.log")


def test_an_orphan_of_a_dead_node_is_ended_by_the_next_start(node: Node) -> None:
    """A part that was cut loose from its supervisor is recognised and ended; a stranger is not."""
    node_file.make_state_directory(node.state)
    orphan = subprocess.Popen(["sleep", "600"], executable="/bin/sleep")
    stella = subprocess.Popen(["stella_signer stand-in", "600"], executable="/bin/sleep")
    try:
        entries = [
            node_file.ChildEntry(name, who)
            for name, child in (("stranger", orphan), ("signer", stella))
            if (who := process.identity(child.pid)) is not None
        ]
        eventually(lambda: "stella_signer stand-in" in process.command_line(stella.pid))
        gone = process.Identity(stella.pid, 1)
        node_file.write(
            node.state,
            node_file.NodeFile(gone, node_file.clock.boot_id(), 0.0, "c", "e", "", "", children=entries),
        )
        assert node_file.running(node.state) is None
        assert ["signer"] == node_file.end_orphans(node.state, patience_seconds=3)
        assert -signal.SIGTERM == stella.wait(5)
        assert orphan.poll() is None
    finally:
        for child in (orphan, stella):
            child.kill()
            child.wait()


def test_a_part_that_may_not_run_ends_the_start_with_its_exit_code(node: Node) -> None:
    """A collector that the kernel refuses is not started again and again; everything else is ended."""
    (node.manners / "collector.exit").write_text("3")
    done = node.stella("start")
    assert 3 == done.returncode
    assert "Error: collector cannot run: the stand-in was told to fail" in done.stderr
    assert "starting it again" not in done.stderr
    assert node_file.read(node.state) is None


def test_a_gateway_that_cannot_run_leaves_the_others_running(node: Node) -> None:
    """The door is no reason to stop collecting; its reason is told once."""
    (node.manners / "gateway.exit").write_text("2")
    supervisor = node.start()
    assert 1 == node.said().count("gateway cannot run")
    assert 0 == node.pid("gateway")
    assert supervisor.poll() is None


def test_a_part_that_keeps_dying_is_started_with_growing_pauses(node: Node) -> None:
    """The pause doubles from 0.2 s."""
    node.start()
    (node.manners / "enricher.exit").write_text("1")
    os.kill(node.pid("enricher-2"), signal.SIGKILL)
    for pause in ("0.2", "0.4", "0.8"):
        eventually(lambda pause=pause: f"starting it again in {pause} s" in node.said())  # type: ignore[misc]
    (node.manners / "enricher.exit").unlink()
    eventually(lambda: "enricher-2 is back" in node.said())


def test_a_second_signal_ends_a_part_that_does_not_listen(node: Node) -> None:
    """Two Ctrl-C do not wait for anybody, and the last words say who was killed."""
    (node.manners / "signer.deaf").touch()
    supervisor = node.start()
    supervisor.send_signal(signal.SIGINT)
    eventually(lambda: node.pid("enricher-1") == 0 or "stopping" in node.said())
    time.sleep(1.0)
    began = time.monotonic()
    supervisor.send_signal(signal.SIGINT)
    assert 0 == supervisor.wait(10)
    assert time.monotonic() - began < 3
    assert "killed: signer" in node.said()


def test_a_taken_gateway_port_is_told_before_anything_starts(node: Node) -> None:
    """Exit code 2; the message names address and port."""
    port = int(node.config.read_text().split("metrics: {port: ")[1].split("}")[0])
    with socket.create_server(("127.0.0.1", port)):
        done = node.stella("start")
    assert 2 == done.returncode
    assert f"Error: the gateway cannot listen on 127.0.0.1:{port}" in done.stderr
    assert not list((node.state / "logs").glob("*.log"))


def test_detach_returns_when_the_node_is_ready_and_stop_ends_it(node: Node) -> None:
    """start --detach, status of the process, stop: each returns 0."""
    started = node.stella("start", "--detach")
    assert (0, "") == (started.returncode, started.stderr)
    running = node_file.running(node.state)
    assert running is not None and f"(pid {running.who.pid})" in started.stdout
    assert 0 == len([c for c in running.children if not process.is_alive(c.who)])
    again = node.stella("start", "--detach", "--format=json")
    assert 2 == again.returncode
    again = node.stella("start", "--detach")
    assert 10 == again.returncode and "already running" in again.stderr
    stopped = node.stella("stop")
    assert 0 == stopped.returncode and "stopped" in stopped.stdout
    assert not process.is_alive(running.who)


def test_all_but_the_collector_lose_the_capabilities_they_do_not_need(node: Node) -> None:
    """The bounding set holds CAP_DAC_OVERRIDE for most, and never CAP_BPF outside the collector."""
    node.start()
    for name in ("nats", "signer", "gateway", "enricher-1"):
        text = status(node.pid(name))
        bounding = int(text.split("CapBnd:\t")[1].split()[0], 16)
        assert not bounding & 1 << process.CAP_BPF, name
        assert not bounding & 1 << process.CAP_SYS_ADMIN, name
        assert "NoNewPrivs:\t1" in text
    effective = int(status(node.pid("collector")).split("CapEff:\t")[1].split()[0], 16)
    assert effective >> process.CAP_BPF & 1


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_a_bus_that_cannot_be_started_is_told_in_one_message(node: Node) -> None:
    """A program that may not be run is an error of ours, and nothing is left behind."""
    wrong = node.folder / "bin" / "nats-server"
    wrong.parent.mkdir()
    wrong.write_text("#!/nowhere/interpreter\n")
    wrong.chmod(0o755)
    python = wrong.with_name("python")
    python.symlink_to(sys.executable)
    node.env["PYTHONPATH"] += os.pathsep + os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    command = [str(python), "-m", "stella_cli", "signals", "start", "--config", str(node.config)]
    done = subprocess.run(command, env=node.env, capture_output=True, text=True, timeout=60, check=False)
    assert 10 == done.returncode, done.stderr
    assert "Error: the embedded nats-server does not start: cannot start" in done.stderr
    assert "Traceback" not in done.stderr
    assert node_file.read(node.state) is None
