"""`stella signals support-bundle`: all that helps, and nothing secret."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from chain_kit import Site

from stella_cli import bus_accounts, nats_server
from stella_cli.secrets_of_node import REPLACEMENT, Secrets
from stella_shared.config import BusUser

TOKEN = "a-token-of-the-gateway-0123456789"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A node that does not run, with every kind of secret, and logs that hold them."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    made = Site(tmp_path / "node", metrics={"port": 1, "token_file": str(token)})
    accounts = bus_accounts.of_node(made.state)
    accounts["reader"] = BusUser("reader", "an-older-password")
    (made.state / "nats").mkdir()
    conf = nats_server.configuration("127.0.0.1:4222", made.state / "nats", accounts, 10)
    (made.state / "nats" / "nats.conf").write_text(json.dumps(conf))
    logs = made.state / "logs"
    logs.mkdir()
    key = (made.state / "keys" / "signing.key").read_text()
    (logs / "signer.log").write_text(f"a fault dumped {key}\n")
    (logs / "nats.log").write_text("".join(f"user {u} gave {a.seed or a.password}\n" for u, a in accounts.items()))
    (logs / "gateway.log").write_text(f"GET / Authorization: Bearer {TOKEN}\nnats://a:sesame-1@10.0.0.1:4222\n")
    (logs / "collector.log").write_text("x" * 300_000 + "\nthe end\n")
    return made


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {
            member.name.partition("/")[2]: file.read()
            for member in tar
            if (file := tar.extractfile(member)) is not None
        }


def secrets(site: Site) -> set[str]:
    users = json.loads((site.state / "bus.json").read_text())["users"]
    conf = json.loads((site.state / "nats" / "nats.conf").read_text())
    key = (site.state / "keys" / "signing.key").read_text().splitlines()
    return {
        TOKEN,
        "sesame-1",
        *(user["seed"] for user in users.values()),
        *(user["password"] for user in conf["authorization"]["users"] if "password" in user),
        *(line for line in key if not line.startswith("-----")),
    }


def test_no_secret_is_in_it(site: Site, tmp_path: Path) -> None:
    """Seeds of the bus, the signing key, the gateway's token: logs that hold them lose them, and it is counted."""
    out = tmp_path / "bundle.tar.gz"
    site.good("support-bundle", "--output", out)
    everything = b"\n".join(contents(out).values())
    assert len(secrets(site)) >= 10
    for secret in secrets(site):
        assert secret.encode() not in everything
    assert b"PRIVATE KEY" not in everything
    assert everything.count(REPLACEMENT) > 5
    manifest = json.loads(contents(out)["manifest.json"])
    assert manifest["replaced_secrets"] > 5
    assert 0o600 == out.stat().st_mode & 0o777


def test_its_manifest_lists_what_is_there_and_why_something_is_not(site: Site, tmp_path: Path) -> None:
    """Every file has its size and digest; with no node, the gateway's answers are missed with the reason."""
    out = tmp_path / "bundle.tar.gz"
    said = site.good("support-bundle", "--output", out)
    files = contents(out)
    manifest = {row["name"]: row for row in json.loads(files.pop("manifest.json"))["files"]}
    assert set(files) == {name for name, row in manifest.items() if row["bytes"]}
    for name, data in files.items():
        assert len(data) == manifest[name]["bytes"]
        assert name in said
    assert "no node answers" in manifest["status.json"]["note"]
    wanted = {"versions.json", "kernel.json", "configuration.json", "chain.txt", "chain.json", "directories.txt"}
    assert wanted <= set(files)
    kernel = json.loads(files["kernel.json"])
    assert kernel["mounts"]
    assert any(line.startswith("CapEff") for line in kernel["process"])
    assert files["chain.txt"].startswith("Chain Status: ✓ VALID".encode())
    assert files["logs/collector.log"] == b"the end\n"
    values = json.loads(files["configuration.json"])["values"]
    assert (
        values["signals.node"] == {"value": "node-a", "source": f"{site.config}:4"} or values["signals.node"]["value"]
    )


def test_a_file_that_is_there_is_kept(site: Site, tmp_path: Path) -> None:
    """Exit code 2 without --force; nothing half written stays."""
    out = tmp_path / "bundle.tar.gz"
    out.write_text("mine")
    assert 2 == site.stella("support-bundle", "--output", out).returncode
    assert "mine" == out.read_text()
    site.good("support-bundle", "--output", out, "--force", "--no-verify")
    assert "chain.txt" not in contents(out)
    assert [] == [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_what_has_the_form_of_a_secret_goes_too() -> None:
    """A private key, a password in a URL, a bearer token and a JSON web token, known or not."""
    for text in (
        b"-----BEGIN EC PRIVATE KEY-----\nabc\n-----END EC PRIVATE KEY-----",
        b"nats://user:hunter22@host:4222",
        b"Authorization: Bearer abcdefgh12345678",
        b"eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
        b"seed SU" + b"A2" * 28,
    ):
        found = Secrets([]).scrub(text)
        assert REPLACEMENT in found
        assert not {b"hunter22", b"abc", b"abcdefgh12345678", b"c2lnbmF0dXJl", b"SU" + b"A2" * 28} & set(
            found.replace(b"@", b" ").split()
        )


def test_a_short_pin_is_taken_out_as_a_word() -> None:
    """1234 goes, 12345 and port 21234 stay."""
    assert b"pin=[secret removed] port 21234 12345" == Secrets([b"1234"]).scrub(b"pin=1234 port 21234 12345")
