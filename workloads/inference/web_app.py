"""The HTTP interface of the inference server, as a Flask application.

==========================  =====================================================================
``GET /``                   a page for people
``GET /health``             200 once warm, with the device; 503 before and while shutting down
``POST /predict``           one picture (multipart field ``image``, or the raw bytes as the body)
``POST /batch_predict``     ``{"batch_size": 32}``: a synthetic batch, its latency and throughput
``GET /stats``              request counts, latency percentiles, QPS, batch sizes
``GET /metrics``            the same for Prometheus, as counters and histograms
==========================  =====================================================================

With an API key everything but ``/`` and ``/health`` wants it (``Authorization: Bearer KEY``, RFC
6750), else 401. Every error is JSON: ``{"error": "one sentence"}``. The device belongs to another
process, which batching.py reaches.
"""

from __future__ import annotations

import io
import ipaddress
import json
import math
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import gevent
import multipart
from flask import Flask, Response, g, request
from gunicorn.http.errors import NoMoreData, ParseException
from PIL import Image
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from workloads.inference import api_key
from workloads.inference.batching import ENDPOINTS, Answer, Refusal
from workloads.inference.image_input import ImageRejected, open_upload, small_picture

if TYPE_CHECKING:
    from workloads.inference.web_worker import WebWorker

DEFAULT_BATCH_SIZE = 32
MAX_JSON_BYTES = 1024
MAX_FORM_PARTS = 1000
# A body is read in pieces. The first one is free, the rest comes out of what all bodies of a worker
# may hold together: a thousand clients may each send the largest one.
PIECE_BYTES = 1 << 18
BODIES_BYTES = 64 << 20
# Decoding more pixels takes long enough to be done on a thread, next to the other requests.
LARGE_IMAGE_PIXELS = 4_000_000
MIN_PILLOW_LIMIT = 1_000_000  # pixels; it refuses twice as many
MAX_DECODE_CPU_SECONDS = 2.0  # of a smaller picture; it takes milliseconds
TCP_ESTABLISHED = 1  # include/net/tcp_states.h of Linux
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob:; form-action 'none'; frame-ancestors 'none'"
)
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
INTERNAL_ERROR = "internal error; the server's log has the details"


app = Flask(__name__, static_folder=None)
app.json.sort_keys = False
app.url_map.merge_slashes = False
worker: WebWorker  # the process


def begin(process: WebWorker) -> None:
    """Prepare this process to answer requests."""
    global worker
    worker = process
    Image.MAX_IMAGE_PIXELS = max(worker.settings.max_pixels, MIN_PILLOW_LIMIT)
    signal.signal(signal.SIGPROF, _decoding_takes_too_long)
    # Else gevent logs a traceback for each bad picture that is decoded on a thread.
    gevent.get_hub().NOT_ERROR += (ImageRejected,)


@app.before_request
def check_request() -> None:
    """Admit who knows the key, and no foreign web page in a local browser."""
    host = request.headers.get("Host", "")
    if worker.settings.local_only and not _is_local(host):
        raise Refusal(403, "this server answers to names of this machine only, such as localhost")
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin is not None and origin.partition("//")[2] != host:
        raise Refusal(403, "pages of other origins may not use this server")
    if request.path not in ("/", "/health") and not api_key.admits(
        worker.settings.api_key, request.headers.get("Authorization", "")
    ):
        raise Refusal(401, "this server wants its API key: Authorization: Bearer KEY")


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine, or nothing (no browser leaves it away)."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or "localhost"
        if name == "localhost" or name.endswith(".localhost"):
            return True
        return ipaddress.ip_address(name).is_loopback
    return False


@app.get("/")
def page() -> Response:
    """Return the page for people."""
    headers = {"Content-Security-Policy": PAGE_POLICY}
    return Response(PAGE.read_bytes(), 200, headers, content_type="text/html; charset=utf-8")


@app.get("/health")
def health() -> tuple[dict, int]:
    """Say how the server is."""
    content = json.loads(worker.engine.ask("health"))
    return content, 200 if content["status"] == "ok" else 503


@app.get("/stats")
def stats() -> Response:
    """Return the statistics."""
    return Response(worker.engine.ask("stats"), content_type="application/json")


@app.get("/metrics")
def metrics() -> Response:
    """Return the statistics in Prometheus's text format."""
    return Response(worker.engine.ask("metrics"), content_type=PROMETHEUS_TYPE)


@app.post("/predict")
def predict() -> dict:
    """Classify one picture."""
    content = picture_of(request.content_type or "", _body(worker.settings.max_body_bytes))
    received_seconds = time.monotonic()
    deadline_seconds = received_seconds + worker.settings.request_seconds
    with _cpu_limit(MAX_DECODE_CPU_SECONDS):
        image = open_upload(content, worker.settings.max_pixels)
    picture = _decoded_apart(image, deadline_seconds) if _takes_long(image) else None
    with worker.engine.lane() as lane:
        if picture is None:
            with lane.decoding(), _cpu_limit(MAX_DECODE_CPU_SECONDS):
                picture = small_picture(image)
        decoded_seconds = time.monotonic()
        answer = lane.classify(picture, max(0.0, deadline_seconds - decoded_seconds))
    g.images = 1
    g.seconds = {
        "total": time.monotonic() - received_seconds,
        "decode": decoded_seconds - received_seconds,
        "queue": answer.started_seconds - decoded_seconds,
        "gpu": answer.ended_seconds - answer.started_seconds,
    }
    milliseconds = {name: round(seconds * 1e3, 3) for name, seconds in g.seconds.items()}
    return {
        "predictions": _top(answer),
        "latency_ms": milliseconds.pop("total"),
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        "batch_size": answer.batch_images,
        **_model(),
    }


@app.post("/batch_predict")
def batch_predict() -> dict:
    """Run a synthetic batch, one batch of the model's after another."""
    size = _batch_size(_body(MAX_JSON_BYTES))
    received_seconds = time.monotonic()
    deadline_seconds = received_seconds + worker.settings.request_seconds
    max_batch = worker.settings.max_batch
    gpu_seconds = 0.0
    with worker.engine.lane() as lane:
        for first in range(0, size, max_batch):
            left_seconds = deadline_seconds - time.monotonic()
            if left_seconds <= 0:
                raise Refusal(503, f"not done within {worker.settings.request_seconds:g} s")
            if _client_has_left():
                raise Refusal(499, "the client has left")
            answer = lane.classify_synthetic(min(max_batch, size - first), left_seconds)
            gpu_seconds += answer.ended_seconds - answer.started_seconds
    seconds = time.monotonic() - received_seconds
    g.images = size
    g.seconds = {"total": seconds, "gpu": gpu_seconds}
    return {
        "batch_size": size,
        "batches": math.ceil(size / max_batch),
        "latency_ms": round(seconds * 1e3, 3),
        "gpu_ms": round(gpu_seconds * 1e3, 3),
        "samples_per_second": round(size / seconds, 1),
        **_model(),
    }


@app.after_request
def count(response: Response) -> Response:
    """Have an inference request counted, whatever was answered."""
    endpoint = request.path[1:]
    if endpoint in ENDPOINTS:
        parts = (g.get("seconds", {}).get(name, math.nan) for name in ("decode", "queue", "gpu"))
        total_seconds = g.get("seconds", {}).get("total", 0.0)
        with suppress(Refusal), worker.engine.lane() as lane:
            lane.record(
                endpoint, response.status_code, g.get("images", 0),
                time.monotonic() - total_seconds, total_seconds, *parts,
            )  # fmt: skip
    return response


@app.teardown_request
def release(error: BaseException | None) -> None:
    """Give back what the body took of the memory for all."""
    worker.held_bytes -= g.pop("held_bytes", 0)


@app.errorhandler(Exception)
def refuse(error: Exception) -> Response:
    """Answer every error in one sentence."""
    status, message, headers = 500, INTERNAL_ERROR, {}
    if isinstance(error, (Refusal, ImageRejected)):
        status, message = error.status, str(error)
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})
    elif isinstance(error, HTTPException):
        status, message = error.code or 500, f"{error.name}: {request.path[:100]}"
        if isinstance(error, MethodNotAllowed):
            headers = {"Allow": ", ".join(sorted(error.valid_methods or ()))}
            message += f" takes {headers['Allow']}"
    else:
        app.logger.error("request failed", exc_info=error)
    response = app.make_response(({"error": message}, status, headers))
    if not g.get("is_read") and (
        request.content_length or request.environ.get("HTTP_TRANSFER_ENCODING")
    ):
        worker.close_after(response)
    return response


@cache
def _model() -> dict:
    """Return model and weights, as said in every answer; they are known once one succeeded."""
    facts = json.loads(worker.engine.ask("health"))
    return {name: facts[name] for name in ("model", "weights")}


@cache
def _class_name(number: int) -> str:
    return worker.engine.ask(f"name {number}").decode()


def _top(answer: Answer) -> list[dict]:
    return [
        {
            "rank": rank,
            "class_id": number,
            "class_name": _class_name(number),
            "probability": round(probability, 6),
        }
        for rank, (number, probability) in enumerate(
            zip(answer.classes, answer.probabilities, strict=True), start=1
        )
    ]


def _body(limit: int) -> bytes:
    """Read the whole body, within bounds of size, time and memory."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    seconds = worker.settings.request_seconds
    refusal = Refusal(408, f"the request did not arrive within {seconds:g} s")
    pieces, length = [], 0
    try:
        with worker.waiting_for_client(seconds, refusal):
            while piece := request.environ["wsgi.input"].read(PIECE_BYTES):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise _too_large(limit)
                if len(pieces) > 1:
                    _hold(len(piece))
    except TimeoutError as error:
        raise refusal from error
    except (NoMoreData, ConnectionError) as error:
        raise Refusal(400, "the request ends before it is whole") from error
    except ParseException as error:
        raise Refusal(400, f"damaged request: {error}") from error
    if request.content_length not in (None, length):
        raise Refusal(400, "the request ends before it is whole")
    g.is_read = True
    return b"".join(pieces)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"request entity too large: at most {limit} bytes are accepted")


def _hold(piece_bytes: int) -> None:
    if worker.held_bytes + piece_bytes > max(BODIES_BYTES, 2 * worker.settings.max_body_bytes):
        raise Refusal(503, "too much is being sent at once; try again in a moment")
    worker.held_bytes += piece_bytes
    g.held_bytes = g.get("held_bytes", 0) + piece_bytes


def picture_of(content_type: str, body: bytes) -> bytes:
    """Return the uploaded file: multipart field ``image``, or else the whole body.

    Raises:
        Refusal: There is no such file, or more than one (400).
    """
    kind, options = multipart.parse_options_header(content_type)
    if kind != "multipart/form-data":
        if not body:
            raise Refusal(400, "no image: send it as multipart field 'image' or as the body")
        return body
    boundary, limit = options.get("boundary"), len(body) + 1
    parts: list[multipart.MultipartPart] = []
    try:
        if boundary:
            # Werkzeug's parser takes 0.8 ms for a JPEG of 30 KB, this one 0.06.
            parts += multipart.MultipartParser(
                io.BytesIO(body), boundary, len(body),
                part_limit=MAX_FORM_PARTS, spool_limit=limit, memory_limit=limit,
            )  # fmt: skip
    except multipart.MultipartError as error:
        raise Refusal(400, f"the multipart form is cut off or damaged ({error})") from error
    images = [part for part in parts if part.name == "image" and part.filename is not None]
    if len(images) > 1:
        raise Refusal(400, f"{len(images)} fields named 'image': send one image a request")
    if not images:
        names = ", ".join(repr(part.name[:40]) for part in parts[:5]) or "none"
        raise Refusal(400, f"no file in multipart field 'image' (fields found: {names})")
    return images[0].raw


def _batch_size(body: bytes) -> int:
    limit = worker.settings.max_batch_predict
    default = min(DEFAULT_BATCH_SIZE, limit)
    if not body.strip():
        return default
    # A page of another origin cannot send this type unasked.
    if request.mimetype != "application/json":
        raise Refusal(415, "send the body as Content-Type: application/json")
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


def _client_has_left() -> bool:
    client = request.environ["gunicorn.socket"]
    try:
        return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_ESTABLISHED
    except OSError:
        return True


def _takes_long(image: Image.Image) -> bool:
    # What libtiff does with a hostile file in one call, nothing in this thread can end.
    return image.width * image.height > LARGE_IMAGE_PIXELS or image.format == "TIFF"


def _decoded_apart(image: Image.Image, deadline_seconds: float) -> bytes:
    """Decode a picture on a thread, next to the other requests."""
    refusal = Refusal(503, "the picture could not be decoded in time; try again later")
    with gevent.Timeout(deadline_seconds - time.monotonic(), refusal), worker.large_pictures:
        try:
            return gevent.get_hub().threadpool.apply(small_picture, (image,))
        except Refusal:
            # Nothing ends a thread but the end of its process.
            worker.is_stuck = True
            raise


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Bound what a picture takes of the processor, whatever is in its file."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _decoding_takes_too_long(number: int, frame: object) -> None:
    raise ImageRejected("the picture takes too long to decode", status=413)
