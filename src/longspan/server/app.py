"""The application: every endpoint, its errors, its description, and the gate around it.

`/docs` and the page at `/` load nothing from elsewhere. It does not know uvicorn.
"""

from __future__ import annotations

import html
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import longspan
from longspan.engine.serving import Scheduler
from longspan.server import chat, completions, counters, responses, sessions
from longspan.server.answering import told
from longspan.server.gate import Gate
from longspan.server.refusals import ApiError, of_validation
from longspan.server.serving import ServerOptions, Serving, serving_of

_log = logging.getLogger("longspan.server")
_PAGE = Path(__file__).parent / "page"
_NOTHING_FOREIGN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_ABOUT = "One model, many askers, long contexts that are read once. Endpoints of OpenAI's API, and sessions."
Parts = Annotated[Serving, Depends(serving_of)]
router = APIRouter()


def create_app(scheduler: Scheduler, options: ServerOptions | None = None, *, grace: float = 30.0) -> ASGIApp:
    """Return the application around a scheduler, which it starts and closes with itself.

    Args:
        scheduler: not started yet.
        options: limits and keys.
        grace: seconds in which answers under way may finish at a shutdown.
    """
    options = options or ServerOptions()
    counted = counters.Counters(scheduler)
    serving = Serving(scheduler, options, counted)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        try:
            yield
        finally:
            serving.ready = False
            await anyio.to_thread.run_sync(lambda: scheduler.close(save=True, timeout=grace))

    app = FastAPI(
        title="Longspan", version=longspan.__version__, description=_ABOUT, lifespan=lifespan, docs_url=None,
        redoc_url=None, openapi_url="/openapi.json", separate_input_output_schemas=False,
    )  # fmt: skip
    app.state.serving = serving
    for each in (router, chat.router, completions.router, responses.router, sessions.router, counters.router):
        app.include_router(each, responses=_REFUSALS)
    _add_errors(app)
    _add_pages(app)
    describe = app.openapi

    def described() -> dict[str, Any]:
        """Describe the API, with the one model that is here."""
        made = describe()
        for each in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
            made["components"]["schemas"][each]["properties"]["model"]["enum"] = [serving.name]
        return made

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's guide has it
    return Gate(app, options, counted)


# --- operation -----------------------------------------------------------------------------------------------------


@router.get("/health", tags=["Operation"], summary="Whether the process answers")
async def health() -> dict[str, str]:
    """Answer at once, whatever the model does."""
    return {"status": "ok"}


@router.get("/ready", tags=["Operation"], summary="Whether requests are taken")
async def ready(serving: Parts) -> JSONResponse:
    """Tell whether requests are taken: 503 while the server shuts down or where the engine's thread has ended."""
    fine = serving.ready and serving.scheduler.ready
    return JSONResponse({"status": "ready" if fine else "not ready"}, 200 if fine else 503)


@router.get("/v1/models", tags=["OpenAI"], summary="List models")
async def models(serving: Parts) -> dict[str, Any]:
    """List the one model."""
    return {"object": "list", "data": [_model(serving)]}


@router.get("/v1/models/{name:path}", tags=["OpenAI"], summary="Show a model")
async def model(name: str, serving: Parts) -> dict[str, Any]:
    """Show the model."""
    serving.check_model(name)
    return _model(serving)


def _model(serving: Serving) -> dict[str, Any]:
    return {
        "id": serving.name,
        "object": "model",
        "created": serving.started,
        "owned_by": "longspan",
        # As vLLM tells it: clients that know it need not find the window out.
        "max_model_len": serving.model.dimensions.window,
    }


# --- errors --------------------------------------------------------------------------------------------------------

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": about, "content": {"application/json": {"schema": _ERROR}}}
    for status, about in (
        (400, "Refused: the message says what to do"),
        (401, "No valid key"),
        (403, "Not allowed"),
        (404, "Not there"),
        (408, "The body did not come"),
        (409, "In the way of something that is there"),
        (413, "Too large"),
        (421, "Another host is meant"),
        (429, "Too much at once: ask again after Retry-After seconds"),
        (431, "Headers too large"),
        (500, "Something failed here"),
        (503, "Shutting down"),
        (507, "The disk is full"),
    )
}


def _add_errors(app: FastAPI) -> None:
    """Have every error leave in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: HttpRequest, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> JSONResponse:
        messages = {
            404: "there is no such address: /docs lists those that are",
            405: f"{request.method} is not for this address: /docs says what is",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(longspan.LongspanError)
    async def ours(_: HttpRequest, error: longspan.LongspanError) -> JSONResponse:
        return told(error).response()

    @app.exception_handler(Exception)
    async def unexpected(_: HttpRequest, error: Exception) -> JSONResponse:
        return told(error).response()


# --- pages ---------------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI) -> None:
    """Add the page, and the description of the API as a page, with nothing from elsewhere."""
    swagger = find_spec("fastapi_offline")
    if swagger is not None and swagger.submodule_search_locations:
        folder = Path(swagger.submodule_search_locations[0]) / "static"
        app.mount("/static/swagger", StaticFiles(directory=folder), name="swagger")

    app.mount("/static/page", StaticFiles(directory=_PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _NOTHING_FOREIGN})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        if swagger is None:
            return HTMLResponse(f"<title>{html.escape(app.title)}</title><a href=/openapi.json>openapi.json</a>")
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Longspan API",
            swagger_js_url="/static/swagger/swagger-ui-bundle.js",
            swagger_css_url="/static/swagger/swagger-ui.css",
            swagger_favicon_url="/static/swagger/favicon.png",
        )
