"""What each answer looks like, for /openapi.json: its codes, media types, and the members of its JSON.

The structs describe `Board.status`, which builds the same out of what services say; a test holds one to the other.
Members may be added to an answer; none is taken away or changes its type.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from stella_gateway.board import Component, Health, Severity

JSON: Final = "application/json"
_COMPONENTS: Final = "#/components/schemas/"
_ABOUT: Final = """\
Tells how a node is. Every route is a GET, and none changes anything.

Over loopback no token is needed, but the Host header must name this machine.
From other machines a token is: as a bearer token, or as the password of any user.
A path that is not here gets 404, another method than GET 405, both with the JSON `{"detail": "…"}`.
What is no HTTP gets 400 as text. A connection on which no whole request comes within 5 seconds is closed.
"""


class Refusal(msgspec.Struct):
    """Why a request is refused."""

    error: str


class Works(msgspec.Struct):
    """One word: `ok`, or `starting`."""

    status: str


class Gateway(msgspec.Struct):
    """Who answers.  `started_at` is in seconds of UNIX time."""

    version: str
    started_at: float


class ContainerRate(msgspec.Struct):
    """A container (`host` for none, `others` for all beyond some thousands), its image's name, and its lines."""

    container: str
    image: str
    lines_per_second: float


class Rates(msgspec.Struct):
    """Events and losses a second.  Histories have one figure a second, the newest last, up to two minutes."""

    events_per_second: float | None
    by_type_per_second: dict[str, float]
    by_container_per_second: list[ContainerRate]
    history_events_per_second: list[float]
    history_lost_per_second: list[float]


class Queues(msgspec.Struct):
    """What waits where; null where no instance tells."""

    ringbuf_usage_percent: float | None
    history_ringbuf_usage_percent: list[float]
    ringbuf_bytes: float | None
    spool_bytes: float | None
    bus_waiting_bytes: dict[str, float] | None
    sign_lag_batches: float | None


class Quantiles(msgspec.Struct):
    """Milliseconds over the last minute; null when nothing came."""

    p50: float | None
    p99: float | None


class Latencies(msgspec.Struct):
    """Of enriching a batch, from the kernel to a line, and from the kernel to a line on disk."""

    enrich: Quantiles
    kernel_to_line: Quantiles
    durable: Quantiles


class Totals(msgspec.Struct):
    """Counts since each service's own start; null where no instance tells."""

    since: str
    events_by_type: dict[str, float] | None
    lines: float | None
    filtered_by_cause: dict[str, float] | None
    lost_by_cause: dict[str, float] | None
    chunks_signed: float | None
    chunks_logged: float | None
    rekor_pending: float | None
    rekor_failures: float | None


class Probe(msgspec.Struct):
    """A probe of the collector: whether it is attached and where, or why not and what would help."""

    probe: str
    attached: bool
    wanted: bool
    attach_point: str
    scope: str
    reason: str
    fix: str


class Identity(msgspec.Struct):
    """Events recorded, filtered and lost since the services' starts."""

    recorded: float
    filtered: float
    lost: float


class Chain(msgspec.Struct, omit_defaults=True):
    """What the signer says of its chain; members are absent while it does not."""

    chain_id: str | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET
    last_statement_sha256: str | msgspec.UnsetType = msgspec.UNSET
    open_lines: int | msgspec.UnsetType = msgspec.UNSET
    open_bytes: int | msgspec.UnsetType = msgspec.UNSET
    key_hint: str | msgspec.UnsetType = msgspec.UNSET


class Service(msgspec.Struct):
    """An instance of a service, by its last heartbeat.  `detail` is its own, and may have anything."""

    service: str
    instance: str
    pid: int
    version: str
    state: Severity
    reason: str
    started_at: float
    heard_seconds_ago: float
    detail: dict[str, Any]


class Status(msgspec.Struct):
    """The answer to /status.  `at` is UTC, RFC 3339."""

    at: str
    gateway: Gateway
    status: Severity
    node: str
    components: dict[str, Component]
    rates: Rates
    queues: Queues
    latency_ms: Latencies
    totals: Totals
    probes: list[Probe]
    identity: Identity | None
    chain: Chain
    services: list[Service]


def described(answers: dict[int, tuple[str, type]]) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route that speaks JSON: code → (when, what), and what every route may answer."""
    mine = {code: _one(when, JSON, _schema(what)) for code, (when, what) in answers.items()}
    return _with_refusals(mine)


def as_text(media_type: str, what: str) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route that gives text."""
    return _with_refusals({200: _one(what, media_type, {"type": "string"})})


def document(version: str, routes: list[BaseRoute]) -> bytes:
    """Return the OpenAPI 3.1 document of these routes, as JSON."""
    said = get_openapi(title="Stella Signals gateway", version=version, description=_ABOUT, routes=routes)
    _, schemas = msgspec.json.schema_components([Health, Status, Works, Refusal], ref_template=_COMPONENTS + "{name}")
    said["components"] = {
        "schemas": schemas,
        "securitySchemes": {
            "token": {"type": "http", "scheme": "bearer"},
            "password": {"type": "http", "scheme": "basic", "description": "any user; the token as password"},
        },
    }
    # The empty one: over loopback there is need of none.
    said["security"] = [{"token": []}, {"password": []}, {}]
    return msgspec.json.encode(said)


def _with_refusals(mine: dict[int, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    crowded = "as many connections as there may be are open"
    unwell = mine.setdefault(503, {"description": crowded, "content": {}})
    if unwell["description"] != crowded:
        unwell["description"] += f"; as text: {crowded}"
    unwell["content"]["text/plain"] = {"schema": {"type": "string"}}
    refused: dict[int | str, dict[str, Any]] = {
        401: _one("a token is needed from other machines", JSON, _schema(Refusal)),
        421: _one("over loopback: the Host header names another machine", JSON, _schema(Refusal)),
    }
    refused[401]["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}
    return {**{code: row for code, row in mine.items()}, **refused}


def _one(when: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": when, "content": {media_type: {"schema": schema}}}


def _schema(what: type) -> dict[str, Any]:
    return {"type": "object"} if what is dict else {"$ref": _COMPONENTS + what.__name__}
