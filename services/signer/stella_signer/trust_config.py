"""Which log, timestamp and certificate authorities are used, and whose keys count: files, or a TUF repository.

    state_directory/trust/trusted_root.json     what was used last: `verify-chain` on this node trusts it
    state_directory/trust/signing_config.json   likewise
    state_directory/trust/tuf/                  the TUF client's own metadata

Services are chosen by Sigstore's rules: those valid now, of each operator the one with the highest API version
that is known here, then by the selector.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from stella_shared.config import Rekor
from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.store import TRUST, TRUSTED_ROOT
from stella_shared.evidence.transparency import trust
from stella_shared.evidence.transparency.trust import TrustRoot

SIGNING_CONFIG: Final = "signing_config.json"
_TUF_SIGNING_CONFIG: Final = "signing_config.v0.2.json"
_MEDIA_TYPE: Final = "application/vnd.dev.sigstore.signingconfig.v0.2+json"
_CLIENT_MEDIA_TYPE: Final = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
_REKOR_VERSIONS: Final = (1, 2)


class _Range(msgspec.Struct, frozen=True):
    start: datetime | None = None
    end: datetime | None = None


class Service(msgspec.Struct, frozen=True, rename="camel"):
    """One service of a SigningConfig."""

    url: str
    major_api_version: int
    operator: str = ""
    valid_for: _Range = _Range()


class _Selection(msgspec.Struct, frozen=True):
    selector: str = "ANY"
    count: int = 1


class _SigningConfig(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    ca_urls: list[Service] = []
    rekor_tlog_urls: list[Service] = []
    rekor_tlog_config: _Selection = _Selection()
    tsa_urls: list[Service] = []
    tsa_config: _Selection = _Selection()


class _ClientTrustConfig(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    trusted_root: msgspec.Raw
    signing_config: msgspec.Raw


class Services(msgspec.Struct, frozen=True):
    """What a signer uses: logs, timestamp and certificate authorities by URL, and the trusted root.

    `logs_wanted` and `tsas_wanted` say of how many an answer is needed; the others stand in for those that fail.
    """

    logs: list[Service]
    logs_wanted: int
    tsas: list[str]
    tsas_wanted: int
    ca: str
    root: TrustRoot


def load(rekor: Rekor, state: Path, disk: Disk | None = None) -> Services:
    """Return what `rekor` configures, and keep a copy of it for verification.  May use the network, for TUF.

    Raises `ConfigError` for documents that cannot be used and `TryAgain` while the TUF repository is away.
    """
    root, signing = _documents(rekor, state)
    services = choose(root, signing, datetime.now(UTC))
    disk = disk or Disk()
    directory = state / TRUST
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True)
        disk.sync_directory(state)
    for name, data in ((TRUSTED_ROOT, root), (SIGNING_CONFIG, signing)):
        path = directory / name
        if not path.exists() or path.read_bytes() != data:
            disk.put(path, data, 0o600)
    return services


def load_stored(state: Path) -> Services | None:
    """Return what was used last, None when nothing was.  For the time while a TUF repository does not answer."""
    directory = state / TRUST
    try:
        root, signing = (directory / TRUSTED_ROOT).read_bytes(), (directory / SIGNING_CONFIG).read_bytes()
    except FileNotFoundError:
        return None
    return choose(root, signing, datetime.now(UTC))


def _documents(rekor: Rekor, state: Path) -> tuple[bytes, bytes]:
    """Return (trusted root, signing config) as the configured source has them."""
    if rekor.tuf_url:
        return _from_tuf(rekor, state / TRUST / "tuf")
    if rekor.trust_config:
        data = _read(rekor.trust_config, "signals.rekor.trust_config")
        try:
            both = msgspec.json.decode(data, type=_ClientTrustConfig)
        except msgspec.MsgspecError as e:
            raise ConfigError(f"signals.rekor.trust_config {rekor.trust_config}: {e}") from None
        if both.media_type != _CLIENT_MEDIA_TYPE:
            raise ConfigError(f"signals.rekor.trust_config {rekor.trust_config}: media type {both.media_type!r}")
        return bytes(both.trusted_root), bytes(both.signing_config)
    return (
        _read(rekor.trusted_root, "signals.rekor.trusted_root"),
        _read(rekor.signing_config, "signals.rekor.signing_config"),
    )


def _read(path: str, key: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(trust.MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{key} {path}: {e.strerror}", hint="name an existing file") from None
    if len(data) > trust.MAX_BYTES:
        raise ConfigError(f"{key} {path} is larger than {trust.MAX_BYTES} bytes")
    return data


def _from_tuf(rekor: Rekor, directory: Path) -> tuple[bytes, bytes]:
    """Return both documents out of the TUF repository, verified from the pinned root on (python-tuf)."""
    from tuf.api.exceptions import DownloadError, RepositoryError
    from tuf.ngclient.updater import Updater

    metadata, targets = directory / "metadata", directory / "targets"
    for folder in (metadata, targets):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    bootstrap = _read(rekor.tuf_root, "signals.rekor.tuf_root")
    try:
        updater = Updater(
            str(metadata), rekor.tuf_url, str(targets), rekor.tuf_url.rstrip("/") + "/targets", bootstrap=bootstrap
        )
        updater.refresh()
        found = []
        for name in (TRUSTED_ROOT, _TUF_SIGNING_CONFIG):
            info = updater.get_targetinfo(name)
            if info is None:
                raise ConfigError(f"the TUF repository {rekor.tuf_url} has no target {name}")
            path = updater.find_cached_target(info) or updater.download_target(info)
            found.append(Path(path).read_bytes())
    except DownloadError as e:
        raise TryAgain(f"the TUF repository {rekor.tuf_url} does not answer: {e}") from None
    except (RepositoryError, ValueError, OSError) as e:
        raise ConfigError(
            f"the TUF repository {rekor.tuf_url} cannot be trusted: {e}",
            hint="is signals.rekor.tuf_root the root.json of this repository, and has nothing expired?",
        ) from None
    return found[0], found[1]


def choose(root: bytes, signing: bytes, now: datetime) -> Services:
    """Return the services to use at `now`.  Raises `ConfigError` for documents that cannot be used."""
    try:
        parsed = trust.parse(root)
        config = msgspec.json.decode(signing, type=_SigningConfig)
    except (ValueError, msgspec.MsgspecError) as e:
        raise ConfigError(f"signals.rekor: {e}") from None
    if config.media_type != _MEDIA_TYPE:
        raise ConfigError(f"signals.rekor: a signing config of media type {config.media_type!r} is not {_MEDIA_TYPE!r}")
    authorities = _valid(config.ca_urls, (1,), now)
    logs = _valid(config.rekor_tlog_urls, _REKOR_VERSIONS, now)
    tsas = _valid(config.tsa_urls, (1,), now)
    return Services(
        logs,
        _wanted(len(logs), config.rekor_tlog_config, "logs"),
        [service.url for service in tsas],
        _wanted(len(tsas), config.tsa_config, "timestamp authorities"),
        authorities[0].url if authorities else "",
        parsed,
    )


def _valid(services: list[Service], versions: tuple[int, ...], now: datetime) -> list[Service]:
    best: dict[str, Service] = {}
    for service in services:
        span = service.valid_for
        holds = (span.start is None or span.start <= now) and (span.end is None or now <= span.end)
        known = best.get(service.operator)
        better = known is None or service.major_api_version > known.major_api_version
        if holds and better and service.major_api_version in versions:
            best[service.operator] = service
    return list(best.values())


def _wanted(valid: int, how: _Selection, what: str) -> int:
    """Return of how many services an answer is needed, by the signing config's selector."""
    if how.selector == "ALL":
        return valid
    count = max(1, how.count) if how.selector == "EXACT" else min(1, valid)
    if count > valid:
        raise ConfigError(f"signals.rekor: the signing config asks for {count} {what}, {valid} are valid now")
    return count


def describe(services: Services) -> dict[str, Any]:
    """Return what `stella signer status` shows of the services."""
    return {
        "log": ", ".join(f"{log.url} (API v{log.major_api_version})" for log in services.logs),
        "timestamp_authorities": ", ".join(services.tsas),
        "certificate_authority": services.ca,
        "trusted_root_sha256": services.root.sha256,
    }
