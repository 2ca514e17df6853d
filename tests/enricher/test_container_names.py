"""Cgroup paths, as the runtimes write them, become container names; nothing else does."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stella_enricher.container_names import (
    BASES,
    RUNTIMES,
    ContainerName,
    container_name,
    is_users_own,
    why_not_host,
)

A = "a1" * 32
B = "b2" * 32
POD = "pod0c5e1f8e_7b0e_4f43_9c1f_3a4a3a0c8d11"

NAMED = [
    # Docker
    (f"/docker/{A}", "docker", "parent"),
    (f"/system.slice/docker-{A}.scope", "docker", "prefix"),
    (f"/custom.slice/docker-{A}.scope", "docker", "prefix"),
    (f"/custom/{A}", "docker", "assumed"),
    (f"/ecs/4d0f5c8e7d6b4b0aa7b0/{A}", "docker", "assumed"),
    (f"/user.slice/user-1000.slice/user@1000.service/app.slice/docker-{A}.scope", "docker", "prefix"),
    (f"/kubepods.slice/kubepods-{POD}.slice/docker-{A}.scope", "docker", "prefix"),
    (f"/docker/{A} (deleted)", "docker", "parent"),
    (f"/../../docker/{A}", "docker", "parent"),
    (f"/../docker-{A}.scope", "docker", "prefix"),
    # containerd
    (f"/kubepods/besteffort/{POD}/{A}", "containerd", "assumed"),
    (f"/kubepods/{POD}/{A}", "containerd", "assumed"),
    (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-{POD}.slice/cri-containerd-{A}.scope",
        "containerd",
        "prefix",
    ),
    (
        f"/system.slice/containerd.service/kubepods-burstable-{POD}.slice:cri-containerd:{A}",
        "containerd",
        "prefix",
    ),
    (f"/k8s.io/{A}", "containerd", "parent"),
    (f"/default/{A}", "containerd", "parent"),
    (f"/system.slice/nerdctl-{A}.scope", "containerd", "prefix"),
    # CRI-O
    (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-{POD}.slice/crio-{A}.scope", "cri-o", "prefix"),
    (f"/kubepods/besteffort/{POD}/crio-{A}", "cri-o", "prefix"),
    (f"/kubepods.slice/kubepods-{POD}.slice/crio-{A}.scope/container", "cri-o", "prefix"),
    # podman
    (f"/libpod_parent/libpod-{A}", "podman", "prefix"),
    (f"/libpod_parent/{B}/libpod-{A}", "podman", "prefix"),
    (f"/machine.slice/libpod-{A}.scope/container", "podman", "prefix"),
    (f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope", "podman", "prefix"),
    (f"/system.slice/web.service/libpod-payload-{A}", "podman", "prefix"),
    (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container",
        "podman",
        "prefix",
    ),
    # below a container
    (f"/docker/{A}/init.scope", "docker", "parent"),
    (f"/docker/{A}/docker/{B}", "docker", "parent"),
    (f"/docker/{A}/buildkit/x1y2", "docker", "parent"),
    (
        f"/docker/{A}/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{B}.scope",
        "docker",
        "parent",
    ),
]

HOST = [
    "/",
    "/init.scope",
    "/user.slice/user-1000.slice/session-3.scope",
    "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-terminal.scope",
    "/system.slice/ssh.service",
    "/system.slice/docker.service",
    "/system.slice/containerd.service",
    f"/machine.slice/libpod-conmon-{A}.scope",
    f"/kubepods.slice/kubepods-{POD}.slice/crio-conmon-{A}.scope",
    "/machine.slice/machine-qemu\\x2d1\\x2dweb.scope",
]

NEITHER = [
    ("/docker/buildkit/k2v9s0u3x1y7o5m4l6n8q0r1t", "build_step"),
    (f"/docker/buildkit/{A}", "build_step"),
    ("/default/redis", "not_a_container_id"),
    ("/k8s.io/redis", "not_a_container_id"),
    (f"/kubepods/besteffort/{POD}", "not_a_container_id"),
    (f"/kubepods/besteffort/{POD}/redis", "not_a_container_id"),
    (f"/libpod_parent/{A}", "not_a_container_id"),
    (f"/docker/{A[:-1]}", "not_a_container_id"),
    (f"/docker/{A.upper()}", "not_a_container_id"),
    ("/lxc.payload.web/system.slice/nginx.service", "unsupported_runtime"),
    ("/lxc/web", "unsupported_runtime"),
    ("/machine.slice/machine-web.scope", "unsupported_runtime"),
    ("/machine.slice/systemd-nspawn@web.service/payload", "unsupported_runtime"),
    ("/../..", "private_cgroup_namespace"),
    ("/../other", "private_cgroup_namespace"),
    ("", "not_a_cgroup_path"),
    (f"docker/{B[:8]}", "not_a_cgroup_path"),
]


@pytest.mark.parametrize(("path", "runtime", "basis"), NAMED)
def test_a_runtimes_path_names_its_container(path: str, runtime: str, basis: str) -> None:
    """Each runtime's naming, by either cgroup driver, gives runtime and id and says how it was decided."""
    assert ContainerName(runtime, A, basis) == container_name(path)


@pytest.mark.parametrize("path", HOST)
def test_a_host_path_is_plainly_the_hosts(path: str) -> None:
    """Services, sessions, virtual machines and the monitors of containers are the host's own."""
    assert container_name(path) is None
    assert "" == why_not_host(path)


@pytest.mark.parametrize(("path", "reason"), NEITHER)
def test_what_is_neither_container_nor_host_has_a_reason(path: str, reason: str) -> None:
    """A place that a runtime owns, without an id, is called neither container nor host."""
    assert container_name(path) is None
    assert reason == why_not_host(path)


def test_a_users_own_subtree_is_told_apart() -> None:
    """Names below `user@<uid>.service` are the user's choice, and that can be seen."""
    assert is_users_own(f"/user.slice/user-7.slice/user@7.service/user.slice/libpod-{A}.scope")
    assert not is_users_own(f"/system.slice/docker-{A}.scope")


def test_a_name_prints_as_the_evidence_writes_it() -> None:
    """`str` gives `<runtime>://<64 hex>`."""
    assert f"cri-o://{A}" == str(ContainerName("cri-o", A, "prefix"))


ids = st.text("0123456789abcdef", min_size=64, max_size=64)
pieces = st.one_of(
    st.text(max_size=20),
    ids,
    ids.map(lambda i: f"docker-{i}.scope"),
    ids.map(lambda i: f"x.slice:crio:{i}"),
    ids.map(lambda i: f"libpod-conmon-{i}.scope"),
    st.text("0123456789abcdef", min_size=60, max_size=68),
    st.sampled_from(["docker", "buildkit", "kubepods", "libpod_parent", "..", "default", ""]),
)
paths = st.lists(pieces, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(st.one_of(st.text(), paths))
@example(f"/docker/{A}\n")
@example(f"/docker-{A}.scope\x00")
@example("/" + "٣" * 64)
def test_any_text_gives_a_well_formed_name_or_none(path: str) -> None:
    """No text raises; an id is always 64 lower-case hex digits that stand in the path; a reason is one word."""
    name = container_name(path)
    if name is not None:
        assert re.fullmatch(r"[0-9a-f]{64}", name.id)
        assert name.id in path
        assert name.runtime in RUNTIMES
        assert name.basis in BASES
    assert re.fullmatch(r"[a-z_]*", why_not_host(path))


@given(paths, paths)
def test_nothing_below_a_container_changes_its_name(path: str, below: str) -> None:
    """Whoever can make cgroups inside a container cannot make it look like another one."""
    name = container_name(path)
    if name is not None and not path.endswith(" (deleted)"):
        assert name == container_name(path.rstrip("/") + below)
