"""deploy/kubernetes: a DaemonSet that Kubernetes takes, and that is the compose file's node.  Nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from stella_enricher.runtimes.finding import USUAL
from stella_shared import config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
#: The oldest that knows every field, and the newest whose schema there is.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
SERVICES = ("init", "nats", "signer", "enricher", "collector", "gateway")
#: Docker's socket is no part of a cluster's node.
COMPOSE_ONLY = {"/var/run/docker.sock", "/init/token", "/init/grafana"}


def compose() -> dict[str, Any]:
    """Return the services of the compose file."""
    services: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    return services


def daemonset() -> dict[str, Any]:
    """Return the DaemonSet."""
    return dict(yaml.safe_load((FOLDER / "daemonset.yaml").read_text()))


def pod() -> dict[str, Any]:
    """Return the pod's specification."""
    return dict(daemonset()["spec"]["template"]["spec"])


def containers() -> dict[str, dict[str, Any]]:
    """Return every container by its name, in the order in which they start."""
    return {c["name"]: c for c in [*pod()["initContainers"], *pod()["containers"]]}


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Return (file, document) of all manifests."""
    return [
        (path.name, document)
        for path in sorted(FOLDER.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if "kind" in document and document["kind"] != "Kustomization"
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "document"), documents())
def test_kubernetes_takes_each_manifest(version: str, name: str, document: dict[str, Any]) -> None:
    """By its own schema, strictly: a field that it does not know is refused."""
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_refuses_what_is_no_manifest() -> None:
    """So that the test above can fail."""
    broken = daemonset()
    broken["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilites"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_kustomize_finds_all_it_names() -> None:
    """Every manifest is a resource, every file of the config map is there; the secret is the user's to make."""
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert {name for name, _ in documents()} == set(kustomization["resources"])
    (settings,) = kustomization["configMapGenerator"]
    assert all((FOLDER / file).is_file() for file in settings["files"])
    (secret,) = kustomization["secretGenerator"]
    assert not (FOLDER / secret["files"][0].partition("=")[2]).exists()
    volumes = {v["name"]: v for v in pod()["volumes"]}
    assert settings["name"] == volumes["config"]["configMap"]["name"]
    assert secret["name"] == volumes["gateway-token"]["secret"]["secretName"]
    assert {c["image"] for c in containers().values()} == {row["name"] for row in kustomization["images"]}


def test_the_configuration_is_one_that_services_accept() -> None:
    """Both of them, compose's and the cluster's, which differ in where the bus is."""
    cluster = config.load(FOLDER / "stellaops.yaml", {})
    here = config.load(ROOT / "deploy/compose/stellaops.yaml", {})
    for signals in (cluster, here):
        config.check_runnable(signals)
    assert "nats://127.0.0.1:4222" == cluster.bus.url
    assert (here.probes, here.metrics, here.output_directory, here.state_directory) == (
        cluster.probes,
        cluster.metrics,
        cluster.output_directory,
        cluster.state_directory,
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_the_rights_of_its_compose_service(name: str) -> None:
    """The same capabilities and no more, no way to gain any, a root file system that cannot be written."""
    context = containers()[name]["securityContext"]
    service = compose()[name]
    assert ["ALL"] == context["capabilities"]["drop"] == service["cap_drop"]
    assert sorted(service.get("cap_add", [])) == sorted(context["capabilities"].get("add", []))
    assert context["readOnlyRootFilesystem"] is True is service["read_only"]
    assert context["allowPrivilegeEscalation"] is False
    assert "no-new-privileges=true" in service["security_opt"]
    unconfined = "apparmor=unconfined" in service["security_opt"]
    assert unconfined == (context.get("appArmorProfile", {}).get("type") == "Unconfined")
    if not service.get("cap_add"):
        assert context["runAsNonRoot"] is True
    profiled = "seccomp=../seccomp/collector.json" in service["security_opt"]
    assert profiled == (name == "collector") == (context.get("seccompProfile", {}).get("type") == "Localhost")


def test_the_collectors_profile_is_where_its_container_looks() -> None:
    """`init`, which has ended before, lays the shipped file below the kubelet's folder of profiles."""
    (folder,) = [v["hostPath"]["path"] for v in pod()["volumes"] if v["name"] == "seccomp"]
    profile = (
        Path("/var/lib/kubelet/seccomp")
        / containers()["collector"]["securityContext"]["seccompProfile"]["localhostProfile"]
    )
    assert (Path(folder), "collector.json") == (profile.parent, profile.name)
    assert (
        "/opt/stella/share/seccomp/collector.json /init/seccomp/collector.json"
        in (ROOT / "deploy/compose/init.sh").read_text()
    )
    assert (
        "COPY deploy/seccomp/collector.json /opt/stella/share/seccomp/"
        in (ROOT / "deploy/compose/Dockerfile").read_text()
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_sees_the_mounts_of_its_compose_service(name: str) -> None:
    """The same places, from the machine's same folders, and as readable or writable."""
    sources = {v["name"]: v.get("hostPath", {}).get("path", "") for v in pod()["volumes"]}
    mine = {m["mountPath"]: (m.get("readOnly", False), sources[m["name"]]) for m in containers()[name]["volumeMounts"]}
    found: dict[str, tuple[bool, str]] = {}
    for volume in compose()[name].get("volumes", []):
        source, target, *mode = volume.replace("${DOCKER_SOCKET:-/var/run/docker.sock}", "/var/run/docker.sock").split(
            ":"
        )
        found[target.removesuffix("/stellaops.yaml")] = (mode == ["ro"], source if source.startswith("/sys") else "")
    for tmpfs in compose()[name].get("tmpfs", []):
        found[tmpfs.partition(":")[0]] = (False, "")
    expected = {target: what for target, what in found.items() if target not in COMPOSE_ONLY}
    here = {t: (ro, source if source.startswith("/sys") else "") for t, (ro, source) in mine.items()}
    # The engine reads the profile from where the compose file is, the kubelet from a folder of its own.
    assert ("/init/seccomp" in here) == (name == "init")
    here.pop("/init/seccomp", None)
    assert expected == here


def test_parts_start_and_end_in_the_order_of_the_pipeline() -> None:
    """Sidecars before the collector: each is up before the next starts, and they end after it, last one first."""
    assert ["init", "nats", "signer", "enricher"] == [c["name"] for c in pod()["initContainers"]]
    for sidecar in pod()["initContainers"][1:]:
        assert "Always" == sidecar["restartPolicy"]
        assert sidecar["startupProbe"]
    assert {"collector", "gateway"} == {c["name"] for c in pod()["containers"]}
    waits = {name: set(compose()[name]["depends_on"]) for name in SERVICES[1:]}
    order = list(containers())
    assert all(order.index(before) < order.index(name) for name, befores in waits.items() for before in befores)


def test_the_pod_may_ask_the_cluster_nothing() -> None:
    """No role, no token; the host's processes, but not its network."""
    assert not [d for _, d in documents() if "Role" in d["kind"]]
    assert pod()["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod()
    assert pod()["hostPID"] is True
    assert {"host"} == {compose()[name].get("pid") for name in ("collector", "enricher")}


def test_the_component_gives_the_enricher_the_runtimes_folders() -> None:
    """Where the enricher looks by itself; read-only; and the DaemonSet with it is one that Kubernetes takes."""
    folder = FOLDER / "runtime-sockets"
    component = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert ("Component", [{"path": "enricher.yaml"}]) == (component["kind"], component["patches"])
    patch = yaml.safe_load((folder / "enricher.yaml").read_text())
    whole = daemonset()
    assert (whole["kind"], whole["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"])
    added = patch["spec"]["template"]["spec"]
    (container,) = added["initContainers"]
    mounts = {m["mountPath"]: m["readOnly"] for m in container["volumeMounts"]}
    assert {"/run/containerd": True, "/run/crio": True} == mounts
    asked = [Path(socket) for places in USUAL.values() for socket in places]
    assert all(any(socket.is_relative_to(mount) for socket in asked) for mount in mounts)
    spec = whole["spec"]["template"]["spec"]
    spec["volumes"] += added["volumes"]
    (enricher,) = [c for c in spec["initContainers"] if c["name"] == container["name"]]
    enricher["volumeMounts"] += container["volumeMounts"]
    kubernetes_validate.validate(whole, VERSIONS[0], strict=True)


def test_the_component_for_a_bus_outside_gives_each_part_its_account_and_the_certificates() -> None:
    """What the configuration accepts as TLS; each part sees its own account alone; and Kubernetes takes the result."""
    folder = FOLDER / "bus-tls"
    component = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert ("Component", [{"path": "parts.yaml"}]) == (component["kind"], component["patches"])
    patch = yaml.safe_load((folder / "parts.yaml").read_text())
    added = patch["spec"]["template"]["spec"]
    whole = daemonset()
    spec = whole["spec"]["template"]["spec"]
    gone, *sidecars = added["initContainers"]
    assert {"name": "nats", "$patch": "delete"} == gone
    spec["initContainers"] = [c for c in spec["initContainers"] if c["name"] != "nats"]
    spec["volumes"] += added["volumes"]
    volumes = {v["name"]: v["secret"] for v in added["volumes"]}
    by_name = {c["name"]: c for c in [*spec["initContainers"], *spec["containers"]]}
    for container in [*sidecars, *added["containers"]]:
        name = container["name"]
        environment = {row["name"]: row["value"] for row in container["env"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        signals = config.load(FOLDER / "stellaops.yaml", {**environment, "STELLA_SIGNALS__BUS__URL": "tls://bus:4222"})
        tls = signals.bus.tls
        assert {Path(file).parent for file in (tls.ca_file, tls.cert_file, tls.key_file)} == {
            Path("/run/secrets/bus-tls")
        }
        assert "stella-bus-tls" == mounts["/run/secrets/bus-tls"]["secretName"]
        account = Path(signals.bus.credentials_file)
        assert [{"key": f"{name}.json", "path": account.name}] == mounts[str(account.parent)]["items"]
        by_name[name]["env"] += container["env"]
        by_name[name]["volumeMounts"] += container["volumeMounts"]
    assert {"signer", "enricher", "collector", "gateway"} == {c["name"] for c in [*sidecars, *added["containers"]]}
    kubernetes_validate.validate(whole, VERSIONS[0], strict=True)
