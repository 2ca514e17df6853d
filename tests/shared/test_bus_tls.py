"""TLS towards a real NATS server, with and without clients' certificates: who gets in, what the others are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from stella_shared import bus_tls, config
from stella_shared.bus import Bus
from stella_shared.config import BusTls
from stella_shared.errors import ConfigError, NotPermitted, StellaError, TryAgain
from tests.shared.certificates import Authority, Pair
from tests.shared.nats_kit import Server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class TlsServer(Server):
    """A server with a certificate, which demands one of its clients when it is told who vouches for them."""

    def __init__(self, folder: Path, pair: Pair, clients: Path | None = None) -> None:
        super().__init__(folder)
        self.url = self.url.replace("nats://", "tls://")
        more = f', ca_file: "{clients}", verify: true' if clients else ""
        with self._config.open("a") as file:
            file.write(f'tls {{ cert_file: "{pair.certificate}", key_file: "{pair.key}"{more} }}\n')

    def __enter__(self) -> TlsServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def shown(authority: Path, pair: Pair) -> BusTls:
    """Return the configuration of a client that shows `pair`."""
    return BusTls(ca_file=str(authority), cert_file=str(pair.certificate), key_file=str(pair.key))


async def refusal(url: str, tls: BusTls) -> StellaError:
    """Return the error with which `connect` ends."""
    with pytest.raises(StellaError) as caught, anyio.fail_after(8):
        async with Bus.connect(url, name="test", tls=tls, patience_seconds=0.0):
            pass
    return caught.value


async def test_whom_the_authority_vouches_for_is_let_in_on_both_sides(tmp_path: Path, authority: Authority) -> None:
    """The server shows its certificate, and where it demands one the client its own; the bus works as in the clear."""
    pair = authority.pair("server")
    for clients in (None, authority.ca):
        tls = shown(authority.ca, authority.pair("client")) if clients else BusTls(ca_file=str(authority.ca))
        with TlsServer(tmp_path, pair, clients) as server:
            async with Bus.connect(server.url, name="test", tls=tls) as bus:
                await bus.ensure_streams()
                await bus.publish("stella.raw.n", b"x", msg_id="a")
                assert bus._nc._transport._io_writer.get_extra_info("cipher")  # type: ignore[attr-defined, union-attr]


@pytest.mark.parametrize(
    ("server", "trusted", "kind", "said"),
    [
        ({}, "stranger", NotPermitted, r"is not vouched for by \S+stranger.pem"),
        ({"from_days": -2, "to_days": -1}, "authority", TryAgain, "has expired"),
        ({"from_days": 1, "to_days": 2}, "authority", TryAgain, "is not valid yet"),
        ({"host": "nats.example"}, "authority", NotPermitted, "is for another name: .*127.0.0.1"),
    ],
)
async def test_a_server_that_cannot_be_trusted_is_named_with_the_reason(
    tmp_path: Path, server: dict[str, Any], trusted: str, kind: type[StellaError], said: str
) -> None:
    """Another authority or name: not permitted, exit code 3; out of its time: try again, 10, as clocks are set late."""
    trust = {name: Authority(tmp_path, name) for name in ("authority", "stranger")}
    with TlsServer(tmp_path, trust["authority"].pair("server", **server)) as running:
        error = await refusal(running.url, BusTls(ca_file=str(trust[trusted].ca)))
    assert (kind, {NotPermitted: 3, TryAgain: 10}[kind]) == (type(error), error.exit_code)  # type: ignore[index]
    assert re.fullmatch(rf"the certificate of the NATS server at {running.url} {said}.*", str(error))
    assert error.hint


@pytest.mark.parametrize("who", ["nobody", "stranger", "expired"])
async def test_a_client_that_the_server_does_not_trust_is_told_which_certificate_that_is(
    tmp_path: Path, authority: Authority, who: str
) -> None:
    """None at all, another authority's, one out of its time: exit code 3, and the file or its absence is named."""
    tls = {
        "nobody": BusTls(ca_file=str(authority.ca)),
        "stranger": shown(authority.ca, Authority(tmp_path, "other").pair("stranger")),
        "expired": shown(authority.ca, authority.pair("expired", from_days=-2, to_days=-1)),
    }[who]
    with TlsServer(tmp_path, authority.pair("server"), authority.ca) as server:
        error = await refusal(server.url, tls)
    assert (NotPermitted, 3) == (type(error), error.exit_code)
    assert (tls.cert_file or "shows no certificate") in str(error)
    assert "signals.bus.tls.cert_file" in error.hint


async def test_one_of_several_servers_is_enough(tmp_path: Path, authority: Authority) -> None:
    """One that is not there and one that cannot be trusted do not keep a client from the third."""
    tls = BusTls(ca_file=str(authority.ca))
    folders = [tmp_path / name for name in ("gone", "stranger", "good")]
    for folder in folders:
        folder.mkdir()
    gone = TlsServer(folders[0], authority.pair("gone"))
    with (
        TlsServer(folders[1], Authority(folders[1], "other").pair("stranger")) as stranger,
        TlsServer(folders[2], authority.pair("server")) as good,
    ):
        async with Bus.connect(", ".join((gone.url, stranger.url, good.url)), name="test", tls=tls) as bus:
            await bus.ping()
            assert bus._nc.fault is None


async def test_what_was_to_be_encrypted_is_not_said_in_the_clear(tmp_path: Path) -> None:
    """A server that asks for no TLS, as whoever sits on the way can make it look, gets no CONNECT from a tls:// URL."""
    heard = b""

    async def server(stream: anyio.abc.SocketStream) -> None:
        nonlocal heard
        async with stream:
            await stream.send(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1000}\r\n')
            with anyio.move_on_after(1):
                while True:
                    heard += await stream.receive()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  # Django's is another
        error = await refusal(f"tls://127.0.0.1:{port}", BusTls())
        tasks.cancel_scope.cancel()
    assert (NotPermitted, b"") == (type(error), heard)
    assert f"the NATS server at tls://127.0.0.1:{port} offers no TLS" == str(error)


def faulty(folder: Path, authority: Authority, what: str) -> tuple[BusTls, str]:
    """Return a configuration with one fault, and the key that has it."""
    pair = authority.pair("client")
    tls = shown(authority.ca, pair)
    if what == "absent ca":
        return BusTls(ca_file=str(folder / "gone.pem")), "ca_file"
    if what == "empty ca":
        (folder / "empty.pem").touch()
        return BusTls(ca_file=str(folder / "empty.pem")), "ca_file"
    if what == "binary ca":
        (folder / "binary.der").write_bytes(b"\x30\x82\xff\x00")
        return BusTls(ca_file=str(folder / "binary.der")), "ca_file"
    if what == "absent key":
        pair.key.unlink()
        return tls, "key_file"
    if what == "another's key":
        return shown(authority.ca, Pair(pair.certificate, authority.pair("other").key)), "key_file"
    if what == "passphrase":
        command = ("openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(pair.key), "-out", f"{pair.key}.enc")
        subprocess.run(command, check=True, capture_output=True)
        return shown(authority.ca, Pair(pair.certificate, Path(f"{pair.key}.enc"))), "key_file"
    assert what == "no certificate"
    pair.certificate.write_text("nothing\n")
    return tls, "cert_file"


@pytest.mark.parametrize(
    "what", ["absent ca", "empty ca", "binary ca", "absent key", "another's key", "passphrase", "no certificate"]
)
async def test_a_file_that_cannot_be_used_is_named_with_its_key(
    tmp_path: Path, authority: Authority, what: str
) -> None:
    """Wrong configuration, exit code 2, at once; the same through `connect`, which does not wait for better files."""
    tls, key = faulty(tmp_path, authority, what)
    with pytest.raises(ConfigError, match=rf"signals\.bus\.tls\.{key} {getattr(tls, key)}: ") as caught:
        bus_tls.context(tls)
    assert 2 == caught.value.exit_code
    with TlsServer(tmp_path, authority.pair("server")) as server:
        assert str(caught.value) == str(await refusal(server.url, tls))


def test_a_key_that_the_user_may_not_read_is_not_permitted(tmp_path: Path, authority: Authority) -> None:
    """Exit code 3; the message names the file and the user, who is not root here, as most parts are not."""
    pair = authority.pair("client")
    pair.key.chmod(0)
    script = (
        "import os, sys, msgspec\n"
        "from stella_shared import bus_tls\n"
        "from stella_shared.config import BusTls\n"
        "from stella_shared.errors import StellaError\n"
        "tls = msgspec.json.decode(sys.argv[1], type=BusTls)\n"
        "os.setresuid(10001, 10001, 10001)\n"
        "try:\n"
        "    bus_tls.context(tls)\n"
        "except StellaError as e:\n"
        "    print(e, e.hint, sep='|')\n"
        "    sys.exit(e.exit_code)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    words = json.dumps({"ca_file": "", "cert_file": str(pair.certificate), "key_file": str(pair.key)})
    done = subprocess.run(
        [sys.executable, "-c", script, words], capture_output=True, text=True, check=False, timeout=30
    )
    said = f"signals.bus.tls.key_file {pair.key}: permission denied|let user 10001, and nobody else, read it"
    assert (3, said) == (done.returncode, done.stdout.strip()), done.stderr


async def until(holds: Any) -> None:
    """Wait until `holds()` is true."""
    with anyio.fail_after(15):
        while not holds():
            await anyio.sleep(0.02)


async def test_renewed_certificates_are_taken_up_without_a_restart(tmp_path: Path, authority: Authority) -> None:
    """New authority, new pairs on both sides, in the same files: the connection that breaks comes back by them.

    Until the client has its new files it says why it is away.
    """
    old_ca = authority.ca.read_bytes()
    tls = shown(authority.ca, authority.pair("client"))
    with TlsServer(tmp_path, authority.pair("server"), authority.ca) as server:
        async with Bus.connect(server.url, name="test", tls=tls) as bus:
            await bus.ensure_streams()
            server.kill()
            await until(lambda: not bus.connected)
            renewed = Authority(tmp_path)
            renewed.pair("server")
            new_ca = authority.ca.read_bytes()
            assert new_ca != old_ca
            server.start()
            await until(lambda: bus.connected or bus._nc.fault is not None)
            with pytest.raises(TryAgain, match=rf"not connected: .* refuses the certificate {tls.cert_file}"):
                await bus.ping()
            renewed.pair("client")
            await until(lambda: bus.connected)
            await bus.ping()
            await bus.publish("stella.raw.n", b"x", msg_id="a")


@pytest.mark.parametrize(
    ("bus", "said"),
    [
        ({"url": "nats://a:1", "tls": {"ca_file": "/ca"}}, "signals.bus.url is not tls://"),
        ({"tls": {"ca_file": "/ca"}}, "signals.bus.url is not tls://"),
        ({"url": "tls://a:1", "tls": {"key_file": "/key"}}, "cert_file and key_file go together"),
        ({"url": "tls://a:1,nats://b:1"}, "mixes nats:// and tls://"),
        ({"url": "tls://a:1", "tls": {"ca_file": "ca.pem"}}, "signals.bus.tls.ca_file is 'ca.pem'"),
        ({"url": "tls://a:1", "tls": {"cafile": "/ca"}}, "did you mean"),
    ],
)
def test_a_configuration_that_would_not_encrypt_is_refused(tmp_path: Path, bus: dict[str, Any], said: str) -> None:
    """TLS without tls://, half a pair, a mixture; the message names the keys."""
    file = tmp_path / "stellaops.yaml"
    file.write_text(json.dumps({"signals": {"bus": bus}}))
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert said in str(caught.value)
