"""The kit: what it makes is accepted by implementations that nobody here wrote, and its switches do what they say."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from rfc3161_client import TimestampRequestBuilder, VerifierBuilder, decode_timestamp_response
from rfc3161_client.errors import VerificationError
from sigstore.errors import TUFError
from sigstore.models import ClientTrustConfig

from tests.sigstore import bundles, peers, trust
from tests.sigstore.bundles import Signer
from tests.sigstore.door import Reply
from tests.sigstore.fulcio import Fulcio, identity_token
from tests.sigstore.log_standin import LogStandin
from tests.sigstore.proofs import ProofError, check_consistency, read_checkpoint
from tests.sigstore.tsa import Tsa
from tests.sigstore.tuf import TufRepository

SUBJECT, ISSUER = "spiffe://test/node", "https://issuer.test"
SUBMIT = {1: "/api/v1/log/entries", 2: "/api/v2/log/entries"}


@pytest.fixture
def log() -> Iterator[LogStandin]:
    with LogStandin() as standin:
        yield standin


@pytest.fixture(scope="module")
def tsa() -> Iterator[Tsa]:
    with Tsa() as authority:
        yield authority


@pytest.fixture(scope="module")
def fulcio() -> Iterator[Fulcio]:
    with Fulcio() as authority:
        yield authority


def trusted(log: LogStandin, tsa: Tsa, fulcio: Fulcio | None = None) -> dict[str, Any]:
    """Return a trusted_root.json of these."""
    parts = {"certificateAuthorities": [], "ctlogs": []} if fulcio is None else fulcio.trusted_root_parts()
    return trust.trusted_root(
        tlogs=log.trusted_root_tlogs(),
        tsas=[tsa.trusted_root_tsa()],
        authorities=parts["certificateAuthorities"],
        ctlogs=parts["ctlogs"],
    )


def submission(api: int) -> dict[str, Any]:
    """Return something new to submit."""
    signer = bundles.managed()
    sealed = bundles.envelope(signer, bundles.statement(content=os.urandom(16)))
    return bundles.proposal_v1(signer, sealed) if api == 1 else bundles.request_v2(signer, sealed)


def submit(log: LogStandin, api: int, document: Any = None, seconds: float = 20) -> httpx.Response:
    """Submit it."""
    return httpx.post(log.url + SUBMIT[api], json=document or submission(api), timeout=seconds)


def judge_python(root: dict[str, Any], bundle: dict[str, Any]) -> peers.Verdict:
    """Let sigstore-python look for the identity that the tests use."""
    return peers.judge_python(root, bundle, identity=SUBJECT, issuer=ISSUER)


# Accepted by others


def test_independent_verifiers_accept_what_comes_out_and_nothing_that_was_changed(
    log: LogStandin, tsa: Tsa, fulcio: Fulcio
) -> None:
    """Key and certificate, v1 and v2, in a tree of one and of many: accepted; with one thing changed: refused."""
    root, key = trusted(log, tsa, fulcio), bundles.managed()
    signers = [key, bundles.keyless(fulcio.url, identity_token(SUBJECT, ISSUER))]
    good: list[peers.Check] = []
    for size in (0, 300):
        log.grow(size, 1)
        log.grow(size, 2)
        for api in (1, 2):
            for signer in signers:
                made = bundles.signed(log.url, api, tsa.url, signer, bundles.statement(content=os.urandom(16)))
                good.append(_check(made, signer))
    changed = [(where, _check(_changed(check.bundle, where), None, check)) for check in good[-4:] for where in CHANGES]
    verdicts = peers.judge_js(root, [*good, *(check for _, check in changed)])
    assert [peers.Verdict(True, "")] * len(good) == verdicts[: len(good)]
    for (where, _), verdict in zip(changed, verdicts[len(good) :], strict=True):
        assert not verdict.ok, where
    for check in good:
        if check.keys is None:
            assert peers.Verdict(True, "") == judge_python(root, check.bundle)
    for where, check in changed:
        if check.keys is None:
            # A stamp that does not hold is none for it, and v1's promise is a time too.
            (entry,) = check.bundle["verificationMaterial"]["tlogEntries"]
            passed_over = where == "timestamp" and "inclusionPromise" in entry
            assert passed_over == judge_python(root, check.bundle).ok, where


CHANGES = ("payload", "signature", "entry", "proof", "checkpoint", "timestamp")


def _check(bundle: Any, signer: Signer | None, like: peers.Check | None = None) -> peers.Check:
    if signer is None:
        assert like is not None
        return peers.Check(bundle, like.keys, identity=like.identity)
    if signer.certificate is None:
        return peers.Check(bundle, peers.key_hints(signer.pem))
    return peers.Check(bundle, identity=SUBJECT)


def _changed(bundle: Any, where: str) -> Any:
    """Return the bundle with one bit of that part flipped."""
    other = copy.deepcopy(bundle)
    material = other["verificationMaterial"]
    (entry,), sealed = material["tlogEntries"], other["dsseEnvelope"]
    proof = entry["inclusionProof"]
    holder, name = {
        "payload": (sealed, "payload"),
        "signature": (sealed["signatures"][0], "sig"),
        "entry": (entry, "canonicalizedBody"),
        "proof": (proof["hashes"], 0),
        "checkpoint": (proof["checkpoint"], "envelope"),
        "timestamp": (material["timestampVerificationData"]["rfc3161Timestamps"][0], "signedTimestamp"),
    }[where]
    if where == "checkpoint":
        text, separator, signatures = holder[name].rpartition("— ")
        host, _, signature = signatures.partition(" ")
        holder[name] = text + separator + host + " " + _flipped(signature.strip()) + "\n"
    else:
        holder[name] = _flipped(holder[name])
    return other


def _flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[-5] ^= 1
    return base64.b64encode(raw).decode()


def test_a_verdict_asks_for_the_right_key_and_the_right_name(log: LogStandin, tsa: Tsa, fulcio: Fulcio) -> None:
    """Another key for the hint, a hint that is unknown, and another name are refused, each with a reason."""
    root, key, other = trusted(log, tsa, fulcio), bundles.managed(), bundles.managed()
    made = bundles.signed(log.url, 2, tsa.url, key, bundles.statement())
    keyless = bundles.keyless(fulcio.url, identity_token(SUBJECT, ISSUER))
    named = bundles.signed(log.url, 2, tsa.url, keyless, bundles.statement())
    unlogged = bundles.bundle(key, made["dsseEnvelope"])
    verdicts = peers.judge_js(
        root,
        [
            peers.Check(made, {key.hint: other.pem.decode()}),
            peers.Check(made, peers.key_hints(other.pem)),
            peers.Check(named, identity="spiffe://test/another"),
            peers.Check(unlogged, peers.key_hints(key.pem)),
            peers.Check(unlogged, peers.key_hints(key.pem), tlogs=0, timestamps=0),
        ],
    )
    assert [False] * 4 + [True] == [verdict.ok for verdict in verdicts]
    assert all(verdict.reason for verdict in verdicts[:4])
    assert "another" in peers.judge_python(root, named, identity="spiffe://test/another", issuer=ISSUER).reason


# The log's switches


@pytest.mark.parametrize("api", [1, 2])
def test_a_failure_is_answered_so_many_times_and_nothing_is_logged(log: LogStandin, api: int) -> None:
    """`fail_next`: status and headers as told, then all is well; reads are not hit unless they are named."""
    document = submission(api)
    log.fail_next(2, 503, {"Retry-After": "7"})
    assert 200 == httpx.get(log.url + "/api/v1/log").status_code
    refused = [submit(log, api, document) for _ in range(2)]
    assert [(503, "7")] * 2 == [(one.status_code, one.headers["Retry-After"]) for one in refused]
    assert 201 == submit(log, api, document).status_code
    assert 3 == log.requests[f"v{api}.submit"]
    assert "stella-log-standin" == refused[0].headers["Server"]
    log.fail_next(1, 500, on="v1.log")
    log.fail_next(1, 429, on="checkpoint")
    assert 500 == httpx.get(log.url + "/api/v1/log").status_code
    assert 429 == httpx.get(log.read_url + "/checkpoint").status_code
    log.fail_next(5, 500)
    log.calm()
    assert 201 == submit(log, api).status_code


@pytest.mark.parametrize("api", [1, 2])
def test_a_dropped_reply_is_of_an_entry_that_is_in_the_log(log: LogStandin, api: int) -> None:
    """`drop_replies`: the connection is cut; the same again is a duplicate."""
    document = submission(api)
    log.drop_replies(1)
    with pytest.raises(httpx.RemoteProtocolError):
        submit(log, api, document)
    assert 409 == submit(log, api, document).status_code


@pytest.mark.parametrize("api", [1, 2])
def test_a_hanging_log_answers_late_and_ends_at_once(api: int) -> None:
    """`hang`: a patient client gets its answer, another its time-out; the end of the block waits for neither."""
    with LogStandin() as log:
        log.hang(1, 0.2)
        begin = time.monotonic()
        assert 201 == submit(log, api).status_code
        assert time.monotonic() - begin >= 0.2
        log.hang(1, 600)
        with pytest.raises(httpx.ReadTimeout):
            submit(log, api, seconds=0.2)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_a_log_that_is_down_refuses_and_comes_back_on_its_port(log: LogStandin) -> None:
    """`down` cuts open connections and refuses new ones, `up` serves what was there; both may be said twice."""
    with httpx.Client() as client:
        assert 201 == client.post(log.url + SUBMIT[1], json=submission(1)).status_code
        for _ in range(2):
            log.down()
            log.down()
            with pytest.raises(httpx.HTTPError):
                client.get(log.url + "/api/v1/log")
            with pytest.raises(httpx.ConnectError):
                httpx.get(log.url + "/api/v1/log")
            log.up()
            log.up()
            assert 1 == client.get(log.url + "/api/v1/log").json()["treeSize"]


def test_what_was_left_hanging_when_the_log_went_down_is_not_logged(log: LogStandin) -> None:
    """As with a server that is killed in the middle of a request."""
    log.hang(1, 600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(submit, log, 1)
        while log.requests["v1.submit"] == 0:
            time.sleep(0.01)
        log.down()
        with pytest.raises(httpx.RemoteProtocolError):
            waiting.result()
    assert 0 == log.v1.tree.size


def test_a_frozen_shard_takes_nothing_and_is_still_read(log: LogStandin) -> None:
    """`freeze`: 405 for v2 submissions in Rekor's words, and a checkpoint as before."""
    log.grow(2)
    log.freeze()
    reply = submit(log, 2)
    assert (405, True) == (reply.status_code, "frozen" in reply.text)
    assert 2 == read_checkpoint(httpx.get(log.read_url + "/checkpoint").content.decode()).size


def test_a_writing_address_refuses_reads_when_they_are_apart() -> None:
    """`separate_reads`: the checkpoint is at `read_url` only, which has a `down` of its own."""
    with LogStandin(separate_reads=True) as log:
        assert 501 == httpx.get(log.url + "/api/v2/checkpoint").status_code
        assert 200 == httpx.get(log.read_url + "/checkpoint").status_code
        assert 404 == httpx.post(log.read_url + "/log/entries", json=submission(2)).status_code
        assert log.reads is not None
        log.reads.down()
        with pytest.raises(httpx.ConnectError):
            httpx.get(log.read_url + "/checkpoint")
        assert 201 == submit(log, 2).status_code
        assert (2, 1) == (
            log.requests["v2.checkpoint"] + log.reads.requests["v2.checkpoint"],
            log.requests["v2.submit"],
        )


def test_a_skewed_clock_is_in_the_signed_time(log: LogStandin, tsa: Tsa, fulcio: Fulcio) -> None:
    """`v1_time_skew`: two hours late, a certificate's bundle is refused; without the promise it holds again."""
    log.v1_time_skew = 7200
    keyless = bundles.keyless(fulcio.url, identity_token(SUBJECT, ISSUER))
    made = bundles.signed(log.url, 1, tsa.url, keyless, bundles.statement())
    (entry,) = made["verificationMaterial"]["tlogEntries"]
    assert abs(int(entry["integratedTime"]) - time.time() - 7200) < 60
    root = trusted(log, tsa, fulcio)
    assert not judge_python(root, made).ok
    del entry["inclusionPromise"]
    assert judge_python(root, made).ok


def test_unknown_witnesses_do_not_hurt(log: LogStandin, tsa: Tsa) -> None:
    """Lines of witnesses stand on the checkpoint in an entry, and a verifier passes over them."""
    log.witness_lines = [f"— witness{i}.test {base64.b64encode(os.urandom(76)).decode()}" for i in range(2)]
    key = bundles.managed()
    made = bundles.signed(log.url, 2, tsa.url, key, bundles.statement())
    note = made["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]["checkpoint"]["envelope"]
    assert 3 == len(read_checkpoint(note).signatures)
    assert [True] == [v.ok for v in peers.judge_js(trusted(log, tsa), [peers.Check(made, peers.key_hints(key.pem))])]


@pytest.mark.parametrize("forged", [None, 0, 5])
def test_a_split_view_is_signed_and_inconsistent(log: LogStandin, forged: int | None) -> None:
    """`split_view`: another tree of the same key, of the same size, shorter or longer; no proof leads to it."""

    def seen() -> list[tuple[int, bytes]]:
        v2 = read_checkpoint(httpx.get(log.read_url + "/checkpoint").content.decode())
        log.v2_key.public_key().verify(v2.signatures[0][2], v2.text)
        v1 = httpx.get(log.url + "/api/v1/log").json()
        return [(v2.size, v2.root), (v1["treeSize"], bytes.fromhex(v1["rootHash"]))]

    log.grow(8, 1)
    log.grow(8, 2)
    before = seen()
    assert [8, 8] == [size for size, _ in before]
    log.split_view(forged=forged)
    after = seen()
    assert [4 + (4 if forged is None else forged)] * 2 == [size for size, _ in after]
    size, root = after[1]
    if size > 8:
        proof = httpx.get(log.url + "/api/v1/log/proof", params={"firstSize": 8, "lastSize": size}).json()
        with pytest.raises(ProofError):
            check_consistency(8, before[1][1], size, root, [bytes.fromhex(one) for one in proof["hashes"]])
    elif size == 8:
        assert before[0][1] != after[0][1] and before[1][1] != root
    assert 201 == submit(log, 2).status_code


def test_replies_can_be_changed_on_their_way(log: LogStandin) -> None:
    """`tamper` sees the endpoint and the reply; None ends it."""

    def double(endpoint: str, reply: Reply) -> Reply:
        if endpoint != "v1.log":
            return reply
        return reply.with_json({**reply.json(), "treeSize": 99})

    log.tamper(double)
    assert 99 == httpx.get(log.url + "/api/v1/log").json()["treeSize"]
    assert 201 == submit(log, 1).status_code
    log.tamper(None)
    assert 1 == httpx.get(log.url + "/api/v1/log").json()["treeSize"]


def test_an_error_of_the_kit_itself_is_not_passed_over() -> None:
    """What breaks inside an answer is a 500 for the client, and fails the test at the end of the block."""

    def broken(endpoint: str, reply: Reply) -> Reply:
        raise LookupError(endpoint)

    with pytest.raises(LookupError, match=r"v1\.log"), LogStandin() as log:
        log.tamper(broken)
        assert 500 == httpx.get(log.url + "/api/v1/log").status_code


# The timestamp authority


def ask(tsa: Tsa, data: bytes, seconds: float = 20) -> tuple[Any, httpx.Response]:
    """Ask for a stamp over `data`."""
    query = TimestampRequestBuilder().data(data).nonce(nonce=True).build()
    headers = {"Content-Type": "application/timestamp-query"}
    return query, httpx.post(tsa.url, content=query.as_bytes(), headers=headers, timeout=seconds)


def test_stamps_verify_by_two_implementations(tsa: Tsa, tmp_path: Path) -> None:
    """rfc3161-client and `openssl ts -verify` accept the reply for its data and its time, and for no other data."""
    query, reply = ask(tsa, b"what is stamped")
    assert (201, "application/timestamp-reply") == (reply.status_code, reply.headers["Content-Type"])
    stamp = decode_timestamp_response(reply.content)
    assert query.nonce == stamp.tst_info.nonce
    assert abs(stamp.tst_info.gen_time - datetime.now(UTC)) < timedelta(minutes=1)
    verifier = VerifierBuilder().tsa_certificate(tsa.leaf).add_root_certificate(tsa.root).build()
    assert verifier.verify_message(stamp, b"what is stamped")
    with pytest.raises(VerificationError):
        verifier.verify_message(stamp, b"something else")
    (tmp_path / "root.pem").write_bytes(tsa.root.public_bytes(Encoding.PEM))
    (tmp_path / "reply").write_bytes(reply.content)
    for data, accepted in ((b"what is stamped", True), (b"something else", False)):
        (tmp_path / "data").write_bytes(data)
        done = subprocess.run(
            ["openssl", "ts", "-verify", "-data", "data", "-in", "reply", "-CAfile", "root.pem"],
            cwd=tmp_path, capture_output=True, check=False,
        )  # fmt: skip
        assert accepted == (done.returncode == 0), done.stderr


def test_stamps_can_be_wrong_in_the_ways_that_a_client_must_see() -> None:
    """Another nonce or digest, a refusal, an error, a cut, a wait, an authority out of date: each on demand, once."""
    with Tsa(end=datetime.now(UTC) - timedelta(minutes=5)) as tsa:
        verifier = VerifierBuilder().tsa_certificate(tsa.leaf).add_root_certificate(tsa.root).build()
        tsa.wrong_nonce()
        query, reply = ask(tsa, b"x")
        assert query.nonce != decode_timestamp_response(reply.content).tst_info.nonce
        tsa.wrong_digest()
        query, reply = ask(tsa, b"x")
        stamp = decode_timestamp_response(reply.content)
        assert query.nonce == stamp.tst_info.nonce
        with pytest.raises(VerificationError):
            verifier.verify_message(stamp, b"x")
        tsa.reject()
        _, reply = ask(tsa, b"x")
        assert (201, 2) == (reply.status_code, decode_timestamp_response(reply.content).status)
        tsa.fail_next(1, 503, {"Retry-After": "3"})
        assert 503 == ask(tsa, b"x")[1].status_code
        tsa.drop_replies(1)
        with pytest.raises(httpx.RemoteProtocolError):
            ask(tsa, b"x")
        tsa.hang(1, 600)
        with pytest.raises(httpx.ReadTimeout):
            ask(tsa, b"x", seconds=0.2)
        tsa.status = 200
        query, reply = ask(tsa, b"x")
        assert 200 == reply.status_code
        stamp = decode_timestamp_response(reply.content)
        assert stamp.tst_info.gen_time > tsa.leaf.not_valid_after_utc
        with pytest.raises(VerificationError):
            verifier.verify_message(stamp, b"x")
        assert 415 == httpx.post(tsa.url, content=b"?").status_code


# Fulcio


def test_certificates_carry_who_the_token_says(fulcio: Fulcio) -> None:
    """Ten minutes, the subject as URI, the issuer in its extension; for a key whose holder asked."""
    signer = bundles.keyless(fulcio.url, identity_token("spiffe://a/b", "https://c.test"))
    certificate = signer.certificate
    assert certificate is not None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ["spiffe://a/b"] == names.get_values_for_type(x509.UniformResourceIdentifier)
    issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")).value
    assert isinstance(issuer, x509.UnrecognizedExtension)
    assert issuer.value.endswith(b"https://c.test")
    assert timedelta(minutes=10) == certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert signer.key.public_key() == certificate.public_key()


def test_fulcio_refuses_bad_tokens_and_bad_requests(fulcio: Fulcio) -> None:
    """A token that is over, for others, or no token is 401; a request that is not signed by its key is 400."""
    for token in (identity_token(seconds=-60), identity_token(aud="others"), "none"):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            bundles.keyless(fulcio.url, token)
    document = {"certificateSigningRequest": base64.b64encode(b"nothing").decode()}
    headers = {"Authorization": f"Bearer {identity_token()}"}
    assert 400 == httpx.post(fulcio.url + "/api/v2/signingCert", json=document, headers=headers).status_code
    fulcio.fail_next(1, 503)
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        bundles.keyless(fulcio.url, identity_token())


def test_a_certificate_that_is_over_when_it_is_used_makes_no_evidence(
    log: LogStandin, tsa: Tsa, fulcio: Fulcio
) -> None:
    """`seconds_left`: a signature stamped after the certificate's end is refused by both verifiers."""
    fulcio.seconds_left = -2
    try:
        signer = bundles.keyless(fulcio.url, identity_token(SUBJECT, ISSUER))
    finally:
        fulcio.seconds_left = 600
    assert signer.certificate is not None
    assert signer.certificate.not_valid_after_utc < datetime.now(UTC)
    made = bundles.signed(log.url, 2, tsa.url, signer, bundles.statement())
    root = trusted(log, tsa, fulcio)
    assert [False] == [verdict.ok for verdict in peers.judge_js(root, [peers.Check(made)])]
    assert not judge_python(root, made).ok


# Trust


def test_a_private_repository_hands_out_trust_and_what_replaces_it(
    log: LogStandin, tsa: Tsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sigstore-python's client loads it with the root that it was given, sees a new version, and keeps it offline."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = trust.trusted_root(tlogs=log.trusted_root_tlogs(1), tsas=[tsa.trusted_root_tsa()])
    fulcio = [trust.service("http://127.0.0.1:1")]
    config = trust.signing_config(rekor=[trust.service(log.url, 1)], tsas=[trust.service(tsa.url)], fulcio=fulcio)

    def loaded(**how: Any) -> ClientTrustConfig:
        return ClientTrustConfig.from_tuf(repository.url, **how)

    def versions(config: ClientTrustConfig) -> list[int]:
        return [2 if "V2" in type(one).__name__ else 1 for one in config.signing_config.get_tlogs()]

    with TufRepository(root, config) as repository:
        assert [1] == versions(loaded(bootstrap_root=repository.root_path))
        root["tlogs"] = log.trusted_root_tlogs(2)
        repository.publish(root, trust.signing_config(rekor=[trust.service(log.url, 2)], fulcio=fulcio))
        assert [2] == versions(loaded(bootstrap_root=repository.root_path))
        repository.down()
        with pytest.raises(TUFError):
            loaded(bootstrap_root=repository.root_path)
        offline = loaded(offline=True)
        assert [log.url] == [one.base_url for one in offline.trusted_root._inner.tlogs]


def test_metadata_that_is_over_or_forged_is_refused(
    log: LogStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository whose timestamp ran out, and one whose root is another's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, config = trust.trusted_root(tlogs=log.trusted_root_tlogs()), trust.signing_config()
    with TufRepository(root, config) as repository, TufRepository(root, config) as other:
        with pytest.raises(TUFError):
            ClientTrustConfig.from_tuf(other.url, bootstrap_root=repository.root_path)
        repository.expires = timedelta(seconds=-1)
        repository.publish(root, config)
        with pytest.raises(TUFError):
            ClientTrustConfig.from_tuf(repository.url, bootstrap_root=repository.root_path)


def test_trust_of_several_operators_is_what_sigstore_reads() -> None:
    """Services of two operators, versions and times; sigstore-python takes the highest valid version of each."""
    with LogStandin() as ours, LogStandin() as theirs:
        services = [
            trust.service(ours.url, 1, "ours"),
            trust.service(ours.url, 2, "ours"),
            trust.service(theirs.url, 1, "theirs"),
            trust.service(theirs.url, 2, "theirs", end="2021-01-01T00:00:00Z"),
        ]
        root = trust.trusted_root(tlogs=[*ours.trusted_root_tlogs(), *theirs.trusted_root_tlogs()])
        config = trust.signing_config(rekor=services, fulcio=[trust.service("http://127.0.0.1:1")], selector="ALL")
        read = ClientTrustConfig.from_json(json.dumps(trust.client_trust_config(root, config)))
    assert 4 == len(read.trusted_root._inner.tlogs)
    taken = {(log.url.split("/api")[0], "V2" in type(log).__name__) for log in read.signing_config.get_tlogs()}
    assert {(ours.url, True), (theirs.url, False)} == taken
