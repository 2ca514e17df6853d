"""deploy/systemd: units that systemd finds right, and, where an engine can be had, a systemd that runs them.

The real one is PID 1 of a container on an engine of the test's own.  It has a bpf file system of its own, and the
collector watches one unit in that container and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stella_shared import config
from tests.deploy import engine as kit
from tests.deploy.engine import Engine

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
PARTS = ("nats", "signer", "enricher@1", "collector", "gateway")
#: systemd's own judgement of how much a service could do, 0 to 10; what it says of an ordinary unit is 9.6.
EXPOSURE = {"stellaops-signals": 4.0, "stellaops-collector": 3.0, "stellaops-enricher@": 2.5}
EXPOSURE_OF_OTHERS = 1.6
#: linux/capability.h: what the units give, and what is left when a part has begun its work: without probes in files
#: the collector needs CAP_PERFMON for attaching alone.
CAPABILITIES = {"collector": 1 << 39 | 1 << 38 | 1 << 19 | 1 << 2, "enricher@1": 1 << 19 | 1 << 2}
LEFT = {**CAPABILITIES, "collector": CAPABILITIES["collector"] & ~(1 << 38)}


def settings(unit: Path) -> dict[str, list[str]]:
    """Return every setting of a unit: name to the values given for it."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.fixture(scope="module")
def fake_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with systemd's units, ours, and something executable where ours say."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: it comes with Debian's systemd (make system-test)")
    root = tmp_path_factory.mktemp("root")
    shutil.copytree("/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    own = root / "etc/systemd/system"
    own.mkdir(parents=True)
    for unit in [*UNITS, *FOLDER.glob("*.target")]:
        shutil.copy(unit, own)
    for program in ("opt/stella/bin/python", "opt/stella/bin/stella", "opt/stella/bin/nats-server", "bin/sh"):
        (root / program).parent.mkdir(parents=True, exist_ok=True)
        (root / program).write_text("#!/bin/sh\n")
        (root / program).chmod(0o755)
    return root


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_systemd_finds_no_fault_in_a_unit(fake_root: Path, unit: Path) -> None:
    """No unknown key, no missing unit, nothing that cannot be executed."""
    name = unit.name.replace("@.", "@1.")
    done = kit.run("systemd-analyze", f"--root={fake_root}", "verify", f"{fake_root}/etc/systemd/system/{name}")
    assert "" == done


@pytest.mark.parametrize("drop_in", sorted(FOLDER.glob("drop-ins/*.conf")), ids=lambda p: p.stem)
@pytest.mark.parametrize("part", ["collector", "enricher@", "signer", "gateway"])
def test_systemd_finds_no_fault_in_a_unit_with_a_drop_in(fake_root: Path, part: str, drop_in: Path) -> None:
    """Each of them on each part, whether it has a use for it there or not."""
    folder = fake_root / f"etc/systemd/system/stellaops-{part}.service.d"
    folder.mkdir()
    try:
        shutil.copy(drop_in, folder)
        unit = f"{fake_root}/etc/systemd/system/stellaops-{part.replace('@', '@1')}.service"
        assert "" == kit.run("systemd-analyze", f"--root={fake_root}", "verify", unit)
    finally:
        shutil.rmtree(folder)


def test_certificates_of_the_bus_are_read_where_they_are_renewed() -> None:
    """Not from credentials, which would be as old as the service; by a group that sysusers makes."""
    found = settings(FOLDER / "drop-ins/bus-tls.conf")
    assert "LoadCredential" not in found
    (group,) = found["SupplementaryGroups"]
    assert re.search(rf"^g {group} ", (FOLDER / "stellaops.sysusers.conf").read_text(), re.MULTILINE)
    environment = dict(row.split("=", 1) for row in found["Environment"])
    tls = config.load(None, {**environment, "STELLA_SIGNALS__BUS__URL": "tls://bus:4222"}).bus.tls
    assert {Path("/etc/stellaops/tls")} == {Path(file).parent for file in (tls.ca_file, tls.cert_file, tls.key_file)}


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_systemd_thinks_that_a_unit_exposes_little(fake_root: Path, unit: Path) -> None:
    """`systemd-analyze security` stays under a bound of ours; a sandbox that is loosened shows here."""
    limit = EXPOSURE.get(unit.stem, EXPOSURE_OF_OTHERS)
    words = ("security", "--offline=true", f"--threshold={int(limit * 10)}", "--no-pager", unit.name)
    said = kit.run("systemd-analyze", f"--root={fake_root}", *words)
    assert "Overall exposure level" in said


def test_every_service_ends_for_good_when_a_new_start_would_not_help() -> None:
    """Exit codes 2, 3 and 4 are configuration, permission and key; a watchdog looks after those that run on."""
    for unit in UNITS:
        found = settings(unit)
        if found["Type"] != ["notify"]:
            continue
        assert ["2 3 4"] == found["RestartPreventExitStatus"], unit.name
        assert ["on-failure"] == found["Restart"]
        assert ["30"] == found["WatchdogSec"]
        assert ["yes"] == found["NoNewPrivileges"]
        assert ["strict"] == found["ProtectSystem"]


def test_each_user_is_made_and_each_password_is_handed_to_its_service_alone() -> None:
    """sysusers makes who the units run as; each unit loads the account file of its own name."""
    made = set(re.findall(r"^u (\S+)", (FOLDER / "stellaops.sysusers.conf").read_text(), re.MULTILINE))
    assert made == {user for unit in UNITS for user in settings(unit).get("User", [])}
    for unit in UNITS:
        service = unit.stem.removeprefix("stellaops-").rstrip("@")
        loaded = settings(unit).get("LoadCredential", [])
        if service == "nats":
            assert ["nats.conf:/etc/stellaops/bus/nats.conf"] == loaded
        elif service in ("collector", "enricher", "signer", "gateway"):
            assert [f"bus:/etc/stellaops/bus/{service}.json"] == loaded


class Machine:
    """A container whose PID 1 is systemd, with our software and units in their places."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = engine.docker(
            *(
                "run",
                "--detach",
                "--pull",
                "never",
                "--privileged",
                "--cgroupns",
                "host",
                "--network",
                "none",
                "--tmpfs",
                "/run",
            ),
            *("--volume", "/sys/fs/cgroup:/sys/fs/cgroup", "--volume", f"{FOLDER}:/units:ro"),
            *("--volume", "/sys/kernel/tracing:/sys/kernel/tracing", "stella-signals/machine"),
        ).strip()
        for _ in range(100):
            with contextlib.suppress(AssertionError):
                if self.sh("systemctl is-system-running || true").strip() in ("running", "degraded"):
                    break
            time.sleep(0.1)
        # In a container systemd leaves mounts private, so that nothing reaches its services; and it mounts no bpffs.
        self.sh("mount --make-rshared / && mount -t bpf bpf /sys/fs/bpf")

    def sh(self, script: str) -> str:
        """Run a shell script inside and return what it printed."""
        return self.engine.docker("exec", self.id, "sh", "-ec", script, timeout=90)

    def install(self) -> None:
        """Do what docs/deployment.md says."""
        watched = f"/docker/{self.id}/system.slice/watched.service"
        signals = {
            "node": f"stella-test-{os.getpid()}-systemd",
            "filters": {"target_cgroups": [watched], "paths": {"allowlist": [], "denylist": []}},
            "probes": {"openssl_read": False, "openssl_write": False},
            "rotation": {"max_age_hours": 0.0003},
        }
        self.sh(
            "mkdir -p /etc/stellaops; cat >/etc/stellaops/stellaops.yaml <<'END'\n"
            f"{json.dumps({'signals': signals})}\nEND\n"
            "cp /units/*.service /units/*.target /etc/systemd/system/\n"
            "cp /units/stellaops.sysusers.conf /usr/lib/sysusers.d/stellaops.conf\n"
            "cp /units/stellaops.tmpfiles.conf /usr/lib/tmpfiles.d/stellaops.conf\n"
            "systemd-sysusers && systemd-tmpfiles --create stellaops.conf && systemctl daemon-reload"
        )

    def show(self, part: str, name: str) -> str:
        """Return one property of a part's unit."""
        return self.sh(f"systemctl show -P {name} stellaops-{part}").strip()

    def journal(self) -> str:
        """Return what the units wrote, for a failure's message."""
        return self.sh("journalctl -b --no-pager -o cat -u 'stellaops*' | tail -60")


@pytest.fixture(scope="module")
def machine(engine: Engine) -> Iterator[Machine]:
    """A running machine with everything installed and nothing started."""
    # systemd wants cgroup v2 alone.
    with kit.clean_cgroups(), engine.running(bridges=True, layout=kit.layouts()[-1]):
        try:
            machine = Machine(engine)
            machine.install()
            yield machine
        finally:
            engine.remove()


@pytest.mark.engine
@pytest.mark.slow
def test_each_part_works_in_its_sandbox_and_the_whole_node_goes_on_with_the_chain(machine: Machine) -> None:
    """The target's parts record and sign; a part that hangs is killed and comes back; then the one unit takes over."""
    machine.sh("systemctl start stellaops.target")
    for part in PARTS:
        assert "active" == machine.show(part, "ActiveState"), machine.journal()
        pid = machine.show(part, "MainPID")
        status = machine.sh(f"cat /proc/{pid}/status")
        held = {line.partition(":")[0]: line.split()[1] for line in status.splitlines()}
        assert LEFT.get(part, 0) == int(held["CapEff"], 16) == int(held["CapPrm"], 16), part
        # Who is not root may not shrink the bounding set: that stays as the unit has it.
        assert CAPABILITIES.get(part, 0) == int(held["CapBnd"], 16), part
        assert "0" != held["Uid"]
        assert ("1", "2") == (held["NoNewPrivs"], held["Seccomp"])
        if part != "nats":
            assert "ok" == machine.show(part, "StatusText")
    machine.sh("systemd-run --quiet --unit watched sh -c 'while :; do : </etc/hostname; sleep 0.2; done'")
    time.sleep(2)

    # An upgrade without a gap, as the runbook has it; then a kill.
    machine.sh(
        "systemctl kill --kill-whom=main --signal=USR1 stellaops-collector; "
        "while systemctl --quiet is-active stellaops-collector; do sleep 0.1; done; systemctl start stellaops-collector"
    )
    machine.sh("systemctl kill --kill-whom=main --signal=KILL stellaops-collector")
    deadline = time.monotonic() + 20
    while 2 != machine.journal().count("going on with run"):
        assert time.monotonic() < deadline, machine.journal()
        time.sleep(0.2)

    drop_in = "/run/systemd/system/stellaops-enricher@1.service.d"
    machine.sh(f"mkdir {drop_in}; printf '[Service]\\nWatchdogSec=1\\n' >{drop_in}/test.conf; systemctl daemon-reload")
    machine.sh("systemctl restart stellaops-enricher@1; kill -STOP $(systemctl show -P MainPID stellaops-enricher@1)")
    deadline = time.monotonic() + 20
    while "1" != machine.show("enricher@1", "NRestarts") or "active" != machine.show("enricher@1", "ActiveState"):
        assert time.monotonic() < deadline, machine.journal()
        time.sleep(0.2)
    machine.sh(f"rm -r {drop_in}; systemctl daemon-reload; systemctl stop stellaops.target 'stellaops-*'")
    verify = "/opt/stella/bin/stella signals verify-chain /var/lib/stellaops/evidence --format json"
    first = json.loads(machine.sh(verify))
    assert (True, {}) == (first["valid"], first["lost_by_cause"])
    assert first["lines"] > 0
    assert "" == machine.sh("find /sys/fs/bpf/stella -type f")

    machine.sh("systemctl start stellaops-signals")
    assert "active" == machine.show("signals", "ActiveState"), machine.journal()
    machine.sh("systemctl reload stellaops-signals")
    time.sleep(2)
    assert "configuration taken up" in machine.journal()
    machine.sh("systemctl stop stellaops-signals")
    assert "success" == machine.show("signals", "Result"), machine.journal()
    second = json.loads(machine.sh(verify))
    assert (True, {}) == (second["valid"], second["lost_by_cause"])
    assert second["lines"] > first["lines"]
    assert first["chain_id"] == second["chain_id"]
