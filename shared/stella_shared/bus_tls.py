"""TLS towards the bus, the client's side: a context out of the configured files, and what went wrong in words.

Nothing is kept from one connection to the next: who renews a certificate replaces the files, and the next connection
shows the new one.  Pure but for reading those files.
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from stella_shared.config import BusTls
from stella_shared.errors import ConfigError, NotPermitted, StellaError, TryAgain

_FILE_MAX_BYTES: Final = 1 << 20
# OpenSSL's X509_V_ERR_…, of which the ssl module names none.
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _ADDRESS_MISMATCH = 9, 10, 62, 64
_TRUST_HINT: Final = "name the server's authority in signals.bus.tls.ca_file, or give the server another certificate"


class Unusable(OSError):
    """A connection that must not come about, as an error that the client library takes for one of the network's."""

    def __init__(self, error: StellaError) -> None:
        super().__init__(str(error))
        self.error = error


def context(tls: BusTls) -> ssl.SSLContext:
    """Return a context that trusts `ca_file`, or else what the machine trusts, and shows `cert_file`.

    Raises `ConfigError` for a file that is absent or not what its key says, `NotPermitted` for one that this user
    may not read.
    """
    authorities = _read("ca_file", tls.ca_file) if tls.ca_file else None
    try:
        # The library takes an empty text for none, and would trust what the machine trusts.
        made = ssl.create_default_context(cadata="-" if authorities == "" else authorities)
    except ssl.SSLError:
        raise _wrong("ca_file", tls.ca_file, "holds no certificate in PEM form") from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file:
        # Read first for the sake of the message: the library's names no file.
        _read("cert_file", tls.cert_file)
        _read("key_file", tls.key_file)
        try:
            made.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: _no_passphrase(tls.key_file))
        except ssl.SSLError as e:
            if e.reason == "KEY_VALUES_MISMATCH":
                raise _wrong("key_file", tls.key_file, f"is not the key of {tls.cert_file}") from None
            raise _wrong(
                "cert_file", tls.cert_file, f"and {tls.key_file} are no certificate and key in PEM form"
            ) from None
        except OSError as e:
            raise _wrong("cert_file", tls.cert_file, e.strerror or str(e)) from None
    return made


def _no_passphrase(path: str) -> str:
    # Without this the library would ask on the terminal, and wait.
    raise _wrong("key_file", path, "is protected by a passphrase, which nobody is there to type")


def _read(key: str, path: str) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(_FILE_MAX_BYTES + 1)
    except PermissionError:
        raise NotPermitted(
            f"signals.bus.tls.{key} {path}: permission denied",
            hint=f"let user {os.geteuid()}, and nobody else, read it",
            runbook="configuration-reference",
        ) from None
    except OSError as e:
        raise _wrong(key, path, e.strerror or str(e)) from None
    if len(data) > _FILE_MAX_BYTES:
        raise _wrong(key, path, f"is larger than {_FILE_MAX_BYTES} bytes")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise _wrong(key, path, "is not in PEM form") from None


def _wrong(key: str, path: str, what: str) -> ConfigError:
    return ConfigError(f"signals.bus.tls.{key} {path}: {what}", hint="docs/deployment.md says which file is which")


def no_tls(url: str) -> Unusable:
    """Return the error for a server that offers no TLS where it was demanded."""
    return Unusable(
        NotPermitted(
            f"the NATS server at {url} offers no TLS",
            hint="give it a certificate (stella signals bus-config --tls-certificate … --tls-key …)",
            runbook="configuration-reference",
        )
    )


def fault(e: Exception, url: str, tls: BusTls) -> StellaError | None:
    """Return what `e` means when it is about trust, None for any other failure.

    `TryAgain` for a certificate out of its time, which a renewal or a clock that is set cures; else `NotPermitted`.
    """
    if isinstance(e, Unusable):
        return e.error
    if isinstance(e, ssl.SSLCertVerificationError):
        return _distrust(e, url, tls)
    if isinstance(e, ssl.SSLError) and "ALERT" in (e.reason or ""):
        said = (e.reason or "").rpartition("ALERT_")[2].replace("_", " ").lower()
        shown = f"the certificate {tls.cert_file}" if tls.cert_file else "a client that shows no certificate"
        return NotPermitted(
            f"the NATS server at {url} refuses {shown}: {said}",
            hint="name one that its authority has signed, in signals.bus.tls.cert_file and key_file",
            runbook="configuration-reference",
        )
    return None


def _distrust(e: ssl.SSLCertVerificationError, url: str, tls: BusTls) -> StellaError:
    whose = f"the certificate of the NATS server at {url}"
    if e.verify_code in (_EXPIRED, _NOT_YET_VALID):
        when = "has expired" if e.verify_code == _EXPIRED else "is not valid yet"
        return TryAgain(
            f"{whose} {when}", hint="renew it; or set this machine's clock", runbook="configuration-reference"
        )
    if e.verify_code in (_HOST_MISMATCH, _ADDRESS_MISMATCH):
        return NotPermitted(
            f"{whose} is for another name: {e.verify_message}",
            hint="write a name into signals.bus.url that the certificate has",
            runbook="configuration-reference",
        )
    trusted = tls.ca_file or "the machine's authorities"
    return NotPermitted(
        f"{whose} is not vouched for by {trusted}: {e.verify_message}",
        hint=_TRUST_HINT,
        runbook="configuration-reference",
    )
