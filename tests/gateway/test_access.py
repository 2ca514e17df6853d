"""Who may read the gateway."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from stella_gateway.access import Answer, judge, read_token
from stella_shared.errors import ConfigError

TOKEN = "0123456789abcdef"
BASIC = "Basic " + base64.b64encode(f"anyone:{TOKEN}".encode()).decode()


@pytest.mark.parametrize(
    ("peer", "host", "authorization", "token", "expected"),
    [
        ("127.0.0.1", "localhost:9090", "", "", Answer.ALLOWED),
        ("127.0.0.1", "127.0.0.1", "", "", Answer.ALLOWED),
        ("127.9.0.1", "LOCALHOST.", "", TOKEN, Answer.ALLOWED),
        ("::1", "[::1]:9090", "", "", Answer.ALLOWED),
        ("::ffff:127.0.0.1", "localhost", "", "", Answer.ALLOWED),
        ("127.0.0.1", "evil.example:9090", "", "", Answer.WRONG_HOST),
        ("127.0.0.1", "localhost.evil.example", "", TOKEN, Answer.WRONG_HOST),
        ("127.0.0.1", "", "", "", Answer.WRONG_HOST),
        ("127.0.0.1", "[::1", "", "", Answer.ALLOWED),
        ("127.0.0.1", "evil.example", f"Bearer {TOKEN}", TOKEN, Answer.ALLOWED),
        ("192.0.2.7", "node:9090", "", TOKEN, Answer.TOKEN_NEEDED),
        ("192.0.2.7", "localhost", "", "", Answer.TOKEN_NEEDED),
        ("192.0.2.7", "node", f"bearer  {TOKEN}", TOKEN, Answer.ALLOWED),
        ("192.0.2.7", "node", f"Bearer {TOKEN}x", TOKEN, Answer.TOKEN_NEEDED),
        ("192.0.2.7", "node", "Bearer ", "", Answer.TOKEN_NEEDED),
        ("192.0.2.7", "node", "Bearer \u00e9", TOKEN, Answer.TOKEN_NEEDED),
        ("192.0.2.7", "node", BASIC, TOKEN, Answer.ALLOWED),
        ("192.0.2.7", "node", "Basic !!!", TOKEN, Answer.TOKEN_NEEDED),
        ("192.0.2.7", "node", f"Digest {TOKEN}", TOKEN, Answer.TOKEN_NEEDED),
        ("", "localhost", "", TOKEN, Answer.TOKEN_NEEDED),
    ],
)
def test_loopback_needs_its_name_and_others_need_the_token(
    peer: str, host: str, authorization: str, token: str, expected: Answer
) -> None:
    """Loopback peers must ask for this machine; everybody else must know the token."""
    assert expected is judge(peer, host, authorization, token)


def test_beyond_loopback_there_must_be_a_good_token(tmp_path: Path) -> None:
    """No token file, an absent one, a short one: each refuses to start."""
    assert "" == read_token("", "127.0.0.1")
    assert "" == read_token("", "::1")
    path = tmp_path / "token"
    for address, file, said in (
        ("0.0.0.0", "", "token_file is empty"),
        ("::", "", "token_file is empty"),
        ("0.0.0.0", str(path), "No such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_token(file, address)
    for content in ("short", "with a space in the middle", "", "é" * 20, "x" * 5000):
        path.write_text(content)
        with pytest.raises(ConfigError, match="16 or more"):
            read_token(str(path), "0.0.0.0")
    path.write_text(TOKEN + "\n")
    assert TOKEN == read_token(str(path), "0.0.0.0")
