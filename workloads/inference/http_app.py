"""The server's HTTP interface: what is answered at which path.

==========================  =====================================================================
``GET /health``             200 once warm, with the device; 503 before and while shutting down
``POST /predict``           one picture (multipart field ``image``, or the raw bytes as the body)
``POST /batch_predict``     ``{"batch_size": 32}``: a synthetic batch, its latency and throughput
``GET /stats``              request counts, latency percentiles, QPS, batch sizes
``GET /metrics``            the same for Prometheus, as counters and histograms
``GET /openapi.json``       all this as OpenAPI
==========================  =====================================================================

With an API key everything but ``/health`` wants it (``api_key.py``), else 401. Every error is JSON:
``{"error": "one sentence"}``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from workloads.inference.api_key import CHALLENGE, admits
from workloads.inference.http_messages import Request
from workloads.inference.image_service import ImageService, Inference, Refusal
from workloads.inference.openapi import description
from workloads.inference.server_metrics import CONTENT_TYPE, ServerMetrics
from workloads.inference.server_stats import ServerStats, StatsWriter
from workloads.inference.shared_block import ENDPOINTS

DEFAULT_BATCH_SIZE = 32


@dataclass
class ServerState:
    """What the GPU process tells its front ends, whenever it changes.

    Attributes:
        status: ``loading``, ``warming up``, ``ok``, ``shutting down`` or ``failed``.
        device: What ``/health`` shows of the device.
        model: Model and weights, as said in every answer.
        class_names: Names of the model's classes.
        started_seconds: When the server was started (CLOCK_MONOTONIC).
    """

    status: str = "loading"
    device: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    class_names: Sequence[str] = ()
    started_seconds: float = field(default_factory=time.monotonic)


class Application:
    """Answers requests; on the event loop's thread, but for reading the statistics."""

    def __init__(
        self,
        service: ImageService,
        writer: StatsWriter,
        stats: ServerStats,
        *,
        max_batch: int,
        max_batch_predict: int,
        max_body_bytes: int,
        api_key: str | None,
        call_soon: Callable[..., None],
    ) -> None:
        """Prepare.

        Args:
            service: Classifies pictures.
            writer: Counts this front end's answers.
            stats: Reads the statistics of all front ends.
            max_batch: The largest batch of one forward pass; larger ones are split.
            max_batch_predict: The largest ``batch_size`` of ``/batch_predict``.
            max_body_bytes: The longest request body.
            api_key: What a client has to know for all but ``/health``; None: nothing.
            call_soon: Runs a call on the event loop's thread.
        """
        self.state = ServerState()
        self._service = service
        self._writer = writer
        self._stats = stats
        self._metrics = ServerMetrics(stats)
        self._max_batch = max_batch
        self._max_batch_predict = max_batch_predict
        self._max_body_bytes = max_body_bytes
        self._api_key = api_key
        self._call_soon = call_soon
        # Percentiles of 100,000 latencies take milliseconds, which no picture shall wait.
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="stats")
        self._routes: dict[str, dict[str, Callable[[Request], None]]] = {
            "/health": {"GET": self._health},
            "/predict": {"POST": self._predict},
            "/batch_predict": {"POST": self._batch_predict},
            "/stats": {"GET": self._show_stats},
            "/metrics": {"GET": self._show_metrics},
            "/openapi.json": {"GET": self._describe},
        }

    def handle(self, request: Request) -> None:
        """Answer ``request``, now or later."""
        # Before anything that tells what is there.
        if request.path != "/health" and not admits(self._api_key, request.authorization):
            request.body = b""
            request.respond_error(
                401, "this server wants its API key: Authorization: Bearer KEY", (CHALLENGE,)
            )
            return
        methods = self._routes.get(request.path)
        if methods is None:
            request.respond_error(404, f"there is nothing at {request.path[:100]}")
            return
        method = "GET" if request.method == "HEAD" else request.method
        handler = methods.get(method)
        if handler is None:
            allowed = (("Allow", ", ".join(methods)),)
            if method == "OPTIONS":
                request.respond(200, b"", headers=allowed)
            else:
                request.respond_error(
                    405, f"{request.path} takes {', '.join(methods)} alone", allowed
                )
            return
        try:
            handler(request)
        except Refusal as refusal:
            self._refuse(request, refusal)
        # One request must not take the others along.
        except Exception as error:
            logging.getLogger("inference_server").error("request failed", exc_info=error)
            self._refuse(request, Refusal(500, "internal error; the server's log has the details"))

    def _health(self, request: Request) -> None:
        state = self.state
        body = {
            "status": state.status,
            **state.device,
            **state.model,
            "uptime_seconds": time.monotonic() - state.started_seconds,
        }
        request.respond_json(200 if state.status == "ok" else 503, body)

    def _describe(self, request: Request) -> None:
        request.respond_json(
            200,
            description(
                max_body_bytes=self._max_body_bytes,
                max_batch_predict=self._max_batch_predict,
                default_batch_size=min(DEFAULT_BATCH_SIZE, self._max_batch_predict),
                wants_api_key=self._api_key is not None,
            ),
        )

    def _show_stats(self, request: Request) -> None:
        def body() -> bytes:
            uptime_seconds = time.monotonic() - self.state.started_seconds
            content = {**self._stats.snapshot(), "uptime_seconds": uptime_seconds}
            return json.dumps(content).encode() + b"\n"

        self._readers.submit(self._read_and_respond, request, body, "application/json")

    def _show_metrics(self, request: Request) -> None:
        self._readers.submit(self._read_and_respond, request, self._metrics.text, CONTENT_TYPE)

    def _read_and_respond(
        self, request: Request, read: Callable[[], bytes], content_type: str
    ) -> None:
        try:
            body = read()
        except Exception as error:
            logging.getLogger("inference_server").error("statistics failed", exc_info=error)
            message = "internal error; the server's log has the details"
            self._call_soon(request.respond_error, 500, message)
            return
        self._call_soon(request.respond, 200, body, content_type)

    def _require_acceptable(self, request: Request) -> None:
        # Requests that arrived before a shutdown are still answered.
        if self.state.status not in ("ok", "shutting down"):
            raise Refusal(503, f"the server is not ready ({self.state.status}); ask /health")
        if request.too_long:
            raise Refusal(
                413,
                f"request entity too large: at most {self._max_body_bytes} bytes are accepted",
            )

    def _predict(self, request: Request) -> None:
        self._require_acceptable(request)
        self._service.classify(
            request.content_type, request.body, request.received_seconds,
            lambda result: self._answer_predict(request, result),
        )  # fmt: skip
        request.body = b""

    def _answer_predict(self, request: Request, result: Inference | Refusal) -> None:
        if isinstance(result, Refusal):
            self._refuse(request, result)
            return
        top = describe_top(result.outputs, self.state.class_names)
        end_seconds = time.monotonic()
        parts = {
            "decode": result.decode_seconds,
            "queue": result.wait_seconds,
            "gpu": result.gpu_seconds,
        }
        request.respond_json(
            200,
            {
                "predictions": top,
                "latency_ms": (end_seconds - request.received_seconds) * 1e3,
                **{f"{part}_ms": seconds * 1e3 for part, seconds in parts.items()},
                "batch_size": result.batch_images,
                **self.state.model,
            },
        )
        self._writer.record(
            "predict", 200, request.received_seconds, end_seconds, images=1, parts=parts
        )

    def _batch_predict(self, request: Request) -> None:
        self._require_acceptable(request)
        size = _batch_size(request.body, self._max_batch_predict)
        remaining = [
            min(self._max_batch, size - first) for first in range(0, size, self._max_batch)
        ]
        batches = len(remaining)
        gpu_seconds = 0.0

        def next_batch() -> None:
            first = len(remaining) == batches
            self._service.classify_synthetic(remaining.pop(0), take, first=first)

        def take(result: Inference | Refusal) -> None:
            nonlocal gpu_seconds
            if isinstance(result, Refusal):
                self._refuse(request, result)
                return
            gpu_seconds += result.gpu_seconds
            if not remaining:
                self._answer_batch_predict(request, size, batches, gpu_seconds)
                return
            next_batch()

        next_batch()

    def _answer_batch_predict(
        self, request: Request, size: int, batches: int, gpu_seconds: float
    ) -> None:
        end_seconds = time.monotonic()
        latency_seconds = end_seconds - request.received_seconds
        request.respond_json(
            200,
            {
                "batch_size": size,
                "batches": batches,
                "latency_ms": latency_seconds * 1e3,
                "gpu_ms": gpu_seconds * 1e3,
                "samples_per_second": size / latency_seconds,
                **self.state.model,
            },
        )
        self._writer.record(
            "batch_predict", 200, request.received_seconds, end_seconds,
            images=size, parts={"gpu": gpu_seconds},
        )  # fmt: skip

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        request.respond_error(refusal.status, str(refusal))
        endpoint = request.path.lstrip("/")
        if endpoint in ENDPOINTS:
            now = request.received_seconds
            self._writer.record(endpoint, refusal.status, now, now)


def _batch_size(body: bytes, limit: int) -> int:
    default = min(DEFAULT_BATCH_SIZE, limit)
    if not body.strip():
        return default
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, 'the body is not valid JSON; send {"batch_size": 32}') from error
    if not isinstance(content, dict):
        raise Refusal(400, 'the body must be a JSON object such as {"batch_size": 32}')
    size = content.get("batch_size", default)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= limit:
        raise Refusal(400, f"batch_size must be a whole number from 1 to {limit}")
    return size


def describe_top(outputs: np.ndarray, class_names: Sequence[str]) -> list[dict]:
    """Return one picture's output row as ``rank, class_id, class_name, probability`` entries."""
    values = outputs.tolist()
    half = min(len(values) // 2, len(class_names))
    return [
        {
            "rank": rank + 1,
            "class_id": int(values[half + rank]),
            "class_name": class_names[int(values[half + rank])],
            "probability": round(values[rank], 6),
        }
        for rank in range(half)
    ]
