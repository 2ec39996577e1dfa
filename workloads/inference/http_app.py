"""The server's HTTP interface as a Flask application; it knows neither torch nor waitress.

==========================  =====================================================================
``GET /health``             200 once warm, with the device; 503 before and while shutting down
``POST /predict``           one picture (multipart field ``image``, or the raw bytes as the body)
``POST /batch_predict``     ``{"batch_size": 32}``: a synthetic batch, its latency and throughput
``GET /stats``              request counts, latency percentiles, QPS
==========================  =====================================================================

Every error is JSON: ``{"error": "one sentence"}``.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flask import Flask, Request, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from workloads.inference.batcher import Batcher, BatcherClosed, Inference, QueueFull
from workloads.inference.image_input import IMAGE_SIZE, ImageRejected, decode_image
from workloads.inference.server_stats import ENDPOINTS, ServerStats

DEFAULT_BATCH_SIZE = 32
IMAGE_FIELD = "image"
# Set by the HTTP server: when the request was complete, CLOCK_MONOTONIC seconds.
RECEIVED_KEY = "gpu_sharing_bench.received_seconds"


class ModelFacts(Protocol):
    """What the application tells about the model; known once it is loaded."""

    def describe_device(self) -> dict:
        """Return what ``/health`` shows of the device."""

    def describe_model(self) -> dict:
        """Return model and weights, as said in every answer."""

    def describe_top(self, outputs: np.ndarray) -> list[dict]:
        """Return the top classes of one picture's outputs."""


@dataclass
class ServiceState:
    """What the HTTP side and the rest of the server share.

    Attributes:
        batcher: Answers images.
        stats: Counts requests.
        max_batch: The largest batch of one forward pass; larger ones are split.
        max_pixels: The largest picture that is decoded.
        max_batch_predict: The largest ``batch_size`` of ``/batch_predict``.
        answer_seconds: The longest that a request waits for the device.
        on_request: Told kind, start and end (CLOCK_MONOTONIC) of each successful request.
        status: ``loading``, ``warming up``, ``ok``, ``shutting down`` or ``failed``.
        facts: Set once the model is loaded.
    """

    batcher: Batcher
    stats: ServerStats
    max_batch: int
    max_pixels: int
    max_batch_predict: int
    answer_seconds: float
    on_request: Callable[[str, float, float], None]
    status: str = "loading"
    facts: ModelFacts | None = None
    started_seconds: float = field(default_factory=time.monotonic)


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _InMemoryRequest(Request):
    """Keeps uploads in memory: the body limit bounds them, and a temporary file costs more."""

    def _get_file_stream(self, *_: object, **__: object) -> io.BytesIO:
        return io.BytesIO()


def create_app(state: ServiceState, max_body_bytes: int) -> Flask:
    """Return the application that serves ``state``."""
    app = Flask("inference_server", static_folder=None)
    app.request_class = _InMemoryRequest
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.json.sort_keys = False
    app.url_map.strict_slashes = False
    synthetic = np.random.default_rng(0).integers(
        0, 256, (state.max_batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
    )

    @app.get("/health")
    def health() -> tuple[Response, int]:
        facts = state.facts
        body = {
            "status": state.status,
            **({} if facts is None else {**facts.describe_device(), **facts.describe_model()}),
            "uptime_seconds": time.monotonic() - state.started_seconds,
        }
        return jsonify(body), 200 if state.status == "ok" else 503

    @app.get("/stats")
    def stats() -> Response:
        return jsonify(
            {
                **state.stats.snapshot(),
                "waiting_images": state.batcher.waiting_images,
                "batch_size_histogram": {
                    str(size): count for size, count in sorted(state.batcher.batch_sizes.items())
                },
                "uptime_seconds": time.monotonic() - state.started_seconds,
            }
        )

    @app.post("/predict")
    def predict() -> Response:
        _require_ready(state)
        with state.batcher.announced() as submit:
            image = decode_image(_image_bytes(request), state.max_pixels)
            decoded_seconds = time.monotonic()
            answer = _submit(submit, image[np.newaxis])
        inference = _wait(answer, state.answer_seconds)
        top = state.facts.describe_top(inference.outputs[0])
        end_seconds = time.monotonic()
        g.parts = {
            "decode": decoded_seconds - g.handled_seconds,
            # Waiting for a thread and waiting for the device.
            "queue": g.handled_seconds - g.start_seconds + inference.queue_seconds,
            "compute": inference.compute_seconds,
        }
        g.images = 1
        return jsonify(
            {
                "predictions": top,
                "latency_ms": (end_seconds - g.start_seconds) * 1e3,
                **{f"{part}_ms": seconds * 1e3 for part, seconds in g.parts.items()},
                "batch_size": inference.batch_images,
                **state.facts.describe_model(),
            }
        )

    @app.post("/batch_predict")
    def batch_predict() -> Response:
        _require_ready(state)
        batch_size = _batch_size(request.get_data(), state.max_batch_predict)
        compute_seconds = 0.0
        batches = 0
        for first in range(0, batch_size, state.max_batch):
            count = min(state.max_batch, batch_size - first)
            inference = _wait(
                _submit(state.batcher.submit, synthetic[:count]), state.answer_seconds
            )
            compute_seconds += inference.compute_seconds
            batches += 1
        latency_seconds = time.monotonic() - g.start_seconds
        g.parts = {"compute": compute_seconds}
        g.images = batch_size
        return jsonify(
            {
                "batch_size": batch_size,
                "batches": batches,
                "latency_ms": latency_seconds * 1e3,
                "compute_ms": compute_seconds * 1e3,
                "samples_per_second": batch_size / latency_seconds,
                **state.facts.describe_model(),
            }
        )

    @app.before_request
    def begin() -> None:
        g.handled_seconds = time.monotonic()
        g.start_seconds = request.environ.get(RECEIVED_KEY, g.handled_seconds)
        g.parts = None
        g.images = 0

    @app.after_request
    def count(response: Response) -> Response:
        if request.endpoint in ENDPOINTS:
            end_seconds = time.monotonic()
            state.stats.record(
                request.endpoint, response.status_code, g.start_seconds, end_seconds,
                images=g.images, parts=g.parts,
            )  # fmt: skip
            if response.status_code == 200:
                kind = "request" if request.endpoint == "predict" else "batch_request"
                state.on_request(kind, g.start_seconds, end_seconds)
        return response

    app.register_error_handler(ImageRejected, lambda e: _error(e.status, str(e)))
    app.register_error_handler(_Refusal, lambda e: _error(e.status, str(e)))
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)
    return app


def _require_ready(state: ServiceState) -> None:
    # Requests that arrived before a shutdown are still answered.
    if state.status not in ("ok", "shutting down"):
        raise _Refusal(503, f"the server is not ready ({state.status}); ask /health")


def _image_bytes(incoming: Request) -> bytes:
    """Return the uploaded file: multipart field ``image``, or else the whole body."""
    if incoming.mimetype != "multipart/form-data":
        content = incoming.get_data()
        if not content:
            raise _Refusal(400, "no image: send it as multipart field 'image' or as the body")
        return content
    uploads = incoming.files.getlist(IMAGE_FIELD)
    if len(uploads) == 1:
        return uploads[0].read()
    if uploads:
        raise _Refusal(400, f"{len(uploads)} fields named 'image': send one image a request")
    found = ", ".join(repr(name[:40]) for name in [*incoming.files, *incoming.form][:5])
    raise _Refusal(400, f"no file in multipart field 'image' (fields found: {found or 'none'})")


def _batch_size(body: bytes, limit: int) -> int:
    if not body.strip():
        return DEFAULT_BATCH_SIZE
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refusal(400, 'the body is not valid JSON; send {"batch_size": 32}') from error
    if not isinstance(content, dict):
        raise _Refusal(400, 'the body must be a JSON object such as {"batch_size": 32}')
    size = content.get("batch_size", DEFAULT_BATCH_SIZE)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= limit:
        raise _Refusal(400, f"batch_size must be a whole number from 1 to {limit}")
    return size


def _submit(
    submit: Callable[[np.ndarray], Future[Inference]], images: np.ndarray
) -> Future[Inference]:
    try:
        return submit(images)
    except (QueueFull, BatcherClosed) as error:
        raise _Refusal(503, str(error)) from error


def _wait(answer: Future[Inference], timeout_seconds: float) -> Inference:
    try:
        return answer.result(timeout_seconds)
    except FutureTimeout as error:
        answer.cancel()
        raise _Refusal(503, f"no answer within {timeout_seconds:g} s; try again later") from error


def _error(status: int, message: str) -> Response:
    response = jsonify({"error": message})
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = "1"
    return response


def _http_error(error: HTTPException) -> Response:
    response = _error(error.code or 500, f"{error.name.lower()}: {error.description}")
    for name, value in error.get_headers():
        if name == "Allow":
            response.headers[name] = value
    return response


def _unexpected_error(error: Exception) -> Response:
    logging.getLogger("inference_server").error("request failed", exc_info=error)
    return _error(500, "internal error; the server's log has the details")
