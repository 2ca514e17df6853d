"""deploy/compose as it is delivered, on a real engine: images built, a node up, its evidence looked at.

The collector under test watches one cgroup, in which the workload's containers are, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from stella_collector.runs import unpin
from stella_shared import config
from stella_shared.evidence.compressed import frames_of
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.verify import verify_chain
from tests.deploy import engine as kit
from tests.deploy.engine import Engine, Layout
from tests.shared.certificates import Authority

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
BUILT = ("init", "nats", "signer", "enricher", "collector", "gateway")
WATCHED = f"stella-test-{os.getpid()}-compose"
CAPABILITIES = {
    "collector": {"BPF": 39, "PERFMON": 38, "SYS_PTRACE": 19, "DAC_READ_SEARCH": 2},
    "enricher": {"SYS_PTRACE": 19, "DAC_READ_SEARCH": 2},
    "signer": {},
    "gateway": {},
    "nats": {},
}

T = TypeVar("T")


class Node:
    """The compose project on a running engine."""

    def __init__(self, engine: Engine, folder: Path, *, cgroup: str = "host") -> None:
        self.engine = engine
        self.config = folder / "stellaops.yaml"
        signals = yaml.safe_load((COMPOSE / "stellaops.yaml").read_text())["signals"]
        signals["filters"] = {"target_cgroups": [f"/{WATCHED}"], "paths": {"allowlist": [], "denylist": []}}
        signals["rotation"] = {"max_age_hours": 0.0003}
        # The bpf file system is the machine's: pinned counters are told apart by the node's name.
        signals["node"] = WATCHED
        self.config.write_text(yaml.safe_dump({"signals": signals}))
        mounted = {"volumes": [f"{self.config}:/etc/stellaops/stellaops.yaml:ro"]}
        services: dict[str, Any] = {name: {"build": {"network": "host"}} for name in BUILT}
        for name in (*BUILT, "stella"):
            if name != "nats":
                services.setdefault(name, {}).update(mounted)
        for name in ("collector", "enricher"):
            services[name]["cgroup"] = cgroup
        self.override = folder / "override.yaml"
        self.override.write_text(yaml.safe_dump({"services": services}))
        self.overlays: list[Path] = []
        self.volumes = engine.data / "volumes"
        self.evidence = self.volumes / "stella-signals_evidence" / "_data" / "evidence"
        self.state = self.volumes / "stella-signals_signer-state" / "_data"

    def compose(self, *words: str, timeout: float = 60.0) -> str:
        """Run one `docker compose` command on the shipped file with the test's own settings over it."""
        files = [word for file in (COMPOSE / "compose.yaml", *self.overlays, self.override) for word in ("-f", file)]
        return self.engine.docker("compose", "--progress", "quiet", *files, *words, timeout=timeout)

    def up(self, *words: str) -> None:
        """Bring the node up; returns when every container is healthy."""
        try:
            self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "50", *words)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.logs()}") from None

    def down(self, *words: str) -> None:
        """Stop the node in order.  No part of it has ended by itself before."""
        names = self.compose("ps", "--all", "--format", "{{.Name}}").split()
        ended = {name: self.inspect(name)["RestartCount"] for name in names}
        logs = self.logs()
        self.compose("down", *words)
        assert set() == {name for name, times in ended.items() if times}, logs

    def logs(self) -> str:
        """Return the ends of all logs, for a failure's message."""
        return self.compose("ps", "--all") + self.compose("logs", "--no-color", "--tail", "20")

    def stella(self, *words: str) -> str:
        """Run a command of the node, as an operator does."""
        return self.compose("run", "--rm", "--no-TTY", "stella", "signals", *words)

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what the engine says of a container."""
        (found,) = json.loads(self.engine.docker("inspect", name))
        return dict(found)

    def lines_of(self, container: str) -> list[dict[str, Any]]:
        """Return the evidence lines that name a container, of all chunks, signed or open."""
        found = []
        for chunk in sorted(self.evidence.glob("*.ndjson.zst")):
            # The open chunk may end in the middle of a frame.
            with contextlib.suppress(ValueError):
                for frame in frames_of(chunk):
                    found += [json.loads(line) for line in frame.decode().splitlines() if container in line]
        return found

    def status(self) -> dict[str, Any]:
        """Return /status, as the command gives it."""
        return dict(json.loads(self.stella("status", "--format", "json")))

    def verified(self) -> ChainReport:
        """Return the report on the evidence, as the node's own key and its memory of the end judge it."""
        keys = json.loads((self.state / "keys" / "trusted.json").read_text())["keys"]
        report = verify_chain(
            self.evidence, trusted_keys={key["key_id"] for key in keys}, head=self.state / "head.json"
        )
        assert [] == report.faults
        assert report.valid
        return report

    def passwords(self) -> list[str]:
        """Return every secret that `init` has made."""
        accounts = [json.loads(path.read_bytes()) for path in self.volumes.glob("*/_data/*.json")]
        found = [
            user.get("seed") or user["password"] for content in accounts for user in content.get("users", {}).values()
        ]
        return [*found, (self.volumes / "stella-signals_gateway-token" / "_data" / "token").read_text()]


class Workload:
    """A container in the watched cgroup that opens a file again and again."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.path = path
        script = f"while :; do : <{path}; sleep 0.2; done"
        words = ("--pull", "never", "--network", "none", "--cgroup-parent", f"/{WATCHED}", "--stop-timeout", "0")
        self.id = engine.docker("run", "--detach", *words, "--entrypoint", "sh", kit.BASE, "-c", script).strip()
        self.image = engine.docker("inspect", "-f", "{{.Image}}", self.id).strip()


def eventually(what: str, look: Callable[[], T], seconds: float = 30.0) -> T:
    """Return what `look` gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def images(engine: Engine) -> Iterator[Engine]:
    """The engine, not running, with the images as the compose file builds them, which finds all of it done."""
    with kit.clean_cgroups(WATCHED):
        with engine.running(bridges=False):
            Node(engine, engine.folder).compose("build", timeout=120)
        yield engine


def signed_lines(node: Node, work: Workload) -> ChainReport:
    """Wait until a signed chunk has lines of the workload; return the report on the chain."""

    def look() -> bool:
        named = [line for line in node.lines_of(work.id) if line["event"].get("path") == work.path]
        images = {line.get("image_digest", line.get("image_reason")) for line in named}
        # The engine may not have answered when the first line was made.
        assert images <= {work.image, "pending"}
        return work.image in images

    eventually(f"a line that names container {work.id[:12]} and its image", look)
    chunks = len(list(node.evidence.glob("*.dsse.json")))
    eventually("the next two chunks are signed", lambda: len(list(node.evidence.glob("*.dsse.json"))) >= chunks + 2)
    return node.verified()


def test_what_a_container_did_is_signed_by_a_node_of_containers_and_a_restart_continues_the_chain(
    images: Engine,
) -> None:
    """Images from the tree, `up`, a signed event of a named container, `down`, `up` with two enrichers and TLS."""
    with brought_up(images) as node, certificates(images) as issue:
        work = Workload(images, "/etc/hostname")
        first = signed_lines(node, work)
        is_confined(node)
        assert "Chain Status: ✓ VALID" in node.stella("verify-chain", "/var/lib/stellaops/evidence")
        node.down()
        assert "stop" == node.verified().chunks[-1].close_reason

        old = set(node.passwords())
        node.compose("run", "--rm", "--no-TTY", "init", "--replace-keys")
        # The gateway's token stays.
        assert 1 == len(old & set(node.passwords()))

        node.overlays.append(COMPOSE / "compose.tls.yaml")
        node.up("--scale", "enricher=2")
        eventually("two enrichers beat", lambda: 2 == len(services(node.status(), "enricher")))
        again = Workload(images, "/etc/passwd")
        signed_lines(node, again)
        # Of another authority, so that an old one would let nobody in.
        issue()
        node.compose("restart", "nats")
        second = signed_lines(node, Workload(images, "/etc/shells"))
        node.down()
    last = node.verified()
    assert first.chain_id == second.chain_id == last.chain_id
    assert first.last < second.last
    assert (0, {}) == (last.totals.lost, last.lost_by_cause)
    assert 0 == len(last.warnings), last.warnings


@contextlib.contextmanager
def certificates(engine: Engine) -> Iterator[Callable[[], None]]:
    """Lay certificates where compose.tls.yaml looks for them; give what lays new ones."""
    folder = engine.folder / "tls"

    def issue() -> None:
        for side in ("server", "client"):
            (folder / side).mkdir(parents=True, exist_ok=True)
        authority = Authority(folder)
        for side, host in (("server", "nats"), ("client", "client")):
            pair = authority.pair(side, host=host)
            for source, name in ((authority.ca, "ca.crt"), (pair.certificate, "tls.crt"), (pair.key, "tls.key")):
                place = folder / side / name
                place.write_bytes(source.read_bytes())
                os.chown(place, 10001, 10001)
                place.chmod(0o400)

    issue()
    engine.environment["STELLA_TLS"] = str(folder)
    try:
        yield issue
    finally:
        del engine.environment["STELLA_TLS"]


def services(status: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the instances of a service that work."""
    return [row for row in status["services"] if row["service"] == name and row["state"] == "ok"]


@contextlib.contextmanager
def brought_up(engine: Engine, *, layout: Layout = "host", cgroup: str = "host") -> Iterator[Node]:
    """Give a node whose containers are all up, on a running engine.  What it leaves is removed at the end."""
    with engine.running(bridges=True, layout=layout):
        try:
            node = Node(engine, engine.folder, cgroup=cgroup)
            node.up()
            yield node
            # The collector that was told to stop has closed its books.
            assert [] == pins()
        finally:
            engine.remove()
            for pin in pins():
                unpin(pin)
                pin.parent.rmdir()


def pins() -> list[Path]:
    """Return the runs that a collector of ours has pinned."""
    return list(Path("/sys/fs/bpf/stella").glob(f"{WATCHED}-*/*"))


def is_confined(node: Node) -> None:
    """Each process holds the capabilities of the compose file and no other; no secret shows from outside."""
    secrets = node.passwords()
    assert len(secrets) > len(CAPABILITIES)
    for service, capabilities in CAPABILITIES.items():
        found = node.inspect(f"stella-signals-{service}-1")
        status = Path(f"/proc/{found['State']['Pid']}/status").read_text()
        held = {line.split()[0]: line.split()[1:] for line in status.splitlines() if ":" in line}
        assert sum(1 << number for number in capabilities.values()) == int(held["CapBnd:"][0], 16), service
        assert ["1"] == held["NoNewPrivs:"]
        assert ("0" if capabilities else "10001") == held["Uid:"][0], service
        assert found["HostConfig"]["ReadonlyRootfs"]
        # The collector's own profile holds for whatever runs in its container; the engine's allows links.
        link = f"ln -s x /run/stella/{service} 2>&1 || true"
        if service != "nats":
            said = node.engine.docker("exec", found["Id"], "sh", "-c", link)
            assert ("Operation not permitted" in said) == (service == "collector"), said
        said = json.dumps(found) + node.engine.docker("history", "--no-trunc", found["Image"])
        assert not [secret for secret in secrets if secret in said], service


@pytest.mark.parametrize("layout", [layout for layout in kit.layouts() if layout != "host"])
def test_it_is_the_same_where_cgroup_v2_stands_alone(images: Engine, layout: Layout) -> None:
    """As most machines have it; and with cgroup namespaces of their own for our containers, as in Kubernetes."""
    with brought_up(images, layout=layout, cgroup="private") as node:
        work = Workload(images, "/etc/group")
        signed_lines(node, work)
        node.down("--volumes")


def test_compose_takes_the_overlays_and_the_profiles(engine: Engine) -> None:
    """What is added for uprobes is one capability and two probes; the profile adds two services, bound to loopback."""
    files = ("-f", COMPOSE / "compose.yaml", "-f", COMPOSE / "compose.uprobes.yaml")
    words = ("--profile", "observability", "config", "--format", "json")
    services = json.loads(engine.docker("compose", *files, *words))["services"]
    assert {*CAPABILITIES["collector"], "SYS_ADMIN"} == set(services["collector"]["cap_add"])
    signals = config.load(COMPOSE / "stellaops.yaml", services["collector"]["environment"])
    assert signals.probes.openssl_read
    assert signals.probes.openssl_write
    assert {*CAPABILITIES, "init", "prometheus", "grafana"} == set(services)
    for service in services.values():
        assert {"127.0.0.1"} >= {port["host_ip"] for port in service.get("ports", [])}
        assert "ALL" in service["cap_drop"]
        assert not {"memlock", "nofile"} & set(service.get("ulimits", {}))
