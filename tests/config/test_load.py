"""The configuration: what loads, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stella_shared import config, yamltext
from stella_shared.config import Signals, check_runnable, load
from stella_shared.errors import ConfigError

RUNBOOK_EXAMPLE = Path(__file__).with_name("runbook-example.yaml").read_text()


def from_text(folder: Path, text: str, environ: dict[str, str] | None = None, **overrides: object) -> Signals:
    path = folder / "stellaops.yaml"
    path.write_text(text)
    return load(path, environ or {}, {key.replace("__", "."): value for key, value in overrides.items()})


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_text(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_runbook_example_loads_and_equals_the_defaults_but_for_signing(tmp_path: Path) -> None:
    """The full example of the runbook loads as it stands; our defaults are its values, signing apart."""
    example = from_text(tmp_path, RUNBOOK_EXAMPLE)
    local = config.Signing(enabled=True, key_id="local", submit_to_rekor=False)
    assert load(None, {}) == msgspec.structs.replace(example, signing=local)


def test_the_runbook_example_loads_but_cannot_run_here(tmp_path: Path) -> None:
    """What this release cannot do is said key by key, and the defaults can run."""
    with pytest.raises(ConfigError, match="no transparency log is configured") as caught:
        check_runnable(from_text(tmp_path, RUNBOOK_EXAMPLE))
    assert "signals.signing.key_id is 'fulcio'" in str(caught.value)
    check_runnable(load(None, {}))


def test_a_disabled_node_cannot_run() -> None:
    """`enabled: false` loads, and starting says why not."""
    with pytest.raises(ConfigError, match=r"signals\.enabled is false"):
        check_runnable(load(None, {}, {"enabled": False}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "signals:\n  ring_bufer_size: 4096\n",
            "stellaops.yaml:2: unknown key signals.ring_bufer_size; did you mean ring_buffer_size?",
        ),
        ("sginals: {}\n", "stellaops.yaml:1: unknown key sginals; did you mean signals?"),
        (
            "signals:\n  port: 1\n",
            "stellaops.yaml:2: unknown key signals.port; did you mean signals.metrics.port?",
        ),
        (
            "signals:\n  ring_buffer_size: 300000\n",
            "stellaops.yaml:2: signals.ring_buffer_size is 300000; allowed: a power of two and a multiple of the "
            "page size (4096); nearest: 262144 or 524288",
        ),
        (
            "signals:\n  metrics:\n    port: 70000\n",
            "stellaops.yaml:3: signals.metrics.port is 70000; allowed: a whole number from 1 to 65535",
        ),
        (
            "signals:\n  rotation: {max_size_mb: big}\n",
            "stellaops.yaml:2: signals.rotation.max_size_mb is 'big'; allowed: a number from 0.001 to 65536",
        ),
        (
            "signals:\n  rotation: {max_age_hours: .nan}\n",
            "stellaops.yaml:2: signals.rotation.max_age_hours is nan; allowed: a number from 2e-05 to 8760",
        ),
        (
            "signals:\n  node: 12\n",
            'stellaops.yaml:2: signals.node is 12; allowed: text (put it in quotes: "12")',
        ),
        ("signals:\n  enabled: 1\n", "stellaops.yaml:2: signals.enabled is 1; allowed: true or false"),
        (
            "signals:\n  logging: {level: loud}\n",
            "stellaops.yaml:2: signals.logging.level is 'loud'; allowed: 'debug' or 'info' or 'warning' or 'error'",
        ),
        (
            "signals:\n  filters:\n    target_containers:\n",
            "stellaops.yaml:3: signals.filters.target_containers is empty; "
            "allowed: a list of text (write [] for an empty list)",
        ),
        (
            "signals:\n  filters:\n    networks:\n      denylist: [127.0.0.1/8]\n",
            "stellaops.yaml:4: signals.filters.networks.denylist has '127.0.0.1/8': bits are set beyond the "
            "prefix; did you mean 127.0.0.0/8?",
        ),
        (
            "signals:\n  filters:\n    paths: {denylist: [/tmp/]}\n",
            "stellaops.yaml:3: signals.filters.paths.denylist has '/tmp/': a path pattern has no empty, . or .. "
            "segment; did you mean /tmp/**?",
        ),
        (
            "signals:\n  output_directory: evidence\n",
            "stellaops.yaml:2: signals.output_directory is 'evidence'; allowed: an absolute path without ..",
        ),
        (
            "signals:\n  bus: {url: 'nats://u:p@bus'}\n",
            "stellaops.yaml:2: signals.bus.url carries a user or password; put them into signals.bus.credentials_file",
        ),
        (
            "signals:\n  redaction:\n    patterns: ['(?=x)y']\n",
            "stellaops.yaml:3: signals.redaction.patterns has '(?=x)y': invalid perl operator: (?=",
        ),
        (
            "signals:\n  redaction:\n    patterns: ['x*']\n",
            "stellaops.yaml:3: signals.redaction.patterns has 'x*': it matches the empty text",
        ),
        (
            "signals:\n  redaction:\n    patterns: ['a{999}b{999}c{99}']\n",
            "stellaops.yaml:3: signals.redaction.patterns has 'a{999}b{999}c{99}': it compiles to 2101 instructions; "
            "allowed: 2000",
        ),
        (
            "signals:\n  redaction:\n    keep: [/usr/bin/app]\n",
            "stellaops.yaml:3: signals.redaction.keep has '/usr/bin/app'; allowed: file names without a folder",
        ),
        (
            "signals:\n  redaction: {enabeld: false}\n",
            "stellaops.yaml:2: unknown key signals.redaction.enabeld; did you mean enabled?",
        ),
        ("signals: 3\n", "stellaops.yaml:1: signals is 3; allowed: a mapping of keys"),
        (
            "signals:\n  node: a\n  node: b\n",
            "stellaops.yaml:3: duplicate key signals.node, first given on line 2",
        ),
        (
            "signals: &a\n  node: b\n",
            "stellaops.yaml:1: anchors and aliases are not allowed; write the value out",
        ),
        ("signals:\n  node: !!python/name:os.system x\n", None),
        ("signals: {}\n---\nsignals: {}\n", None),
        ("signals: [\n", None),
        ("[" * 100000, "stellaops.yaml:1: nested deeper than 16 levels"),
        ("- a\n", "stellaops.yaml: expected a mapping with the top key signals"),
        ("signals:\n  enrichers: " + "9" * 5000 + "\n", None),
    ],
)
def test_a_mistake_is_named_with_line_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, said: str | None
) -> None:
    """Each mistake in the file gives one line of explanation, and nothing else escapes."""
    found = refusal(tmp_path, text)
    if said is not None:
        assert said == found


def test_all_mistakes_are_shown_at_once(tmp_path: Path) -> None:
    """A file with three mistakes is refused with three lines."""
    assert 3 == len(refusal(tmp_path, "signals:\n  a: 1\n  enrichers: 0\n  node: []\n").splitlines())


def test_evidence_and_state_never_lie_in_each_other(tmp_path: Path) -> None:
    """Clearing the evidence directory, as the runbook does, cannot clear the keys."""
    found = refusal(tmp_path, "signals: {output_directory: /a/b, state_directory: /a/b/state}\n")
    assert "lie in each other" in found


def test_a_file_without_a_byte_is_refused(tmp_path: Path) -> None:
    """A power cut leaves such files, and their defaults would be a node that watches the whole machine."""
    assert "has no content at all, as after a power cut" in refusal(tmp_path, "")


@pytest.mark.parametrize("text", ["# nothing\n", "signals:\n", "signals:\n  filters:\n  probes:\n"])
def test_sections_left_empty_keep_their_defaults(tmp_path: Path, text: str) -> None:
    """A section with every key commented out means its defaults."""
    assert load(None, {}) == from_text(tmp_path, text)


def test_options_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """The four layers, each winning over the one before it, key by key."""
    text = "signals:\n  enrichers: 2\n  node: file\n  metrics: {port: 1001}\n"
    environ = {"STELLA_SIGNALS__NODE": "environment", "STELLA_SIGNALS__METRICS__PORT": "1002", "HOME": "/x"}
    found = from_text(tmp_path, text, environ, metrics__port=1003)
    assert (2, "environment", 1003) == (found.enrichers, found.node, found.metrics.port)
    assert "127.0.0.1" == found.metrics.address


def test_variables_are_read_as_their_keys_want_them() -> None:
    """Lists are separated by commas or YAML, numbers and truths are words, text stays text."""
    found = load(
        None,
        {
            "STELLA_SIGNALS__FILTERS__PATHS__ALLOWLIST": "/etc/**, /srv/**",
            "STELLA_SIGNALS__FILTERS__NETWORKS__DENYLIST": "[]",
            "STELLA_SIGNALS__PROBES__LIBC_ACCEPT": "false",
            "STELLA_SIGNALS__ROTATION__MAX_AGE_HOURS": "0.5",
            "STELLA_SIGNALS__NODE": "12",
        },
    )
    assert ["/etc/**", "/srv/**"] == found.filters.paths.allowlist
    assert [] == found.filters.networks.denylist
    assert (False, 0.5, "12") == (found.probes.libc_accept, found.rotation.max_age_hours, found.node)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"STELLA_SIGNALS_NODE": "x"},
            "unknown environment variable STELLA_SIGNALS_NODE; did you mean STELLA_SIGNALS__NODE?",
        ),
        (
            {"STELLA_SIGNALS__METRICS__PROT": "1"},
            "environment STELLA_SIGNALS__METRICS__PROT: unknown key signals.metrics.prot; did you mean port?",
        ),
        (
            {"STELLA_SIGNALS__ENRICHERS": "many"},
            "environment STELLA_SIGNALS__ENRICHERS: signals.enrichers is 'many'; allowed: a whole number from 1 to 64",
        ),
        (
            {"STELLA_SIGNALS__METRICS": "1"},
            "environment STELLA_SIGNALS__METRICS: signals.metrics is a section, not a key",
        ),
        (
            {"STELLA_SIGNALS__NODE__X": "1"},
            "environment STELLA_SIGNALS__NODE__X: signals.node has no keys below it",
        ),
    ],
)
def test_a_variable_without_effect_is_refused(environ: dict[str, str], said: str) -> None:
    """A misspelt variable is never ignored in silence."""
    with pytest.raises(ConfigError) as caught:
        load(None, environ)
    assert said == str(caught.value)


def test_what_is_no_proper_file_is_refused(tmp_path: Path) -> None:
    """Absent, a folder, a pipe, too large, not UTF-8: each is refused at once and by name."""
    (tmp_path / "large").write_bytes(b"#" * ((1 << 20) + 1))
    (tmp_path / "latin").write_bytes(b"signals: {node: \xff}\n")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("absent", "No such file"),
        (".", "irectory"),
        ("pipe", "not a regular file"),
        ("large", "larger than 1048576 bytes"),
        ("latin", "not UTF-8 at byte 16"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name, {})


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_a_configuration_error(data: bytes) -> None:
    """No file content raises anything but ConfigError."""
    with contextlib.suppress(ConfigError):
        yamltext.parse(data, "fuzz")


_YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["node", "filters", "paths", "allowlist", "metrics", "port", "x"]), inner)
    ),
    max_leaves=8,
)


@given(_YAML_VALUES)
def test_any_values_are_a_configuration_or_a_configuration_error(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    """No shape of values raises anything but ConfigError."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({"signals": value}))
    with contextlib.suppress(ConfigError):
        load(path, {})


def test_every_key_is_explained() -> None:
    """Each declared key has a description, and each number its limits."""
    for field in config.declared():
        assert field.meta.description, field.key
        if field.kind in (int, float):
            assert field.meta.ge is not None, field.key
            assert field.meta.le is not None, field.key


def test_the_effective_configuration_round_trips_and_has_one_digest(tmp_path: Path) -> None:
    """Written out as JSON and read again, a configuration is the same and has the same digest."""
    first = from_text(tmp_path, RUNBOOK_EXAMPLE, node="ö-1", rotation__max_age_hours=0.0005)
    again = from_text(tmp_path, msgspec.json.encode({"signals": first}).decode())
    assert first == again
    assert config.digest(first) == config.digest(again)
    assert config.digest(first) != config.digest(load(None, {}))


def test_the_helpers_follow_the_keys(tmp_path: Path) -> None:
    """Node name, state directory, bus address and bus user come from their keys, or from the defaults."""
    plain = load(None, {})
    assert Path("/var/lib/stellaops/state") == config.state_directory(plain)
    assert "nats://127.0.0.1:4222" == config.bus_url(plain)
    given_all = load(
        None, {}, {"node": "n", "state_directory": str(tmp_path), "bus.url": "nats://bus:4222", "bus.port": 5}
    )
    assert ("n", tmp_path) == (config.node_name(given_all), config.state_directory(given_all))
    assert "nats://bus:4222" == config.bus_url(given_all)
    assert config.bus_user(given_all, "signer") is None
    (tmp_path / "bus.json").write_text('{"users":{"signer":{"user":"s","password":"p"}}}')
    assert config.BusUser("s", "p") == config.bus_user(given_all, "signer")
    assert config.bus_user(given_all, "nobody") is None
    seed = "SU" + "A" * 56
    (tmp_path / "bus.json").write_text(json.dumps({"users": {"signer": {"seed": seed}}}))
    assert config.BusUser(seed=seed) == config.bus_user(given_all, "signer")
    assert seed not in repr(config.bus_user(given_all, "signer"))
    for wrong in ({}, {"seed": seed[1:]}, {"seed": seed, "user": "s", "password": "p"}):
        (tmp_path / "bus.json").write_text(json.dumps({"users": {"signer": wrong}}))
        with pytest.raises(ConfigError, match=r"bus\.json") as caught:
            config.bus_user(given_all, "signer")
        assert "AAAA" not in str(caught.value)
    (tmp_path / "bus.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bus\.json"):
        config.bus_user(given_all, "signer")


def test_redaction_is_on_and_takes_patterns_of_ones_own(tmp_path: Path) -> None:
    """The default redacts by the built-in rules; patterns and kept programs come from the file or the environment."""
    assert config.Redaction(enabled=True, patterns=[], keep=[]) == load(None, {}).redaction
    text = "signals:\n  redaction:\n    patterns: ['badge-(?P<secret>[0-9]+)', 'x{2,}']\n    keep: [app]\n"
    found = from_text(tmp_path, text, {"STELLA_SIGNALS__REDACTION__ENABLED": "false"}).redaction
    assert config.Redaction(enabled=False, patterns=["badge-(?P<secret>[0-9]+)", "x{2,}"], keep=["app"]) == found


def test_patterns_are_bounded_in_number_and_length(tmp_path: Path) -> None:
    """33 patterns, or one of 513 characters, are refused."""
    for patterns in (["a"] * 33, ["a" * 513], [""]):
        with pytest.raises(ConfigError, match=r"signals\.redaction\.patterns is"):
            from_text(tmp_path, yaml.safe_dump({"signals": {"redaction": {"patterns": patterns}}}))
    assert 32 == len(
        from_text(
            tmp_path, yaml.safe_dump({"signals": {"redaction": {"patterns": ["a" * 512] * 32}}})
        ).redaction.patterns
    )
