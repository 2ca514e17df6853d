"""The generated reference: `python -m stella_cli.reference docs/reference` writes it.

Each page is made from the place where its subject is declared, so that the two cannot differ; a test compares
the pages in the tree with `pages()`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final, get_args, get_origin

import msgspec

from stella_cli import help_pages
from stella_cli.inspection.answer import Answer
from stella_shared import config, config_layers, events, metrics, subjects
from stella_shared.config import Signals
from stella_shared.evidence import compressed
from stella_shared.evidence.report import FAULT_CODES, STATUSES, ChainReport
from stella_shared.selectors import TargetSet
from stella_shared.wire import FILTER_CAUSES, LOSS_CAUSES, Beat, PartHead, RawBatch

_MADE: Final = "<!-- Made by `python -m stella_cli.reference docs/reference`; do not edit. -->\n"
_CAUSES: Final = {
    "ring_full": "the ring buffer had no room",
    "rate_limit": "above signals.max_events_per_second",
    "inflight": "the entry of a call was seen, its exit could not be matched",
    "probe_missed": "the kernel did not run the program (recursion or its own limits)",
    "bus": "a batch never arrived",
    "enricher": "a batch could not be turned into lines",
    "signer": "a batch could not be recorded",
    "restart": "the collector ended without a last batch",
    "unclean_boot": "the machine went down without a last batch",
    "kernel_target": "not a target process",
    "kernel_path": "the path lists, decided in the kernel",
    "kernel_network": "the network lists, decided in the kernel",
    "user_path": "the path lists, finished in user space",
}


def pages() -> dict[str, str]:
    """Return file name → content of every generated page."""
    return {
        "configuration.md": _configuration(),
        "configuration.schema.json": _json(configuration_schema()),
        "metrics.md": _metrics(),
        "subjects.md": _subjects(),
        "events.md": _events(),
        "evidence-line.schema.json": _json(events.json_schema()),
        "chain-report.schema.json": _json(report_schema()),
        "inspection.schema.json": _json(inspection_schema()),
        "cli.md": help_pages.render(),
    }


def configuration_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of stellaops.yaml."""
    document = msgspec.defstruct(
        "Document", [("signals", Signals, msgspec.field(default_factory=Signals))], forbid_unknown_fields=True
    )
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stella Signals configuration",
        **msgspec.json.schema(document),
    }
    for field in config.declared():
        content = schema["$defs"][_owner(field.key)]["properties"][field.key.rpartition(".")[2]]
        content["default"] = field.default
        content.update({f"x-{word}": text for word, text in (field.meta.extra or {}).items()})
    return schema


def inspection_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of what `inspect --format json` prints."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stella Signals inspection",
        **msgspec.json.schema(Answer),
    }


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of what `verify-chain --format json` prints.

    Members are added, never changed or taken away, while `format` stays the same.
    """
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stella Signals chain report",
        **msgspec.json.schema(ChainReport),
    }
    schema["$defs"]["Fault"]["properties"]["code"]["enum"] = list(FAULT_CODES)
    schema["$defs"]["ChunkReport"]["properties"]["status"]["enum"] = list(STATUSES)
    return schema


def _owner(key: str) -> str:
    """Return the name of the section struct that holds a key."""
    section: Any = Signals
    for name in key.split(".")[1:-1]:
        section = config_layers.hints(section)[name][0]
    return str(section.__name__)


def _configuration() -> str:
    lines = [
        "# Configuration reference\n",
        _MADE,
        "One YAML file, `stellaops.yaml`, with the top key `signals`.",
        "A command takes the file that `--config` names, else `$STELLA_CONFIG`, else `./stellaops.yaml`, "
        "else `/etc/stellaops/stellaops.yaml`, else the defaults below.",
        "Options of a command beat the environment, which beats the file, which beats the defaults.",
        "",
        "Every key can be set by an environment variable: `STELLA_SIGNALS__`, then the key in capitals, `__` "
        "for each dot; lists separated by commas.",
        "Unknown keys, duplicate keys and values that are not allowed are refused, naming their line.",
        f"The file may have {config.FILE_MAX_BYTES:,} bytes; YAML anchors and aliases are not allowed.",
        "",
        "Editors can check the file with [the JSON Schema](configuration.schema.json).",
        "",
    ]
    for title, keys in _by_section():
        lines += [f"## {title}\n"]
        for field in keys:
            lines += _key_lines(field)
    return "\n".join(lines)


def _by_section() -> list[tuple[str, list[config_layers.Field]]]:
    sections: dict[str, list[config_layers.Field]] = {}
    for field in config.declared():
        sections.setdefault(field.key.rpartition(".")[0], []).append(field)
    return list(sections.items())


def _key_lines(field: config_layers.Field) -> list[str]:
    extra = field.meta.extra or {}
    default = json.dumps(field.default, ensure_ascii=False)
    facts = [f"default `{default}`", config_layers.allowed(field.kind, field.meta).replace("'", "`")]
    facts += [f"in {extra['unit']}"] if "unit" in extra else []
    lines = [f"### `{field.key}`\n", f"{field.meta.description}\n", f"- {'; '.join(facts)}"]
    lines += [f"- environment: `{config.env_name(field.key)}`"]
    return [*lines, ""]


def _metrics() -> str:
    lines = [
        "# Metrics reference\n",
        _MADE,
        "The gateway exposes these at `/metrics` on `signals.metrics.port`.",
        "Every series that a service produces carries `service` and `instance` beside the labels below.",
        "Nothing is added up over instances: counters begin again at 0 when an instance is restarted, as "
        "`rate()` expects.",
        "The values are those of the last heartbeat, at most a second old.",
        "",
        "| Metric | Kind | Unit | Labels | From | Meaning | Alert when |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in metrics.CATALOGUE.values():
        labels = ", ".join(metric.labels)
        if metric.name != metrics.ENRICH_LATENCY_P99:
            labels = ", ".join([*metric.labels, "service", "instance"])
        lines.append(
            f"| `{metric.name}` | {metric.kind} | {metric.unit or '–'} | {labels or '–'} | "
            f"{', '.join(metric.producers)} | {metric.help} | {metric.alert or '–'} |"
        )
    bounds = ", ".join(f"{bound:g}" for bound in metrics.LATENCY_BOUNDS_SECONDS)
    lines += [
        "",
        f"Histograms have the bucket bounds {bounds} seconds.",
        "A counter whose name does not end in `_total` is called `untyped` in the exposition.",
        "",
        "## Causes\n",
        "`stellaops_signals_drops_total` and `stellaops_signals_filtered_total` say why with `cause`.",
        "",
        "| Cause | Of | Meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{cause}` | drops | {_CAUSES[cause]} |" for cause in LOSS_CAUSES]
    lines += [f"| `{cause}` | filtered | {_CAUSES[cause]} |" for cause in FILTER_CAUSES]
    return "\n".join(lines) + "\n"


def _subjects() -> str:
    mib = 1 << 20
    lines = [
        "# Subjects reference\n",
        _MADE,
        "A name becomes one NATS token: every character but letters, digits, `_` and `-` becomes `_`.",
        "",
        "| Subject | Kind | From → to | Content |",
        "|---|---|---|---|",
        f"| `stella.raw.<node>` | stream `{subjects.RAW_STREAM}`, work queue | collector → one enricher | "
        "`RawBatch`, MessagePack array |",
        f"| `stella.enriched.<node>.<type>` | stream `{subjects.ENRICHED_STREAM}`, limits | enricher → "
        f"signer and any subscriber | evidence lines as one zstd frame; headers `{subjects.ENCODING_HEADER}: "
        f"{compressed.ENCODING}` and `{subjects.HEAD_HEADER}`: `PartHead`, JSON |",
        "| `stella.beat.<service>.<instance>` | core NATS | every service, once a second → gateway | `Beat`, JSON |",
        "| `stella.ctl.<node>.targets` | core NATS | enrichers, once a second and at a change → collector | "
        "`TargetSet`, JSON; only when `signals.filters.target_containers` has selectors, or a watched function an "
        "`image` |",
        "",
        f"`<type>` is one of {', '.join(f'`{name}`' for name in events.EVENT_TYPES)}, or "
        f"`{subjects.LEDGER_TYPE}` for a batch that left no line.",
        "`nats sub --raw 'stella.enriched.>' | zstdcat` shows every evidence line, byte for byte what gets signed; "
        "[decision 0019](../decisions/0019-compressed-lines.md) shows the same in Python.",
        "",
        "## Limits\n",
        "| What | Value |",
        "|---|---|",
        f"| `{subjects.RAW_STREAM}`, then new batches are refused | {subjects.RAW_MAX_BYTES // mib} MiB |",
        f"| `{subjects.ENRICHED_STREAM}`, then the oldest go | {subjects.ENRICHED_MAX_BYTES // mib} MiB, "
        f"{subjects.ENRICHED_MAX_AGE_SECONDS:g} s |",
        f"| signer's lag at which enrichers wait | {subjects.SIGNER_LAG_SHARE:.0%} of that |",
        f"| wait for an ack before a message is given again | {subjects.ACK_WAIT_SECONDS:g} s |",
        f"| messages given and not acked | {subjects.MAX_ACK_PENDING} |",
        f"| message ids remembered | {subjects.DUPLICATE_WINDOW_SECONDS:g} s |",
        f"| largest message | {subjects.MAX_PAYLOAD_BYTES // mib} MiB |",
        f"| durables | `{subjects.RAW_DURABLE}`, `{subjects.SIGNER_DURABLE}` |",
        "",
        "## Messages\n",
    ]
    for struct in (RawBatch, PartHead, Beat, TargetSet):
        doc = (struct.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
        lines += [f"### `{struct.__name__}`\n", f"{doc}\n"]
        lines += [f"{n}. `{f.encode_name}`: {_type_name(f.type)}" for n, f in _numbered(struct)]
        lines.append("")
    return "\n".join(lines)


def _numbered(struct: type[msgspec.Struct]) -> list[tuple[int, Any]]:
    return list(enumerate(msgspec.structs.fields(struct), 1))


def _events() -> str:
    definitions: dict[str, Any] = events.json_schema()["$defs"]
    line = definitions.pop("EvidenceLine")
    lines = [
        "# Events reference\n",
        _MADE,
        "An evidence line is one JSON object, keys sorted, no spaces, ended by a newline.",
        "The machine-readable form is [the JSON Schema](evidence-line.schema.json).",
        "A field that is absent where one would look for it has its reason beside it.",
        "",
        "## Every line\n",
        *_field_table(line),
    ]
    for name, definition in definitions.items():
        kind = definition["properties"].get("type", {}).get("enum")
        lines += [f"## `{kind[0]}` ({name})\n" if kind else f"## {name}\n"]
        lines += [f"{definition.get('description', '')}\n".replace("\n    ", " "), *_field_table(definition)]
    return "\n".join(lines)


def _field_table(definition: dict[str, Any]) -> list[str]:
    required = set(definition.get("required", ()))
    rows = ["| Field | Type | Always | Meaning |", "|---|---|---|---|"]
    for name, content in sorted(definition["properties"].items()):
        meaning = content.get("description") or next(
            (c["description"] for c in content.get("anyOf", ()) if "description" in c), ""
        )
        always = "yes" if name in required else "no"
        rows.append(f"| `{name}` | {_schema_type(content)} | {always} | {meaning.replace('|', chr(92) + '|')} |")
    return [*rows, ""]


def _schema_type(content: dict[str, Any]) -> str:
    """Return a JSON Schema type in short words."""
    if "anyOf" in content:
        return " or ".join(dict.fromkeys(_schema_type(c) for c in content["anyOf"] if c.get("type") != "null"))
    if "enum" in content:
        return ", ".join(f"`{json.dumps(value)}`" for value in content["enum"])
    if "$ref" in content:
        return str(content["$ref"].rpartition("/")[2])
    if content.get("type") == "array":
        return f"list of {_schema_type(content.get('items', {}))}"
    return str(content.get("type", "any"))


def _type_name(kind: Any) -> str:
    """Return a Python type in short words."""
    if get_origin(kind) is None:
        return str(getattr(kind, "__name__", kind)).replace("NoneType", "nothing")
    inner = [_type_name(argument) for argument in get_args(kind)]
    name = get_origin(kind).__name__
    return " or ".join(inner) if name in ("UnionType", "Union") else f"{name} of {', '.join(inner)}"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write every page into the folder that is named."""
    if len(arguments) != 1:
        print("usage: python -m stella_cli.reference FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (folder / name).write_text(content, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
