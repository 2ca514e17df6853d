"""`stella signals bus-config`: a NATS server of the user's own, and services that have only each other."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from node_kit import free_port

from stella_cli import commands, nats_server
from stella_shared import config, subjects
from stella_shared.bus import Bus
from stella_shared.errors import NotPermitted

FOLDER_USERS = (*nats_server.USERS, "reader")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def account(folder: Path, service: str) -> config.BusUser:
    """Return the account as a service reads it from its own file."""
    signals = config.load(None, {}, {"bus.credentials_file": str(folder / f"{service}.json")})
    found = config.bus_user(signals, service)
    assert found is not None
    return found


@contextmanager
def serving(folder: Path, port: int) -> Iterator[None]:
    """Run a nats-server on what the command wrote, until the block ends."""
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [nats_server.find_binary(), "--config", str(folder / "nats.conf")], stdout=log, stderr=log
        ) as process,
    ):
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                subprocess.run(["sleep", "0.05"], check=True)
            yield
        finally:
            process.terminate()


def test_each_service_is_given_its_own_key_and_no_other(tmp_path: Path) -> None:
    """One file for each user, for its owner only; nats.conf has the public keys and no nameless user."""
    assert 0 == commands.run(["signals", "bus-config", "--directory", str(tmp_path / "bus")])
    found = {user: account(tmp_path / "bus", user).seed for user in FOLDER_USERS}
    assert len(FOLDER_USERS) == len(set(found.values()))
    for user in FOLDER_USERS:
        file = tmp_path / "bus" / f"{user}.json"
        assert 0o600 == file.stat().st_mode & 0o777
        assert [user] == list(json.loads(file.read_bytes())["users"])
    said = (tmp_path / "bus" / "nats.conf").read_text()
    server = json.loads(said)
    assert not [seed for seed in found.values() if seed in said]
    assert {"nkey", "permissions"} == {key for user in server["authorization"]["users"] for key in user}
    assert "no_auth_user" not in server


@pytest.mark.parametrize(
    ("words", "told"), [([], "10s"), (["--sync-seconds", "3"], "3s"), (["--sync-seconds", "0"], "")]
)
def test_the_server_syncs_as_it_is_asked_to(tmp_path: Path, words: list[str], told: str) -> None:
    """Each ten seconds, or as `--sync-seconds` says, 0 being each message; the server itself says so."""
    port, monitor = free_port(), free_port()
    command = ["signals", "bus-config", "--directory", str(tmp_path), "--listen", f"127.0.0.1:{port}"]
    assert 0 == commands.run([*command, "--monitor", f"127.0.0.1:{monitor}", *words])
    with serving(tmp_path, port), urllib.request.urlopen(f"http://127.0.0.1:{monitor}/varz", timeout=5) as answer:
        settings = json.load(answer)["jetstream"]["config"]
    assert (not told) == settings.get("sync_always", False)
    assert not told or told == f"{settings['sync_interval'] // 1_000_000_000}s"


def test_accounts_stay_when_it_is_run_again(tmp_path: Path) -> None:
    """Services that run already go on; one whose file was removed gets a new key."""
    command = ["signals", "bus-config", "--directory", str(tmp_path)]
    assert 0 == commands.run(command)
    before = {user: account(tmp_path, user) for user in FOLDER_USERS}
    (tmp_path / "gateway.json").unlink()
    assert 0 == commands.run(command)
    after = {user: account(tmp_path, user) for user in FOLDER_USERS}
    assert {"gateway"} == {user for user in FOLDER_USERS if before[user] != after[user]}


@pytest.mark.anyio
async def test_replaced_keys_let_nobody_in_any_more(tmp_path: Path) -> None:
    """All accounts have new keys, passwords too; the server knows those and refuses the old ones."""
    port = free_port()
    command = ["signals", "bus-config", "--directory", str(tmp_path), "--listen", f"127.0.0.1:{port}"]
    tmp_path.joinpath("signer.json").write_text('{"users":{"signer":{"user":"signer","password":"old"}}}')
    assert 0 == commands.run(command)
    before = {user: account(tmp_path, user) for user in FOLDER_USERS}
    assert 0 == commands.run([*command, "--replace-keys"])
    after = {user: account(tmp_path, user) for user in FOLDER_USERS}
    assert all(after[user].seed and before[user] != after[user] for user in FOLDER_USERS)
    url = f"nats://127.0.0.1:{port}"
    with serving(tmp_path, port):
        for user in FOLDER_USERS:
            async with Bus.connect(url, name="test", account=after[user]) as bus:
                await bus.ping()
            with pytest.raises(NotPermitted):
                async with Bus.connect(url, name="test", account=before[user], patience_seconds=0.0):
                    pass


@pytest.mark.anyio
async def test_passwords_of_an_older_release_go_on_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside services with keys one with its password gets in; the command says how it gets a key."""
    port = free_port()
    tmp_path.joinpath("signer.json").write_text('{"users":{"signer":{"user":"signer","password":"old"}}}')
    assert 0 == commands.run(["signals", "bus-config", "--directory", str(tmp_path), "--listen", f"127.0.0.1:{port}"])
    marked = [row for row in capsys.readouterr().out.splitlines() if "(a password of" in row]
    assert [str(tmp_path / "signer.json")] == [row.split()[1] for row in marked]
    assert config.BusUser("signer", "old") == account(tmp_path, "signer")
    with serving(tmp_path, port):
        for user in FOLDER_USERS:
            async with Bus.connect(f"nats://127.0.0.1:{port}", name="test", account=account(tmp_path, user)) as bus:
                await bus.ping()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--listen", "4222"], "--listen 4222 is not ADDRESS:PORT"),
        (["--monitor", "localhost:0"], "--monitor localhost:0 is not ADDRESS:PORT"),
        (["--tls-key", "key.pem"], "--tls-certificate and --tls-key go together"),
        (["--tls-ca", "ca.pem"], "--tls-ca needs --tls-certificate and --tls-key"),
    ],
)
def test_what_no_server_could_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    """The message names the option, and nothing is written."""
    assert 2 == commands.run(["signals", "bus-config", "--directory", str(tmp_path / "bus"), *options])
    assert named in capsys.readouterr().err
    assert not (tmp_path / "bus").exists()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("service", "stream", "durable"),
    [
        ("enricher", subjects.RAW_STREAM, subjects.RAW_DURABLE),
        ("signer", subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE),
    ],
)
async def test_a_worker_that_runs_apart_makes_the_streams_itself(
    tmp_path: Path, service: str, stream: str, durable: str
) -> None:
    """On a fresh server nobody has made them; both streams are there once the first worker waits for work."""
    port = free_port()
    assert 0 == commands.run(["signals", "bus-config", "--directory", str(tmp_path), "--listen", f"127.0.0.1:{port}"])
    with serving(tmp_path, port):
        async with (
            Bus.connect(f"nats://127.0.0.1:{port}", name="test", account=account(tmp_path, service)) as bus,
            bus.work(stream, durable, filter_subject=f"{stream.replace('_', '.').lower()}.>", max_ack_pending=8),
            Bus.connect(f"nats://127.0.0.1:{port}", name="test", account=account(tmp_path, "operator")) as operator,
        ):
            for name in (subjects.RAW_STREAM, subjects.ENRICHED_STREAM):
                assert 0 == (await operator.lag(name, "nobody")).bytes


@pytest.mark.anyio
async def test_beyond_loopback_nobody_reads_without_a_key(tmp_path: Path) -> None:
    """The embedded server lets a nameless reader in; this one does not."""
    port = free_port()
    assert 0 == commands.run(["signals", "bus-config", "--directory", str(tmp_path), "--listen", f"127.0.0.1:{port}"])
    with serving(tmp_path, port):
        async with Bus.connect(f"nats://127.0.0.1:{port}", name="test", account=account(tmp_path, "reader")) as reader:
            await reader.ping()
        with pytest.raises(NotPermitted):
            async with Bus.connect(f"nats://127.0.0.1:{port}", name="test", patience_seconds=0.0):
                pass


@pytest.mark.anyio
async def test_a_bus_that_leaves_the_machine_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a certificate a client that trusts it gets in by tls://, and one that does not is not let in."""
    port = free_port()
    certificate, key, other = tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "nobody.pem"
    other.touch()
    await anyio.run_process(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
    )
    words = ["--tls-certificate", str(certificate), "--tls-key", str(key), "--listen", f"127.0.0.1:{port}"]
    assert 0 == commands.run(["signals", "bus-config", "--directory", str(tmp_path / "bus"), *words])
    with serving(tmp_path / "bus", port):
        who = account(tmp_path / "bus", "collector")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with Bus.connect(f"tls://localhost:{port}", name="test", account=who) as bus:
            await bus.ping()
        monkeypatch.setenv("SSL_CERT_FILE", str(other))
        with pytest.raises(NotPermitted, match="not vouched for by the machine's authorities"):
            async with Bus.connect(f"tls://localhost:{port}", name="test", patience_seconds=0.0, account=who):
                pass
