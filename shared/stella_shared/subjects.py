"""The bus: every subject, stream, durable and limit, declared here and nowhere else.

    stella.raw.<node>               RAW       work queue: collector → one enricher of the pool
    stella.enriched.<node>.<type>   ENRICHED  limits: enricher → signer, and anybody who wants to read
    stella.beat.<service>.<instance>   core NATS: each service, once a second → gateway
    stella.ctl.<node>.targets          core NATS: enricher → collector, which containers the selectors match

A body of `stella.enriched` is one zstd frame of lines (`evidence.compressed`).

`<type>` is one of `events.EVENT_TYPES`, or `ledger` for a batch that left no line (its body is empty, its
head still carries the accounting).  A node name is one NATS token: `node_token` makes it so.
"""

from __future__ import annotations

import re
from typing import Final

RAW_STREAM: Final = "STELLA_RAW"
RAW_SUBJECTS: Final = "stella.raw.*"
RAW_DURABLE: Final = "enrichers"
#: A full work queue refuses new messages (discard new): the collector keeps the batch and backs off.
RAW_MAX_BYTES: Final = 1 << 30

ENRICHED_STREAM: Final = "STELLA_ENRICHED"
ENRICHED_SUBJECTS: Final = "stella.enriched.>"
SIGNER_DURABLE: Final = "signer"
ENRICHED_MAX_BYTES: Final = 2 << 30
ENRICHED_MAX_AGE_SECONDS: Final = 3600.0
#: Enrichers stop taking work when the signer has not finished this share of what the stream may hold, long before
#: it could drop a message.
SIGNER_LAG_SHARE: Final = 0.5

#: How long the server waits for an ack before it gives a message to somebody else.
ACK_WAIT_SECONDS: Final = 10.0
MAX_ACK_PENDING: Final = 512
#: Message ids are remembered this long; a publisher that retries within it cannot double a message.
DUPLICATE_WINDOW_SECONDS: Final = 120.0
#: nats-server's max_payload in the embedded configuration, and the bound every publisher keeps below.
MAX_PAYLOAD_BYTES: Final = 8 << 20

LEDGER_TYPE: Final = "ledger"
#: Header of an enriched message: the JSON text of `wire.PartHead`.
HEAD_HEADER: Final = "Stella-Batch"
#: Header of a message whose body is compressed: how.
ENCODING_HEADER: Final = "Content-Encoding"

_NOT_TOKEN = re.compile(r"[^A-Za-z0-9_-]")


def node_token(name: str) -> str:
    """Return `name` as one NATS token: everything but letters, digits, `_` and `-` becomes `_`."""
    return _NOT_TOKEN.sub("_", name) or "_"


def raw(node: str) -> str:
    """Subject that the collector of `node` publishes raw batches on."""
    return f"stella.raw.{node_token(node)}"


def enriched(node: str, event_type: str) -> str:
    """Subject of the evidence lines of one event type of `node` (`*` is allowed for either)."""
    token = node if node == "*" else node_token(node)
    return f"stella.enriched.{token}.{event_type}"


def beat(service: str, instance: str) -> str:
    """Subject of a service instance's heartbeat."""
    return f"stella.beat.{service}.{node_token(instance)}"


BEATS: Final = "stella.beat.>"


def targets(node: str) -> str:
    """Subject of the containers that a node's selectors match (`*` is allowed)."""
    return f"stella.ctl.{node if node == '*' else node_token(node)}.targets"
