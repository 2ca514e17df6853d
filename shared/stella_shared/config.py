"""The configuration: every key, its meaning, its default, its limits.

    built-in default  <  stellaops.yaml  <  environment STELLA_SIGNALS__A__B  <  overrides (flags, "a.b")

`load` merges these four and validates the result; what it returns is consistent and safe to print (no
secrets in it).  `check_runnable` is the second, stricter level: it refuses what is written correctly but
cannot run in this release, so that a file made for a later release can still be read and checked.
The structs below are the only place where a key is declared: the reference page and the JSON Schema are
made from them.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from stella_shared import config_layers, selectors, yamltext
from stella_shared.config_checks import CHECKS
from stella_shared.errors import ConfigError

FILE_MAX_BYTES: Final = 1 << 20
ENV_PREFIX: Final = "STELLA_SIGNALS__"


def _key(description: str) -> Meta:
    return Meta(description=description)


def _number(description: str, ge: float, le: float, unit: str = "") -> Meta:
    """Return the Meta of a bounded number: meaning, limits and unit."""
    extra = {"unit": unit} if unit else {}
    return Meta(description=description, ge=ge, le=le, extra=extra)


def _text(description: str, max_length: int = 4096) -> Meta:
    return Meta(description=description, max_length=max_length)


def _list(description: str) -> Meta:
    return Meta(description=description, max_length=256)


_Item = Annotated[str, Meta(min_length=1, max_length=4096)]
_Pattern = Annotated[str, Meta(min_length=1, max_length=512)]


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, nothing unknown."""


class Rotation(_Section, frozen=True):
    """When the open chunk is closed: at whichever limit is met first."""

    max_size_mb: Annotated[
        float,
        _number(
            "Size at which the open chunk is closed: of its lines, before they are compressed. Fractions are allowed.",
            unit="MiB (2^20 bytes)",
            ge=0.001,
            le=65536,
        ),
    ] = 100.0
    max_age_hours: Annotated[
        float,
        _number(
            "Age at which the open chunk is closed and signed, empty or not. Fractions are allowed: 0.001 is 3.6 "
            "seconds. What is not signed yet could still be rewritten by root.",
            unit="hours",
            ge=0.00002,
            le=8760,
        ),
    ] = 1.0


class Signing(_Section, frozen=True):
    """How chunks are signed."""

    enabled: Annotated[bool, _key("Sign each closed chunk. Without it the chunks still form a chain of digests.")] = (
        True
    )
    key_id: Annotated[
        str,
        _text(
            "Which key signs. `local`: the ECDSA P-256 key made by `stella signals init`. `fulcio`: keyless, a "
            "certificate of a few minutes for each chunk. Otherwise the URI of a P-256 key in a KMS or HSM, as "
            "securesystemslib writes it: `awskms:…`, `gcpkms:…`, `azurekms:…`, `hsm:2?label=TOKEN`, `file2:…`.",
            max_length=512,
        ),
    ] = "local"
    submit_to_rekor: Annotated[
        bool,
        _key(
            "Submit each signed statement to a transparency log. A public entry is for ever, so this is off "
            "until a log is configured under signals.rekor; switched on without one, the node refuses to start."
        ),
    ] = False
    identity_token_file: Annotated[
        str,
        _text(
            "File with the OIDC token that `fulcio` is shown, read anew for each certificate, such as a projected "
            "service account token. Empty: the ambient credential of the platform, where there is one."
        ),
    ] = ""
    pin_file: Annotated[str, _text("File with the PIN of an HSM (`hsm:…`). Readable by the signer's user alone.")] = ""
    pkcs11_module: Annotated[
        str, _text("Path of the HSM's PKCS#11 library, for `hsm:…`. Empty: what $PYKCS11LIB names.")
    ] = ""


class Rekor(_Section, frozen=True):
    """The transparency log, the timestamp and certificate authorities: what Sigstore calls a trust configuration.

    It comes from one file (trust_config), from two (trusted_root, signing_config), or from a TUF repository.
    """

    trust_config: Annotated[
        str, _text("File with a Sigstore ClientTrustConfig: trusted root and signing config in one.")
    ] = ""
    trusted_root: Annotated[str, _text("File with a Sigstore TrustedRoot: whose keys count.")] = ""
    signing_config: Annotated[str, _text("File with a Sigstore SigningConfig (v0.2): which services are used.")] = ""
    tuf_url: Annotated[
        str, _text("URL of a TUF repository that has trusted_root.json and signing_config.v0.2.json. Needs tuf_root.")
    ] = ""
    tuf_root: Annotated[
        str, _text("File with the TUF repository's root.json, obtained by other means: trust begins there.")
    ] = ""
    read_url: Annotated[
        str,
        _text(
            "Prefix of the URLs that a Rekor v2 log is read from (`<read_url>/checkpoint`), where it is served from "
            "another place than it is written to. Empty: `/api/v2` of the log itself."
        ),
    ] = ""
    submit_every: Annotated[
        int,
        _number(
            "Submit every n-th chunk only. Each statement names the one before it, so an entry vouches for all "
            "chunks before it, too. The first chunk, the last one at a stop, and one an hour are always submitted.",
            unit="chunks",
            ge=1,
            le=10_000,
        ),
    ] = 1
    parallel_uploads: Annotated[int, _number("Submissions under way at a time.", unit="submissions", ge=1, le=16)] = 4


class WatchedFunctions(_Section, frozen=True):
    """Functions of one binary, or of all that a glob names."""

    binary: Annotated[
        str,
        Meta(
            description="Which file: an absolute path or glob as in filters.paths, by the name that the process has "
            "for it, inside its container; or `build-id:<hex>`.",
            min_length=1,
            max_length=4096,
        ),
    ]
    functions: Annotated[
        list[_Pattern],
        Meta(
            description="Which functions: exact names, or globs with `*` and `?`; mangled, demangled, or demangled "
            "without arguments.",
            min_length=1,
            max_length=256,
        ),
    ]
    mode: Annotated[
        Literal["trace", "count"],
        _key("`trace`: a line for each call. `count`: a line a second for each process and function, with the number."),
    ] = "trace"
    stack: Annotated[bool, _key("With `trace`: record the caller's stack, up to 8 frames.")] = True
    image: Annotated[
        str,
        _text(
            "A pattern of image names, as in the `image:` of filters.target_containers: only files that containers "
            "of such images run are watched, and none of the node's own.",
            max_length=selectors.MAX_GLOB,
        ),
    ] = ""


class Probes(_Section, frozen=True):
    """Which probes are attached, one switch each."""

    sys_enter_openat: Annotated[
        bool, _key("File opens with their outcome: open, openat and openat2 (`file_open`).")
    ] = True
    sched_process_exec: Annotated[bool, _key("Program starts (`process_exec`).")] = True
    inet_sock_set_state: Annotated[bool, _key("TCP state changes, IPv4 and IPv6 (`tcp_state`).")] = True
    libc_connect: Annotated[bool, _key("Outgoing connections with their result (`net_connect`).")] = True
    libc_accept: Annotated[
        bool, _key("Accepted connections with their result: accept and accept4 (`net_connect`).")
    ] = True
    openssl_read: Annotated[bool, _key("SSL_read and SSL_read_ex: byte counts, never payload (`ssl_op`).")] = True
    openssl_write: Annotated[bool, _key("SSL_write and SSL_write_ex: byte counts, never payload (`ssl_op`).")] = True
    libc_source: Annotated[
        Literal["syscall", "uprobe"],
        _key(
            "Where libc_connect and libc_accept look: `syscall` tracepoints see static and musl programs too "
            "and cost a hundredth; `uprobe` sees the library call itself."
        ),
    ] = "syscall"
    kernel_paths: Annotated[
        Literal["relative", "always"],
        _key(
            "When an opened file's path is taken from the kernel itself, which no process can falsify: for `relative` "
            "paths, which it makes absolute, or `always`, which costs some more for each open."
        ),
    ] = "relative"
    stacks: Annotated[
        list[Literal["file_open", "process_exec", "net_connect"]],
        _key(
            "Events that carry the caller's user stack, as build-ids and offsets with the functions' names. Some "
            "0.4 µs for each event, and more distinct lines. Calls of watched functions have a stack of their own."
        ),
    ] = []
    openssl_libraries: Annotated[
        list[_Item],
        _list("Absolute paths of the libssl files to watch. Empty: found in the system's library folders."),
    ] = []
    functions: Annotated[
        list[WatchedFunctions],
        Meta(
            description="Functions whose calls are recorded (`function_call`): a list of mappings with the keys "
            "`binary`, `functions`, `mode` (`trace` or `count`), `stack`, `image`. At most 64 entries, and 20,000 "
            "functions at one time: an entry that matches more in a file than are left is not attached, and says so. "
            "docs/functions.md explains each key and what it costs.",
            max_length=64,
        ),
    ] = []


class Paths(_Section, frozen=True):
    """Which file paths are recorded.  Deny wins over allow; an empty allow list allows all."""

    allowlist: Annotated[
        list[_Item],
        _list(
            "Record only opens of these paths. `**` stands for any depth, `*` and `?` stay within one "
            "segment; `/etc/**` is everything below /etc. Patterns `<folder>/**` are decided in the kernel, "
            "others are finished in user space."
        ),
    ] = msgspec.field(default_factory=lambda: ["/etc/**", "/var/lib/**"])
    denylist: Annotated[list[_Item], _list("Never record opens of these paths; the same patterns.")] = msgspec.field(
        default_factory=lambda: ["/proc/**", "/sys/**", "/dev/**"]
    )


class Networks(_Section, frozen=True):
    """Which peers' addresses are recorded.  Deny wins over allow; an empty allow list allows all."""

    allowlist: Annotated[
        list[_Item], _list("Record only connections with these networks: CIDR or single addresses.")
    ] = []
    denylist: Annotated[
        list[_Item], _list("Never record connections with these networks: CIDR or single addresses.")
    ] = msgspec.field(default_factory=lambda: ["127.0.0.0/8"])


class Filters(_Section, frozen=True):
    """What is collected at all.  Without targets it is the whole node; targets of several kinds add up."""

    target_containers: Annotated[
        list[_Item],
        _list(
            "Only these containers: ids of 12 to 64 hex digits, `docker://` may stand before; or selectors: "
            "`name:<pattern>` for the container's or pod's name, `image:<pattern>` for the image's name, "
            "`label:<key>=<pattern>`. `*` and `?` stand for any text and any one character. Selectors need the "
            "runtime's socket (signals.runtimes)."
        ),
    ] = []
    target_namespaces: Annotated[
        list[_Item],
        _list(
            "Only processes in these kernel namespaces, written as `readlink /proc/PID/ns/pid` shows them: "
            "`pid:[4026531836]`; pid, mnt or net."
        ),
    ] = []
    target_cgroups: Annotated[
        list[_Item],
        _list(
            "Only processes in these cgroup v2 groups and below: paths under /sys/fs/cgroup such as "
            "`/system.slice/nginx.service`."
        ),
    ] = []
    paths: Annotated[Paths, _key("File path patterns.")] = Paths()
    networks: Annotated[Networks, _key("Networks.")] = Networks()


class Resources(_Section, frozen=True):
    """Bounds of memory and caches."""

    max_cache_memory_mb: Annotated[
        int,
        _number(
            "Upper bound of the memory that each service may hold in caches.",
            unit="MiB (2^20 bytes)",
            ge=1,
            le=1 << 20,
        ),
    ] = 256
    symbol_cache_max_entries: Annotated[
        int,
        _number("Resolved addresses that each enricher keeps in memory.", unit="entries", ge=1, le=100_000_000),
    ] = 100_000
    container_cache_ttl_seconds: Annotated[
        int,
        _number(
            "How long a cgroup's container is remembered before it is looked up again.",
            unit="seconds",
            ge=1,
            le=86400,
        ),
    ] = 300


class Symbols(_Section, frozen=True):
    """Names of functions for stack frames."""

    enabled: Annotated[
        bool,
        _key(
            "Resolve the frames of stacks when lines are made, and keep the tables for it below the state directory. "
            "`false`: lines carry build-id and offset, which `stella signals symbolize` can resolve later."
        ),
    ] = True
    debug_directories: Annotated[
        list[_Item],
        _list("Where separate debug files are looked for, as `<directory>/.build-id/xx/rest.debug`."),
    ] = msgspec.field(default_factory=lambda: ["/usr/lib/debug"])
    debuginfod_urls: Annotated[
        list[_Item],
        _list(
            "debuginfod servers that are asked for what is not on this machine, by build-id. They learn which "
            "programs run here. Empty: nobody is asked."
        ),
    ] = []
    store_max_mb: Annotated[
        int,
        _number(
            "Size of the tables kept on disk; those unused for longest go first.",
            unit="MiB (2^20 bytes)",
            ge=1,
            le=1 << 20,
        ),
    ] = 256


class Metrics(_Section, frozen=True):
    """The gateway: /health, /status, /metrics and the status page."""

    enabled: Annotated[bool, _key("Run the gateway.")] = True
    port: Annotated[int, _number("TCP port the gateway listens on.", ge=1, le=65535)] = 9090
    address: Annotated[
        str,
        _text(
            "Address the gateway listens on: an IP address or `localhost`. Anything beyond loopback needs token_file.",
            max_length=64,
        ),
    ] = "127.0.0.1"
    token_file: Annotated[
        str,
        _text(
            "File with the bearer token that callers from other machines must send. Empty: none, and the "
            "gateway refuses to listen beyond loopback."
        ),
    ] = ""


class Logging(_Section, frozen=True):
    """The services' own logs, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], _key("Least severity that is written.")] = "info"
    format: Annotated[Literal["json", "text"], _key("`json`: one object a line. `text`: for people.")] = "json"


class BusTls(_Section, frozen=True):
    """TLS towards the server of bus.url.  The files are read anew at each connection, so that they can be renewed."""

    ca_file: Annotated[
        str,
        _text(
            "PEM file with the certificates of the authorities that may vouch for the server, and no others. Empty: "
            "those that the machine trusts."
        ),
    ] = ""
    cert_file: Annotated[
        str,
        _text(
            "PEM file with the certificate that the server is shown, and those between it and its authority. "
            "Needs key_file. Empty: none is shown."
        ),
    ] = ""
    key_file: Annotated[
        str, _text("PEM file with the key of cert_file, without a passphrase. Readable by the part's user alone.")
    ] = ""


class BusSection(_Section, frozen=True):
    """The NATS server between the services."""

    url: Annotated[
        str,
        _text(
            "URL of an existing NATS server with JetStream: `nats://…` or `tls://…`, several separated by "
            "commas. Empty: the node runs a server of its own."
        ),
    ] = ""
    port: Annotated[
        int, _number("Loopback TCP port of the node's own NATS server. 0: any free one.", ge=0, le=65535)
    ] = 4222
    credentials_file: Annotated[
        str,
        _text(
            "JSON file with the seed of each service's nkey on the bus, or its user and password, in the form of the "
            "bus.json in the state directory. Empty: that bus.json."
        ),
    ] = ""
    tls: Annotated[BusTls, _key("TLS towards the server of bus.url.")] = BusTls()
    sync_seconds: Annotated[
        int,
        _number(
            "How often the node's own NATS server syncs what it stores to the disk; 0: each message, before it is "
            "acknowledged. A power cut takes what is younger and not in the evidence yet.",
            ge=0,
            le=3600,
        ),
    ] = 10


class Redaction(_Section, frozen=True):
    """What becomes `***` in the arguments of programs, before they are written into a line."""

    enabled: Annotated[
        bool,
        _key(
            "Redact arguments by the built-in rules: passwords, tokens and keys by option, variable, header, URL and "
            "form. `false`: they are recorded as they are."
        ),
    ] = True
    patterns: Annotated[
        list[_Pattern],
        Meta(
            description="Regular expressions of your own (RE2 syntax: no look-around, no back-reference), searched in "
            "each argument. A group named `secret` is replaced, else the whole match. One that finds more than 64 "
            "times in an argument takes it whole.",
            max_length=32,
        ),
    ] = []
    keep: Annotated[
        list[_Item],
        _list(
            "File names of programs, such as `myapp`, whose arguments are never redacted, by the patterns neither. "
            "For a script it is the script's."
        ),
    ] = []


_SOCKET: Final = "`auto`: the usual paths are asked when they exist. Empty: not asked."


class Runtimes(_Section, frozen=True):
    """Container runtimes that are asked for images, labels and pods."""

    docker_socket: Annotated[str, _text(f"Path of Docker's API socket. {_SOCKET}")] = "auto"
    podman_socket: Annotated[str, _text(f"Path of podman's API socket, of podman as root. {_SOCKET}")] = "auto"
    containerd_socket: Annotated[
        str, _text(f"Path of containerd's socket, for containers of nerdctl and ctr. {_SOCKET}")
    ] = "auto"
    cri_socket: Annotated[
        str,
        _text(
            "Path of the socket that the kubelet uses (CRI), for Kubernetes' containers. `auto`: containerd's socket "
            "and CRI-O's usual one, when they exist. Empty: not asked."
        ),
    ] = "auto"
    labels: Annotated[
        list[_Item],
        _list(
            "Which labels of containers go into lines, by patterns of their keys such as `com.example.*`; `*` and `?` "
            "stand for any text and any one character. The first 16 by key, 256 characters of each value."
        ),
    ] = []


class Signals(_Section, frozen=True):
    """Everything under the top key `signals`."""

    enabled: Annotated[bool, _key("Collect at all. `false`: a node refuses to start and says so.")] = True
    output_directory: Annotated[str, _text("Folder of the evidence: chunks, statements, signatures.")] = (
        "/var/lib/stellaops/evidence"
    )
    ring_buffer_size: Annotated[
        int,
        _number(
            "Size of the ring buffer between kernel and collector: a power of two and a multiple of the page size.",
            unit="bytes",
            ge=4096,
            le=1 << 30,
        ),
    ] = 262144
    max_events_per_second: Annotated[
        int,
        _number(
            "Rate limit in the kernel for the whole node; what is above it is counted as lost with cause "
            "rate_limit. 0: unlimited.",
            unit="events per second",
            ge=0,
            le=100_000_000,
        ),
    ] = 0
    max_events_per_second_per_container: Annotated[
        int,
        _number(
            "The same for each container by itself (each cgroup, to be exact), so that a loud one costs the others "
            "nothing. 0: unlimited.",
            unit="events per second",
            ge=0,
            le=100_000_000,
        ),
    ] = 0
    rotation: Annotated[Rotation, _key("When a chunk is closed.")] = Rotation()
    signing: Annotated[Signing, _key("How chunks are signed.")] = Signing()
    rekor: Annotated[Rekor, _key("The transparency log and its surroundings.")] = Rekor()
    probes: Annotated[Probes, _key("Which probes are attached.")] = Probes()
    filters: Annotated[Filters, _key("What is collected.")] = Filters()
    resources: Annotated[Resources, _key("Bounds of memory and caches.")] = Resources()
    symbols: Annotated[Symbols, _key("Names of functions for stack frames.")] = Symbols()
    metrics: Annotated[Metrics, _key("The gateway.")] = Metrics()
    logging: Annotated[Logging, _key("The services' own logs.")] = Logging()
    node: Annotated[str, _text("Name of this node in subjects and evidence. Empty: the host name.", max_length=253)] = (
        ""
    )
    state_directory: Annotated[
        str,
        _text(
            "Folder of keys, bus data, logs and run state, readable by its owner only. Empty: `state` beside "
            "output_directory."
        ),
    ] = ""
    bus: Annotated[BusSection, _key("The NATS server between the services.")] = BusSection()
    enrichers: Annotated[int, _number("Enricher processes on this node.", ge=1, le=64)] = 1
    runtimes: Annotated[Runtimes, _key("Container runtimes.")] = Runtimes()
    redaction: Annotated[Redaction, _key("Secrets in arguments.")] = Redaction()
    syscall_filter: Annotated[
        bool,
        _key(
            "Refuse system calls that a part of the node has no use for (seccomp). `false` is for diagnosis: `/status` "
            "says so, part by part."
        ),
    ] = True


class BusUser(Struct, frozen=True, omit_defaults=True):
    """One service's account on the bus: the seed of an nkey, or user and password as older releases made them."""

    user: str = ""
    password: str = ""
    seed: Annotated[str, Meta(pattern="^(SU[A-Z2-7]{56})?$")] = ""

    def __post_init__(self) -> None:
        if bool(self.seed) == bool(self.user or self.password):
            raise ValueError("an account has a seed, or else user and password")

    def __repr__(self) -> str:
        return f"BusUser({self.user or 'nkey'})"


class BusUsers(Struct, frozen=True):
    """The content of bus.json: accounts by service name.  Mode 0600; it never leaves the node."""

    users: dict[str, BusUser]


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> Signals:
    """Return the effective configuration.

    `path` None means defaults; `environ` contributes its STELLA_SIGNALS__… variables (lists: separated by
    commas, or YAML); `overrides` maps dotted keys below `signals` (`"metrics.port"`) to values and wins.
    Raises `ConfigError` with one line for each fault: file and line, key, value and what is allowed.
    """
    return _merge(path, environ, overrides or {})[0]


class Origin(Struct, frozen=True):
    """One key, its value in force, and where that comes from.

    `source` is `default`, `<file>:<line>`, `environment <variable>` or `option`.
    """

    key: str
    value: object
    source: str


def origins(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> list[Origin]:
    """Return every key with its value and origin, in the order declared.  Arguments and errors as of `load`."""
    signals, merge = _merge(path, environ, overrides or {})
    found = []
    for field in declared():
        value: object = signals
        for name in field.key.split(".")[1:]:
            value = getattr(value, name)
        found.append(Origin(field.key, value, merge.source(field.key) or "default"))
    return found


def _merge(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> tuple[Signals, config_layers.Merge]:
    document, lines = yamltext.parse(_read(path), str(path)) if path else (None, {})
    merge = config_layers.Merge(Signals, "signals", CHECKS, str(path), lines)
    values = merge.document(document)
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            keys = name.removeprefix(ENV_PREFIX).lower().split("__")
            merge.place(values, keys, environ[name], f"environment {name}")
        elif name.startswith(ENV_PREFIX.rstrip("_")):
            merge.faults.append(_misspelt_variable(name))
    for key, value in overrides.items():
        merge.place(values, key.removeprefix("signals.").split("."), value, "option")
    signals: Signals = merge.result(values)
    if not merge.faults:
        merge.faults += _cross_faults(signals)
    if merge.faults:
        raise ConfigError(
            "\n".join(merge.faults), hint="docs/reference/configuration.md lists every key and what it allows"
        )
    return signals, merge


def check_runnable(signals: Signals) -> None:
    """Raise `ConfigError` for what `load` accepts but this release cannot run, one line for each fault."""
    faults: list[str] = []
    if not signals.enabled:
        faults.append("signals.enabled is false: nothing is to be collected")
    signing, rekor = signals.signing, signals.rekor
    if signing.enabled and signing.key_id == "fulcio" and not has_trust_config(rekor):
        faults.append(
            "signals.signing.key_id is 'fulcio' but no certificate authority is configured: set "
            "signals.rekor.trust_config (or tuf_url and tuf_root), or write key_id: local"
        )
    if signing.submit_to_rekor and not has_trust_config(rekor):
        faults.append(
            "signals.signing.submit_to_rekor is true but no transparency log is configured: a public entry "
            "is for ever, so none is assumed; set signals.rekor.trust_config (or tuf_url and tuf_root), or write "
            "false: chunks stay signed, can be verified offline, and can be submitted later"
        )
    if signing.submit_to_rekor and not signing.enabled:
        faults.append("signals.signing.submit_to_rekor is true but signals.signing.enabled is false")
    runtimes = signals.runtimes
    sockets = (runtimes.docker_socket, runtimes.podman_socket, runtimes.containerd_socket, runtimes.cri_socket)
    if any(selectors.is_selector(t) for t in signals.filters.target_containers) and not any(sockets):
        faults.append(
            "signals.filters.target_containers has selectors, but no runtime may be asked what they match: set a "
            "socket of signals.runtimes, or write ids"
        )
    if any(entry.image for entry in signals.probes.functions) and not any(sockets):
        faults.append(
            "signals.probes.functions has an image, but no runtime may be asked which containers are of it: set a "
            "socket of signals.runtimes, or leave image out"
        )
    if signing.enabled and signing.key_id.startswith("hsm:") and not signing.pin_file:
        faults.append("signals.signing.key_id is an HSM's key, and signals.signing.pin_file names no file with its PIN")
    if faults:
        raise ConfigError("\n".join(faults), hint="docs/reference/configuration.md explains these keys")


def has_trust_config(rekor: Rekor) -> bool:
    """Return whether the surroundings of a log are configured at all."""
    return bool(rekor.trust_config or (rekor.trusted_root and rekor.signing_config) or rekor.tuf_url)


def selector_texts(signals: Signals) -> list[str]:
    """Return the selectors of targets, then those of watched functions' images, each once."""
    targets = [text for text in signals.filters.target_containers if selectors.is_selector(text)]
    images = [selectors.of_image(entry.image) for entry in signals.probes.functions if entry.image]
    return list(dict.fromkeys([*targets, *images]))


def node_name(signals: Signals) -> str:
    """Return the node's name: the configured one, else the host name."""
    return signals.node or socket.gethostname()


def state_directory(signals: Signals) -> Path:
    """Return the state directory: the configured one, else `state` beside the evidence."""
    return Path(signals.state_directory or PurePosixPath(signals.output_directory).parent / "state")


def symbols_directory(signals: Signals) -> Path:
    """Return the folder of the symbol tables that are kept."""
    return state_directory(signals) / "symbols"


def bus_url(signals: Signals) -> str:
    """Return the URL of the bus: the configured server, else the node's own on loopback."""
    return signals.bus.url or f"nats://127.0.0.1:{signals.bus.port}"


def bus_users_file(signals: Signals) -> Path:
    """Return the path of the file that holds the services' bus users."""
    return Path(signals.bus.credentials_file or state_directory(signals) / "bus.json")


def bus_user(signals: Signals, service: str) -> BusUser | None:
    """Return the account of `service` on the bus; None when there is no users file or no such user.

    Raises `ConfigError` when the file is there and cannot be used.
    """
    path = bus_users_file(signals)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f"bus users {path}: {e.strerror}") from None
    try:
        return msgspec.json.decode(data, type=BusUsers).users.get(service)
    except msgspec.MsgspecError as e:
        raise ConfigError(f"bus users {path}: {e}") from None


def digest(signals: Signals) -> str:
    """Return `sha256:<hex>` of the effective configuration: JSON of every key, sorted, defaults included."""
    return "sha256:" + hashlib.sha256(msgspec.json.encode(signals, order="sorted")).hexdigest()


def declared() -> list[config_layers.Field]:
    """Return every key of the configuration as declared: dotted name, type, Meta, default."""
    return config_layers.fields(Signals, "signals")


def env_name(key: str) -> str:
    """Return the environment variable of a dotted key."""
    return ENV_PREFIX + key.removeprefix("signals.").replace(".", "__").upper()


def _misspelt_variable(name: str) -> str:
    """Say that a variable would have no effect, and which one was probably meant."""
    near = get_close_matches(name, [env_name(field.key) for field in declared()], 1)
    meant = f"did you mean {near[0]}?" if near else f"variables begin with {ENV_PREFIX}"
    return f"unknown environment variable {name}; {meant}"


def _read(path: Path) -> bytes:
    """Return the file's bytes; refuse what is absent, empty, no regular file, or larger than `FILE_MAX_BYTES`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"configuration {path} is not a regular file")
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"configuration {path}: {e.strerror}", hint="name an existing file with --config") from None
    if len(data) > FILE_MAX_BYTES:
        raise ConfigError(f"configuration {path} is larger than {FILE_MAX_BYTES} bytes")
    if not data:
        # Nobody writes such a file: it is what a power cut leaves of one. Its defaults would watch the whole machine.
        raise ConfigError(
            f"configuration {path} has no content at all, as after a power cut",
            hint="put it back, or write `signals:` into it to have every default",
        )
    return data


def _cross_faults(signals: Signals) -> list[str]:
    """Check what concerns two keys at once."""
    faults = _rekor_faults(signals.rekor) + _bus_faults(signals.bus)
    state, evidence = PurePosixPath(state_directory(signals)), PurePosixPath(signals.output_directory)
    if state == evidence or evidence in state.parents or state in evidence.parents:
        faults.append(
            f"signals.state_directory ({state}) and signals.output_directory ({evidence}) lie in each other; "
            "clearing the evidence must not clear the keys"
        )
    return faults


def _bus_faults(bus: BusSection) -> list[str]:
    """Check that what is meant to be encrypted is."""
    if bool(bus.tls.cert_file) != bool(bus.tls.key_file):
        return ["signals.bus.tls: cert_file and key_file go together; name both, or neither"]
    servers = bus.url.split(",")
    if bus.tls != BusTls() and not all(server.strip().startswith("tls://") for server in servers):
        return ["signals.bus.tls is set, and signals.bus.url is not tls://…; the node's own server has no TLS"]
    if len({server.strip().partition(":")[0] for server in servers}) > 1:
        return ["signals.bus.url mixes nats:// and tls://; a client that cannot reach one would go on without TLS"]
    return []


def _rekor_faults(rekor: Rekor) -> list[str]:
    """Check that there is one source of trust at the most, and that it is whole."""
    files = bool(rekor.trusted_root or rekor.signing_config)
    sources = [name for name, used in (("trust_config", rekor.trust_config), ("tuf_url", rekor.tuf_url)) if used]
    sources += ["trusted_root and signing_config"] if files else []
    if len(sources) > 1:
        return [f"signals.rekor: {', '.join(sources)} are two sources of trust; name one"]
    if files and not (rekor.trusted_root and rekor.signing_config):
        return ["signals.rekor: trusted_root and signing_config go together; or use trust_config for both in one file"]
    if bool(rekor.tuf_url) != bool(rekor.tuf_root):
        return ["signals.rekor: tuf_url and tuf_root go together; trust begins with a root.json obtained otherwise"]
    return []
