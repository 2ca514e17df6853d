"""Keys that are somewhere else: an HSM by PKCS#11, a KMS URI, keyless certificates.  Real ones, but for the cloud's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.evidence.chain_maker import COVERAGE, Node, Source, one
from tests.signer.log_kit import Queue, Surroundings, surroundings
from tests.sigstore import trust
from tests.sigstore.fulcio import Fulcio, identity_token
from tests.sigstore.peers import Check, judge_js, judge_python

from stella_shared import config
from stella_shared.config import Signing
from stella_shared.errors import ConfigError
from stella_shared.evidence import names
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.store import initialise, places, trust_identity, trust_key
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.verify import verify_chain
from stella_shared.evidence.vouching import Trust
from stella_signer.chunks import ChunkStore
from stella_signer.fulcio import FulcioKey
from stella_signer.kms import KmsKey
from stella_signer.outside import Later, Outside
from stella_signer.signing import RemoteKey

pytestmark = pytest.mark.anyio
WHO = Identity("spiffe://test/node", "https://issuer.test")
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "1234"


class RemoteNode(Node):
    """A node without a key of its own: chunks are closed here and signed elsewhere."""

    def __init__(self, folder: Path, key_id: str) -> None:
        signing = {"output_directory": str(folder / "evidence"), "node": "node-a", "signing.key_id": key_id}
        self.signals = config.load(None, {}, signing)
        self.name = "node-a"
        self.where = places(self.signals)
        self.made = initialise(self.signals)
        self.clock = Clock()

    def open(self, disk: Any = None) -> ChunkStore:
        return ChunkStore.open(self.where, None, version="0.1.0", now=self.clock, disk=disk, remote=True)


class Clock:
    """The real time, as a signer tells it."""

    def __call__(self) -> str:
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def fill(node: Node) -> ChunkStore:
    """Close three chunks: genesis, one with events, one without; none of them is signed."""
    store = node.open()
    store.commit(*one(Source("node-a").batch({0: 3}, coverage=COVERAGE, final=True)))
    store.close("size")
    store.close("age")
    return store


async def sign_all(store: ChunkStore, key: RemoteKey) -> int:
    """Sign what waits, as the signer does; return how many."""
    count = 0
    while waiting := store.next_to_sign():
        store.signed(waiting[0], await key.sign(waiting[1]))
        count += 1
    return count


# -- HSM and KMS ---------------------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SoftHSM2 with a token `stella` that holds a P-256 key with id 2."""
    conf = tmp_path / "softhsm2.conf"
    (tmp_path / "tokens").mkdir()
    conf.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    pem = tmp_path / "key.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    tool = ["softhsm2-util", "--label", "stella", "--pin", PIN]
    subprocess.run([*tool, "--init-token", "--free", "--so-pin", PIN], check=True, capture_output=True)
    imported = ["softhsm2-util", "--import", pem, "--token", "stella", "--label", "key", "--id", "02", "--pin", PIN]
    subprocess.run(imported, check=True, capture_output=True)
    pin = tmp_path / "pin"
    pin.write_text(PIN + "\n")
    yield pin


def hsm(pin: Path, key_id: str = "hsm:2?label=stella") -> Signing:
    """Return the configuration of the HSM's key."""
    return Signing(key_id=key_id, pin_file=str(pin), pkcs11_module=MODULE)


_HSM_PROCESS = """
import json, sys, anyio
from pathlib import Path
from tests.signer import test_remote_keys as t
folder, pin = Path(sys.argv[1]), Path(sys.argv[2])
node = t.RemoteNode(folder, "hsm:2?label=stella")
store = t.fill(node)
key = t.KmsKey.load(t.hsm(pin), node.where.state)
t.trust_key(node.where, key.public_key)
signed = anyio.run(t.sign_all, store, key)
store.release()
again = t.KmsKey.load(t.hsm(pin), node.where.state)
print(json.dumps({"signed": signed, "same": again.key_id == key.key_id, "mode": key.describe()["mode"]}))
"""


def in_a_process(script: str, *arguments: Path) -> dict[str, Any]:
    """Run a script and return the JSON it prints: a PKCS#11 library is initialised once in a process."""
    import sys

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


async def test_an_hsm_signs_a_chain(tmp_path: Path, token: Path) -> None:
    """A P-256 key in SoftHSM2 signs by PKCS#11; its public key becomes known, and the chain verifies."""
    told = in_a_process(_HSM_PROCESS, tmp_path / "node", token)
    assert told == {"signed": 3, "same": True, "mode": "kms"}
    report = verify_chain(tmp_path / "node" / "evidence")
    assert report.valid and [c.status for c in report.chunks] == ["VALID_PENDING"] * 3


_REFUSALS = """
import json, sys
from pathlib import Path
from stella_shared.errors import NotFound
from tests.signer import test_remote_keys as t
state, pin = Path(sys.argv[1]), Path(sys.argv[2])
said = {}
for key_id in ("hsm:7?label=stella", "hsm:2?label=other"):
    try:
        t.KmsKey.load(t.hsm(pin, key_id), state)
    except NotFound as e:
        said[key_id] = str(e)
print(json.dumps(said))
"""


async def test_an_hsm_without_the_key_is_told(tmp_path: Path, token: Path) -> None:
    """A wrong key id or token label is an error that names the URI."""
    said = in_a_process(_REFUSALS, tmp_path, token)
    assert set(said) == {"hsm:7?label=stella", "hsm:2?label=other"}
    assert all(uri in text for uri, text in said.items())


async def test_a_key_file_by_uri_signs(tmp_path: Path) -> None:
    """`file2:` is the simplest of the URIs: the same way that the cloud's go."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    node = RemoteNode(tmp_path / "node", f"file2:{pem}")
    store = fill(node)
    kms = KmsKey.load(node.signals.signing, node.where.state)
    trust_key(node.where, kms.public_key)
    assert await sign_all(store, kms) == 3
    store.release()
    assert node.verify().valid


async def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    """Only P-256 is taken: what every log and verifier accepts."""
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(ConfigError, match="not an ECDSA P-256 key"):
        KmsKey.load(Signing(key_id=f"file2:{pem}"), tmp_path)


# -- keyless -------------------------------------------------------------------------------------------


class Keyless(Surroundings):
    """The surroundings with a certificate authority."""

    def __init__(self, around: Surroundings, fulcio: Fulcio) -> None:
        super().__init__(around.log, around.tsas, around.version)
        self.fulcio = fulcio

    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        root, signing = super().documents()
        parts = self.fulcio.trusted_root_parts()
        root |= {"certificateAuthorities": parts["certificateAuthorities"], "ctlogs": parts["ctlogs"]}
        signing["caUrls"] = [trust.service(self.fulcio.url)]
        return root, signing


@pytest.fixture
def fulcio() -> Iterator[Fulcio]:
    with Fulcio() as running:
        yield running


async def keyless_chain(tmp_path: Path, around: Keyless) -> RemoteNode:
    """Return a node whose three chunks are signed keyless."""
    file = tmp_path / "token"
    file.write_text(identity_token(WHO.subject, WHO.issuer))
    node = RemoteNode(tmp_path / "node", "fulcio")
    store = fill(node)
    async with Outside() as outside:
        key = FulcioKey(outside, around.services(), str(file))
        assert await sign_all(store, key) == 3
        assert key.identity == WHO
    trust_identity(node.where, WHO)
    store.release()
    return node


def verified(node: Node, around: Keyless, who: Identity = WHO) -> ChainReport:
    """Return the report to somebody who trusts `who` and the root."""
    return verify_chain(node.evidence, trust=Trust({}, frozenset([who]), around.services().root))


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
async def test_a_keyless_chain_is_valid_and_logged(tmp_path: Path, fulcio: Fulcio, version: int) -> None:
    """Signed keyless, logged, and accepted by our verifier, by sigstore-python and by `@sigstore/verify`."""
    with surroundings(version) as plain:
        around = Keyless(plain, fulcio)
        node = await keyless_chain(tmp_path, around)
        pending = verified(node, around)
        assert pending.valid and [c.status for c in pending.chunks] == ["VALID_PENDING"] * 3
        queue = Queue(tmp_path, around, node)
        assert (await queue.round())[0].logged == 3
        report = verified(node, around)
        assert report.valid and [c.status for c in report.chunks] == ["VALID_LOGGED"] * 3
        root, _ = around.documents()
        bundles = [json.loads(queue.bundle(i)) for i in queue.logged()]
        for bundle in bundles:
            assert judge_python(root, bundle, identity=WHO.subject, issuer=WHO.issuer).ok
        verdicts = await anyio.to_thread.run_sync(
            lambda: judge_js(root, [Check(bundle, identity=WHO.subject) for bundle in bundles])
        )
        assert all(verdict.ok for verdict in verdicts), verdicts


async def test_a_keyless_chunk_may_be_logged_after_its_certificate_ended(tmp_path: Path, fulcio: Fulcio) -> None:
    """Rekor v1's own time is then left out of the bundle: the timestamp within the certificate's life counts."""
    with surroundings(1) as plain:
        around = Keyless(plain, fulcio)
        node = await keyless_chain(tmp_path, around)
        plain.log.v1_time_skew = 7200
        queue = Queue(tmp_path, around, node)
        done, _ = await queue.round()
        assert done.error == "" and verified(node, around).valid
        entry = json.loads(queue.bundle(1))["verificationMaterial"]["tlogEntries"][0]
        assert "inclusionPromise" not in entry and "integratedTime" not in entry


async def test_somebody_elses_certificate_is_not_trusted(tmp_path: Path, fulcio: Fulcio) -> None:
    """A chain by another identity is refused by name, and one without a trusted root cannot be judged."""
    with surroundings(2) as plain:
        around = Keyless(plain, fulcio)
        node = await keyless_chain(tmp_path, around)
        other = verified(node, around, Identity("spiffe://somebody/else", WHO.issuer))
        assert {f.code for f in other.faults} == {"unknown_key"} and WHO.subject in other.faults[0].message
        assert {c.status for c in other.chunks} == {"UNTRUSTED_KEY"}
        blind = verify_chain(node.evidence, trust=Trust({}, frozenset([WHO]), None))
        assert {f.code for f in blind.faults} == {"unknown_key"} and "--trusted-root" in blind.faults[0].hint


async def test_a_certificate_without_a_trusted_time_proves_nothing(tmp_path: Path, fulcio: Fulcio) -> None:
    """Without its timestamp nobody can say that a certificate was used while it held."""
    with surroundings(2) as plain:
        around = Keyless(plain, fulcio)
        node = await keyless_chain(tmp_path, around)
        node.file(2, names.STAMPS).unlink()
        report = verified(node, around)
        assert ("untrusted_time", 2) in {(f.code, f.chunk) for f in report.faults}
        assert report.chunks[1].status == "TIME_UNTRUSTED"


async def test_a_certificate_put_beside_another_chunk_is_found(tmp_path: Path, fulcio: Fulcio) -> None:
    """Certificates cannot be exchanged: each is of the key that signed."""
    with surroundings(2) as plain:
        around = Keyless(plain, fulcio)
        node = await keyless_chain(tmp_path, around)
        node.file(2, names.CERTIFICATE).write_bytes(node.file(3, names.CERTIFICATE).read_bytes())
        assert ("bundle_mismatch", 2) in {(f.code, f.chunk) for f in verified(node, around).faults}


async def test_a_certificate_authority_that_is_away_or_wrong_costs_nothing(tmp_path: Path, fulcio: Fulcio) -> None:
    """While no certificate comes nothing is signed, and nothing is kept; then it goes on."""
    with surroundings(2) as plain:
        around = Keyless(plain, fulcio)
        file = tmp_path / "token"
        file.write_text(identity_token(WHO.subject, WHO.issuer))
        node = RemoteNode(tmp_path / "node", "fulcio")
        store = fill(node)
        async with Outside() as outside:
            key = FulcioKey(outside, around.services(), str(file))
            fulcio.down()
            with pytest.raises(Later, match="connection refused"):
                await sign_all(store, key)
            fulcio.up()
            around.tsas[0].wrong_nonce(1)
            with pytest.raises(Later, match="nonce"):
                await sign_all(store, key)
            assert not list(node.evidence.glob("*.dsse.json")) and not list(node.evidence.glob("*.cert.pem"))
            assert await sign_all(store, key) == 3
        store.release()


async def test_the_token_is_read_anew_and_its_absence_is_told(tmp_path: Path, fulcio: Fulcio) -> None:
    """A missing token file is a passing failure that names the file."""
    with surroundings(2) as plain:
        async with Outside() as outside:
            key = FulcioKey(outside, Keyless(plain, fulcio).services(), str(tmp_path / "none"))
            with pytest.raises(Later, match="identity_token_file"):
                await key.sign(b"{}")


_NO_LIBRARY = """
import json, sys
from pathlib import Path
from stella_shared.config import Signing
from stella_shared.errors import NotFound
from stella_signer.kms import KmsKey
folder = sys.argv[1]
try:
    KmsKey.load(Signing(key_id="hsm:2", pin_file="/none", pkcs11_module=folder + "/none.so"), Path(folder))
except NotFound as e:
    print(json.dumps({"said": str(e)}))
"""


async def test_a_pkcs11_library_that_is_not_there_is_told(tmp_path: Path) -> None:
    """`pkcs11_module` names the library; one that cannot be loaded is an error that names the key's URI."""
    assert "hsm:2" in in_a_process(_NO_LIBRARY, tmp_path)["said"]
