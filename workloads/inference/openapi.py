"""The server's own description, in OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0)."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_NUMBER, _TEXT, _WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer"}
_PLAIN = {"type": "object"}
# The same at every path: what each status says, behind `{"error": "one sentence"}`.
_ERRORS = {
    "400": "the request cannot be understood, or its transfer encoding is not known; the sentence "
    "says why",
    "401": "the API key is missing or another one",
    "404": "there is nothing at this path",
    "405": "the path does not take this method; Allow says which it takes",
    "408": "the request did not arrive in time",
    "413": "the body or the picture is larger than the server takes",
    "431": "the headers are too long",
    "503": "too much waits already, or the server is not ready: try again after Retry-After",
}


def description(
    *, max_body_bytes: int, max_batch_predict: int, default_batch_size: int, wants_api_key: bool
) -> Json:
    """Return the description of a server with these limits."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Inference server",
            "version": "1",
            "description": "Classifies pictures. Every error is JSON with one sentence.",
        },
        "paths": {
            "/health": {"get": _operation(
                "Whether it answers, and on which device", _health(), open_to_all=True,
                unready=True,
            )},
            "/predict": {"post": _operation(
                "The five likeliest classes of a picture", _prediction(),
                body=_upload(max_body_bytes),
            )},
            "/batch_predict": {"post": _operation(
                "Latency and throughput of a synthetic batch", _batch_prediction(),
                body=_batch(max_batch_predict, default_batch_size),
            )},
            "/stats": {"get": _operation("Counts, latency percentiles, QPS", _PLAIN)},
            "/metrics": {"get": _operation("The same for Prometheus", None)},
            "/openapi.json": {"get": _operation("This description", _PLAIN)},
        },
        "components": {
            "schemas": {"Error": _object({"error": _TEXT})},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if wants_api_key else [],
    }  # fmt: skip


def _operation(
    summary: str,
    answer: Json | None,
    *,
    body: Json | None = None,
    open_to_all: bool = False,
    unready: bool = False,
) -> Json:
    """Return one operation; ``answer`` is the schema of its JSON, None for plain text."""
    content = {"text/plain": {"schema": _TEXT}} if answer is None else _json(answer)
    responses = {"200": {"description": "well", "content": content}}
    for status, meaning in _ERRORS.items():
        if open_to_all and status == "401":
            continue
        said = answer if unready and status == "503" else _reference("Error")
        responses[status] = {"description": meaning, "content": _json(said)}
    operation: Json = {"summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = body
    if open_to_all:
        operation["security"] = []
    return operation


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Json, optional: Json | None = None) -> Json:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _health() -> Json:
    return _object({"status": _TEXT, "uptime_seconds": _NUMBER}, {"model": _TEXT, "weights": _TEXT})


def _prediction() -> Json:
    entry = _object(
        {"rank": _WHOLE, "class_id": _WHOLE, "class_name": _TEXT, "probability": _NUMBER}
    )
    times = {name: _NUMBER for name in ("latency_ms", "decode_ms", "queue_ms", "gpu_ms")}
    return _object(
        {"predictions": {"type": "array", "items": entry}, **times, "batch_size": _WHOLE}
    )


def _batch_prediction() -> Json:
    figures = {name: _NUMBER for name in ("latency_ms", "gpu_ms", "samples_per_second")}
    return _object({"batch_size": _WHOLE, "batches": _WHOLE, **figures})


def _upload(max_body_bytes: int) -> Json:
    """Return the body of a picture: a form with the field ``image``, or the file itself."""
    file = {"type": "string", "contentMediaType": "application/octet-stream", "minLength": 1}
    return {
        "required": True,
        "description": f"JPEG, PNG, GIF, BMP, WebP or TIFF; at most {max_body_bytes} bytes in all",
        "content": {
            "multipart/form-data": {"schema": _object({"image": file})},
            "image/*": {"schema": file},
        },
    }


def _batch(most: int, default: int) -> Json:
    size = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"required": False, "content": _json(_object({}, {"batch_size": size}))}
