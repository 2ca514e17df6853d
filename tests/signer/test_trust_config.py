"""Where the services and the trust come from: files, or a private TUF repository; and which services are chosen."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.signer.log_kit import surroundings
from tests.sigstore import trust
from tests.sigstore.tuf import TufRepository

from stella_shared.config import Rekor
from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence.store import TRUST, TRUSTED_ROOT
from stella_shared.evidence.transparency import trust as roots
from stella_signer import trust_config

NOW = datetime(2026, 6, 1, tzinfo=UTC)
EMPTY = json.dumps(trust.trusted_root()).encode()


def chosen(rekor: list[dict[str, Any]], selector: str = "ANY", count: int | None = None) -> tuple[list[str], int]:
    """Return the URLs of the logs that are chosen at `NOW`, and how many of them are wanted."""
    tsas = [trust.service(f"http://t{n}", 1, str(n)) for n in range(2)]
    config = json.dumps(trust.signing_config(rekor=rekor, tsas=tsas, selector=selector, count=count)).encode()
    services = trust_config.choose(EMPTY, config, NOW)
    assert services.tsas_wanted == {"ANY": 1, "ALL": 2, "EXACT": count}[selector]
    return [service.url for service in services.logs], services.logs_wanted


def test_each_operator_gives_its_newest_version_that_holds() -> None:
    """Services that are over, not begun, or of an unknown version are passed over; the highest version is taken.

    The selector says how many are needed: any one, all, or an exact count.
    """
    services = [
        trust.service("http://a1", 1, "a"),
        trust.service("http://a2", 2, "a"),
        trust.service("http://a3", 3, "a"),
        trust.service("http://b-old", 2, "b", end="2026-01-01T00:00:00Z"),
        trust.service("http://b-next", 2, "b", start="2027-01-01T00:00:00Z"),
        trust.service("http://b1", 1, "b"),
    ]
    assert (["http://a2", "http://b1"], 2) == chosen(services, "ALL")
    assert (["http://a2", "http://b1"], 1) == chosen(services, "ANY")
    assert (["http://a2", "http://b1"], 2) == chosen(services, "EXACT", 2)


def test_the_signing_config_of_the_runbook_is_one_that_a_signer_takes() -> None:
    """It has no other keys than those that a whole one has, and gives the log and the authority that it names."""
    page = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()
    (text,) = [
        part.partition("```")[0] for part in page.split("```json\n") if "rekorTlogUrls" in part.partition("```")[0]
    ]
    assert set(json.loads(text)) < set(trust.signing_config())
    services = trust_config.choose(EMPTY, text.encode(), NOW)
    assert [("https://rekor.example", 2)] == [(log.url, log.major_api_version) for log in services.logs]
    assert (1, ["https://tsa.example/api/v1/timestamp"], 1) == (
        services.logs_wanted,
        services.tsas,
        services.tsas_wanted,
    )


def test_too_few_services_are_an_error() -> None:
    """A signing config that asks for more logs than are valid cannot be followed."""
    with pytest.raises(ConfigError, match="asks for 2 logs, 1 are valid"):
        chosen([trust.service("http://a", 2, "a")], "EXACT", 2)


@pytest.mark.parametrize(
    ("root", "config", "said"),
    [
        (b"{}", b"{}", "media"),
        (b"not json", b"{}", "no trusted root"),
        (EMPTY, b"[]", "Expected `object`"),
        (EMPTY, json.dumps(trust.signing_config()).replace("v0.2", "v0.1").encode(), "v0.1"),
    ],
    ids=["empty", "text", "list", "old version"],
)
def test_documents_that_cannot_be_used_are_named(root: bytes, config: bytes, said: str) -> None:
    """What is wrong with a trusted root or signing config is an error of configuration, in words."""
    with pytest.raises(ConfigError, match=said):
        trust_config.choose(root, config, NOW)


def test_files_are_read_and_what_was_used_is_kept(tmp_path: Path) -> None:
    """One ClientTrustConfig, or two files: both give the same; the trusted root is kept for verification here."""
    with surroundings(2) as around:
        one = trust_config.load(Rekor(trust_config=str(around.write(tmp_path))), tmp_path)
        root, config = around.documents()
        (tmp_path / "root.json").write_text(json.dumps(root))
        (tmp_path / "config.json").write_text(json.dumps(config))
        files = Rekor(trusted_root=str(tmp_path / "root.json"), signing_config=str(tmp_path / "config.json"))
        two = trust_config.load(files, tmp_path)
        assert one.logs == two.logs and one.tsas == two.tsas
        kept = (tmp_path / TRUST / TRUSTED_ROOT).read_bytes()
        assert roots.parse(kept).sha256 == two.root.sha256


def test_a_private_tuf_repository_gives_both_and_follows_changes(tmp_path: Path) -> None:
    """Trust begins with a root obtained otherwise; what is published later is found at the next look."""
    with surroundings(2) as around, surroundings(2) as other:
        root, config = around.documents()
        with TufRepository(root, config) as tuf:
            rekor = Rekor(tuf_url=tuf.url, tuf_root=str(tuf.root_path))
            assert trust_config.load(rekor, tmp_path).logs[0].url == around.log.url
            tuf.publish(*other.documents())
            assert trust_config.load(rekor, tmp_path).logs[0].url == other.log.url
            tuf.down()
            with pytest.raises(TryAgain, match="does not answer"):
                trust_config.load(rekor, tmp_path)
            stored = trust_config.load_stored(tmp_path)
            assert stored is not None and stored.logs[0].url == other.log.url
            assert trust_config.load_stored(tmp_path / "elsewhere") is None
            tuf.up()


def test_a_repository_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    """Another repository's root, expired metadata, and a missing document are errors that say so."""
    with surroundings(2) as around:
        root, config = around.documents()
        with (
            TufRepository(root, config) as tuf,
            TufRepository(root, config) as other,
            pytest.raises(ConfigError, match="cannot be trusted"),
        ):
            trust_config.load(Rekor(tuf_url=tuf.url, tuf_root=str(other.root_path)), tmp_path / "other")
        with TufRepository(root, config) as tuf:
            tuf.expires = timedelta(days=-1)
            tuf.publish(root, config)
            with pytest.raises(ConfigError, match="cannot be trusted"):
                trust_config.load(Rekor(tuf_url=tuf.url, tuf_root=str(tuf.root_path)), tmp_path / "expired")
        with TufRepository(root) as tuf, pytest.raises(ConfigError, match=r"no target signing_config"):
            trust_config.load(Rekor(tuf_url=tuf.url, tuf_root=str(tuf.root_path)), tmp_path / "half")
