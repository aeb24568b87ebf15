"""The gateway as an ASGI application: its routes, and every error in OpenAI's format."""

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from distill.serving.admission import RequestMetricsMiddleware
from distill.serving.gateway import Gateway
from distill.serving.protocol import RequestError


def create_app(gateway: Gateway) -> FastAPI:
    """The gateway as an ASGI application."""
    app = FastAPI(lifespan=gateway.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestMetricsMiddleware, metrics=gateway.metrics, tracing=gateway.tracing)
    for method, path, handler in (
        ("GET", "/", gateway.show_page),
        ("GET", "/health", gateway.readiness),
        ("GET", "/health/live", gateway.live),
        ("GET", "/health/ready", gateway.readiness),
        ("GET", "/metrics", gateway.show_metrics),
        ("GET", "/v1/models", gateway.list_models),
        ("GET", "/v1/models/", gateway.list_models),  # otherwise a model without a name
        ("GET", "/v1/models/{model:path}", gateway.show_model),
        ("POST", "/v1/sentiment", gateway.sentiment),
        ("POST", "/v1/chat/completions", gateway.chat),
        ("POST", "/tokenize", gateway.tokenize),
    ):
        methods = ["GET", "HEAD"] if method == "GET" else [method]  # monitors ask with HEAD
        app.add_api_route(path, handler, methods=methods, response_model=None)
    app.add_exception_handler(RequestError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    return app


async def _error_response(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's format."""
    if isinstance(error, HTTPException):
        route = f"{request.method} {request.url.path[:100]}"
        methods = (error.headers or {}).get("Allow")
        remedy = f"the path takes {methods}" if methods else "docs/serving.md lists the routes"
        message = f"{route} is not a route of this server; {remedy}"
        return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, headers=error.headers)
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, headers=error.headers)
