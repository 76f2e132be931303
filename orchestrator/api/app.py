"""The app: the routes of /v1, the health of the process, its metrics, and the OpenAPI document."""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..ledger import Ledger
from ..metrics import exposition, make_registry
from ..settings import Settings
from .guard import Guard
from .models import Health, Problem
from .problems import RESPONSES, install, problem
from .routes import Routes

_ABOUT = """Jobs of batch inference with BLIP.

Errors are problem+json with a stable `code`. A job's `status`: validating, in_progress, finalizing, completed; or
failed, cancelling, cancelled, paused. Results are in the job's output, not here."""


class EscapedJson(JSONResponse):
    """Rows may hold lone surrogates, which only escapes can carry."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def create_app(
    ledger: Ledger,
    settings: Settings,
    *,
    ailing: Callable[[], str | None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The API as an ASGI app.

    `ailing` tells what is wrong with the control loop, if anything is; `stopping` whether streams should end.
    """
    app = FastAPI(
        title="blip-batch", version=version("blip-batch"), description=_ABOUT, docs_url=None, redoc_url=None,
        redirect_slashes=False, default_response_class=EscapedJson,
        generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    install(app)
    app.add_middleware(Guard, settings=settings)
    Routes(ledger, settings, stopping).add_to(app)
    _add_probes(app, ledger, ailing)
    _add_metrics(app, make_registry(ledger, settings))
    _add_problem_to_document(app)
    return app


def _add_probes(app: FastAPI, ledger: Ledger, ailing: Callable[[], str | None]) -> None:
    unwell: dict[int | str, dict[str, Any]] = {503: RESPONSES[503]}

    @app.get("/healthz", summary="Whether this process works", response_model=Health, responses=unwell)
    async def healthz() -> Health | Response:  # not in a thread: all of them may wait for a Redis that is silent
        wrong = ailing()
        return Health(status="ok") if wrong is None else problem("unhealthy", wrong)

    @app.get("/readyz", summary="Whether it can answer: Redis does", responses=unwell)
    def readyz() -> Health:
        ledger.ping()
        return Health(status="ok")


def _add_metrics(app: FastAPI, registry: CollectorRegistry) -> None:
    @app.get("/metrics", summary="For Prometheus", response_class=Response,
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    def metrics(request: Request) -> Response:
        body, media_type = exposition(registry, request.headers.get("accept", ""))
        return Response(body, media_type=media_type)


def _add_problem_to_document(app: FastAPI) -> None:
    """Problems are no response models of any route, and the framework's own errors are never sent."""
    made = app.openapi

    def document() -> dict[str, Any]:
        schema = made()
        schemas = schema["components"]["schemas"]
        if "Problem" not in schemas:
            schemas["Problem"] = Problem.model_json_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operation in (operation for item in schema["paths"].values() for operation in item.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        return schema

    app.openapi = document  # type: ignore[method-assign]
