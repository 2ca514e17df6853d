"""What /openapi.json promises is what the gateway answers: a real process, judged by schemathesis."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tests.gateway.test_gateway_process import TOKEN, Running, beat, free_port, nats_server

from stella_gateway.answers import Status
from stella_shared import metrics
from stella_shared.bus import Bus

ROUTES = {"/", "/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/status"}
EXAMPLES = 12


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that other machines may reach, with a token and without a bus."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "token").write_text(TOKEN)
    running = Running(folder, free_port(), address="0.0.0.0", token_file=str(folder / "token"))
    with running.start():
        assert 200 == running.until("/health/live", lambda answer: answer.status_code == 200).status_code
        yield running


def document(gateway: Running) -> dict[str, Any]:
    """Return the document as it is published."""
    return dict(gateway.get("/openapi.json").json())


def conforms(document: dict[str, Any], url: str, **headers: str) -> set[tuple[str, int]]:
    """Send what schemathesis makes of each route; every answer is as the document says.  Returns (path, code)."""
    seen: set[tuple[str, int]] = set()
    schema = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers(case: schemathesis.Case) -> None:
            answer = case.call(base_url=url, headers=headers)
            seen.add((case.path, answer.status_code))
            # A documented 503 is an answer, no failure; and so is the refusal of another machine's name.
            case.validate_response(answer, excluded_checks=[not_a_server_error, positive_data_acceptance])

        answers()
    return seen


def test_the_document_names_every_route_and_nothing_else(gateway: Running) -> None:
    """Each route with a summary and its codes; no pages that would load something from elsewhere."""
    said = document(gateway)
    assert "3.1" == said["openapi"][:3]
    assert set(said["paths"]) == ROUTES
    for path, methods in said["paths"].items():
        assert ["get"] == list(methods), path
        assert {"200", "401", "421", "503"} == set(methods["get"]["responses"]), path
    assert not {404} ^ {gateway.get(path).status_code for path in ("/docs", "/redoc", "/health/", "/openapi.json/")}


def test_every_answer_is_as_the_document_says(gateway: Running) -> None:
    """Here, and for another Host: codes, media types and JSON, for each route."""
    said, url = document(gateway), f"http://127.0.0.1:{gateway.port}"
    here = conforms(said, url)
    assert {path for path, _ in here} == ROUTES
    assert {("/health", 503), ("/health/ready", 503), ("/status", 200)} <= here
    assert {(path, 421) for path in ROUTES} == conforms(said, url, Host="evil.example")


def test_strangers_get_what_the_document_says(gateway: Running) -> None:
    """From another address: 401 without the token, and the same answers as here with it."""
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        return  # this machine has no other address; test_access covers the rule
    said, url = document(gateway), f"http://{own}:{gateway.port}"
    assert {(path, 401) for path in ROUTES} == conforms(said, url)
    assert ("/status", 200) in conforms(said, url, Authorization=f"Bearer {TOKEN}")


def test_a_document_that_is_not_true_is_found(gateway: Running) -> None:
    """So that the tests above can fail: a wrong type in /status, and a code that is missing."""
    url = f"http://127.0.0.1:{gateway.port}"
    wrong = document(gateway)
    wrong["components"]["schemas"]["Status"]["properties"]["node"] = {"type": "integer"}
    with pytest.raises(FailureGroup, match="integer"):
        conforms(wrong, url)
    silent = document(gateway)
    del silent["paths"]["/health"]["get"]["responses"]["503"]
    with pytest.raises(FailureGroup, match="503"):
        conforms(silent, url)


@pytest.mark.anyio
async def test_status_of_a_node_at_work_has_the_members_described_and_no_others(tmp_path: Path) -> None:
    """With probes, chain, identity and figures in it, also where a heartbeat says senseless things of them."""
    bus_port = free_port()
    running = Running(tmp_path, bus_port)
    with nats_server(tmp_path, bus_port), running.start():
        await anyio.to_thread.run_sync(running.until, "/health/live", lambda a: a.status_code == 200)
        collector = beat("collector", **{f"{metrics.PROBE_ATTACHED}{{probe=sys_enter_openat}}": 1.0})
        collector.detail = {"probes": [{"name": "sys_enter_openat", "wanted": "yes", "fix": 7}]}
        signer = beat("signer", **{metrics.LINES_TOTAL: 5.0})
        signer.detail = {"chain_id": "c", "index": 3, "open_lines": "many", "key_hint": None}
        enricher = beat("enricher")
        async with Bus.connect(f"nats://127.0.0.1:{bus_port}", name="test") as bus:

            def whole(answer: Any) -> bool:
                return answer.json()["identity"] is not None and bool(answer.json()["probes"])

            async def send() -> None:
                while True:
                    for said in (collector, enricher, signer):
                        await bus.beat(said)
                    await anyio.sleep(0.2)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                answer = await anyio.to_thread.run_sync(running.until, "/status", whole)
                tasks.cancel_scope.cancel()
    assert whole(answer)
    told = answer.json()
    assert {"chain_id": "c", "index": 3} == told["chain"]
    assert (True, "") == (told["probes"][0]["wanted"], told["probes"][0]["fix"])
    assert told == json.loads(msgspec.json.encode(msgspec.json.decode(answer.content, type=Status)))
