"""The routes.  All of them are GET: there is nothing here that changes anything."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

import msgspec
from fastapi import FastAPI, Request, Response

from stella_gateway import access, answers, exposition
from stella_gateway.answers import Status, Works
from stella_gateway.board import Board, Health
from stella_shared import clock

_HTML: Final = "text/html"


def make_app(board: Board, *, token: str, version: str, started_at: float) -> FastAPI:
    """Return the application that shows `board`.  `token` "" means that none exists."""
    # No generated documentation pages: they would load scripts from elsewhere.  The document itself is ours.
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        default_response_class=Response,
        # A path is written as it is documented, or is none.
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    page, policy = _page()

    @app.middleware("http")
    async def guard(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        peer = request.client.host if request.client else ""
        answer = access.judge(peer, request.headers.get("host", ""), request.headers.get("authorization", ""), token)
        if answer is access.Answer.ALLOWED:
            response = await forward(request)
        else:
            code, reason = answer.value
            response = _json({"error": reason}, code)
            if code == 401:
                response.headers["WWW-Authenticate"] = 'Bearer, Basic realm="stella, any user, token as password"'
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Content-Security-Policy"] = policy
        return response

    @app.get(
        "/health",
        responses=answers.described(
            {200: ("every component works", Health), 503: ("a component does not work", Health)}
        ),
    )
    async def health() -> Response:
        """200 while every component works, else 503; the body says which does not and why."""
        answer = board.health(time.monotonic())
        return _json(answer, 200 if answer.working else 503)

    @app.get("/health/live", responses=answers.described({200: ("the process answers", Works)}))
    async def live() -> Response:
        """200 as long as this process answers."""
        return _json({"status": "ok"})

    @app.get(
        "/health/ready", responses=answers.described({200: ("answers have a meaning", Works), 503: ("not yet", Works)})
    )
    async def ready() -> Response:
        """200 once the bus is there and every expected service was heard, else 503."""
        is_ready = board.ready()
        return _json({"status": "ok" if is_ready else "starting"}, 200 if is_ready else 503)

    @app.get("/status", responses=answers.described({200: ("everything that is known", Status)}))
    async def status() -> Response:
        """Everything that is known; always 200."""
        at = time.time()
        head = {
            "at": clock.utc_text(int(at * 1e9)),
            "gateway": {"version": version, "started_at": started_at},
        }
        return _json(head | board.status(time.monotonic()))

    @app.get("/metrics", responses=answers.as_text("text/plain", "Prometheus text, version 0.0.4"))
    async def scrape() -> Response:
        """The Prometheus exposition."""
        return Response(exposition.render(board, time.monotonic()), media_type=exposition.CONTENT_TYPE)

    @app.get("/", responses=answers.as_text(_HTML, "the page"))
    async def index() -> Response:
        """The status page for people."""
        return Response(page, media_type=f"{_HTML}; charset=utf-8")

    @app.get("/openapi.json", responses=answers.described({200: ("an OpenAPI 3.1 document", dict)}))
    async def openapi() -> Response:
        """This description of all routes."""
        return Response(description, media_type=answers.JSON)

    description = answers.document(version, app.routes)
    return app


def _json(content: object, code: int = 200) -> Response:
    return Response(msgspec.json.encode(content), code, media_type=answers.JSON)


def _page() -> tuple[bytes, str]:
    """Return the page and the policy that lets a browser run its own script and style and nothing else."""
    page = resources.files("stella_gateway").joinpath("page.html").read_bytes()
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    for kind in ("script", "style"):
        for content in re.findall(rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode()), page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            policy += f"; {kind}-src 'sha256-{digest}'"
    return page, policy
