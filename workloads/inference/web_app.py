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
process, which web_worker.py reaches.
"""

from __future__ import annotations

import io
import ipaddress
import json
import math
import signal
import socket
import time
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import gevent
import multipart
from flask import Flask, Response, g, request
from flask.json.provider import DefaultJSONProvider
from gunicorn.http.errors import NoMoreData, ParseException
from PIL import Image
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from workloads.inference import api_key
from workloads.inference.batching import COUNT, RECORD, ROW
from workloads.inference.image_input import (
    LARGE_IMAGE_PIXELS,
    ImageRejected,
    open_upload,
    small_picture,
)
from workloads.inference.server_statistics import ENDPOINTS
from workloads.inference.web_process import YIELD_SECONDS, Refusal

if TYPE_CHECKING:
    from workloads.inference.web_worker import WebWorker

DEFAULT_BATCH_SIZE = 32
MAX_JSON_BYTES = 1024
QUESTION_SECONDS = 10.0  # for an answer of the engine that needs no device
MAX_FORM_PARTS = 1000
# A body is read in pieces. The first one is free, the rest comes out of what all bodies of a worker
# may hold together: a thousand clients may each send the largest one.
PIECE_BYTES = 1 << 18
CHUNKED_PIECE_BYTES = 1 << 14  # each of its bytes may be a chunk, which costs 2 µs
BODIES_BYTES = 64 << 20
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
CUT_OFF = "the request ends before it is whole"
# Of a request without a result: pictures, seconds in all and by part.
NO_FIGURES = (0, 0.0, math.nan, math.nan, math.nan)

app = Flask(__name__, static_folder=None)
DefaultJSONProvider.sort_keys = False
app.url_map.merge_slashes = False
worker: WebWorker


def _ask(
    kind: bytes, timeout_seconds: float, content: bytes = b"", picture: bytes | None = None
) -> tuple[float, float, int, list[float]]:
    """Have the engine run a batch.

    Returns:
        Its start and end (CLOCK_MONOTONIC), the pictures of all requests in it, and for one of ours
        the probabilities of the likeliest classes, in falling order, then these classes.
    """
    message = worker.pictures.ask(kind, content, max(0.0, timeout_seconds), picture)
    return (*ROW.unpack_from(message), memoryview(message)[ROW.size :].cast("f").tolist())


def _question(text: str) -> bytes:
    return worker.questions.ask(b"q", text.encode(), QUESTION_SECONDS)


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


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    """Whether a Host header names this machine, or nothing (no browser leaves it out)."""
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
    content = json.loads(_question("health"))
    return content, 200 if content["status"] == "ok" else 503


@app.get("/stats")
def stats() -> Response:
    """Return the statistics."""
    return Response(_question("stats"), content_type="application/json")


@app.get("/metrics")
def metrics() -> Response:
    """Return the statistics in Prometheus's text format."""
    return Response(_question("metrics"), content_type=PROMETHEUS_TYPE)


@app.post("/predict")
def predict() -> dict:
    """Classify one picture."""
    content = picture_of(request.content_type or "", _body(worker.settings.max_body_bytes))
    received_seconds = time.monotonic()
    deadline_seconds = received_seconds + worker.settings.request_seconds
    picture = _decoded(content, deadline_seconds)
    decoded_seconds = time.monotonic()
    begin_seconds, end_seconds, batch_images, values = _ask(
        b"p", deadline_seconds - decoded_seconds, picture=picture
    )
    total, decode, queue, gpu = seconds = (
        time.monotonic() - received_seconds,
        decoded_seconds - received_seconds,
        begin_seconds - decoded_seconds,
        end_seconds - begin_seconds,
    )
    g.figures = (1, *seconds)
    half = len(values) // 2
    top = zip(map(int, values[half:]), values[:half], strict=True)
    return {
        "predictions": [
            {
                "rank": rank,
                "class_id": number,
                "class_name": _class_name(number),
                "probability": round(probability, 6),
            }
            for rank, (number, probability) in enumerate(top, start=1)
        ],
        "latency_ms": round(total * 1e3, 3),
        "decode_ms": round(decode * 1e3, 3),
        "queue_ms": round(queue * 1e3, 3),
        "gpu_ms": round(gpu * 1e3, 3),
        "batch_size": batch_images,
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
    for first in range(0, size, max_batch):
        left_seconds = deadline_seconds - time.monotonic()
        if left_seconds <= 0:
            raise Refusal(503, f"not done within {worker.settings.request_seconds:g} s")
        if _client_has_left():
            raise Refusal(499, "the client has left")
        images = COUNT.pack(min(max_batch, size - first))
        begin_seconds, end_seconds, *_ = _ask(b"s", left_seconds, images)
        gpu_seconds += end_seconds - begin_seconds
    seconds = time.monotonic() - received_seconds
    g.figures = (size, seconds, math.nan, math.nan, gpu_seconds)
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
    """Have an inference request counted, whatever was answered; the answer comes now."""
    endpoint = request.path[1:]
    if endpoint in ENDPOINTS and request.method == "POST":
        images, *seconds = g.get("figures", NO_FIGURES)
        which, start_seconds = ENDPOINTS.index(endpoint), time.monotonic() - seconds[0]
        record = (which, response.status_code, images, start_seconds, *seconds)
        worker.record(RECORD.pack(*record))
    # A body that nobody asked for may have no end, and skipping it would be work without one.
    has_body = request.content_length or request.environ.get("HTTP_TRANSFER_ENCODING")
    if has_body and not g.get("is_read"):
        worker.close_after(response)
    worker.hold_packets(request.environ["gunicorn.socket"], True)
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
    return app.make_response(({"error": message}, status, headers))


@cache
def _model() -> dict:
    """Return model and weights, as said in every answer; they are known once one succeeded."""
    facts = json.loads(_question("health"))
    return {name: facts[name] for name in ("model", "weights")}


@cache
def _class_name(number: int) -> str:
    return _question(f"name {number}").decode()


def _body(limit: int) -> bytes:
    """Read the whole body, within bounds of size, time and memory."""
    too_large = Refusal(413, f"request entity too large: at most {limit} bytes are accepted")
    if (request.content_length or 0) > limit:
        raise too_large
    seconds = worker.settings.request_seconds
    pieces, length, fault = [], 0, None
    piece_bytes = CHUNKED_PIECE_BYTES if request.content_length is None else PIECE_BYTES
    with worker.waiting_for_client(seconds) as wait:
        try:
            while piece := request.environ["wsgi.input"].read(piece_bytes):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise too_large
                if len(pieces) > 1:
                    _hold(len(piece))
                    gevent.sleep(YIELD_SECONDS)  # who sends as fast as we read would go on for ever
            if request.content_length not in (None, length):
                fault = CUT_OFF
        except ParseException as error:
            fault = f"damaged request: {error}"
        except (NoMoreData, OSError) as error:
            wait.is_cut |= isinstance(error, TimeoutError)
            fault = CUT_OFF
    if fault and wait.is_cut:
        raise Refusal(408, f"the request did not arrive within {seconds:g} s")
    if fault:
        raise Refusal(400, fault)
    g.is_read = True
    return b"".join(pieces)


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
            # Werkzeug's parser takes 0.8 ms for a JPEG of 30 KB, this one 0.06. Any bytes are
            # latin-1: a file's name may be what the client's system took for one.
            parts += multipart.MultipartParser(
                io.BytesIO(body), boundary, len(body), "latin-1",
                part_limit=MAX_FORM_PARTS, spool_limit=limit, memory_limit=limit,
            )  # fmt: skip
    except multipart.MultipartError as error:
        raise Refusal(400, f"the multipart form is cut off or damaged ({error})") from error
    images = [part for part in parts if part.name == "image" and part.filename is not None]
    if len(images) > 1:
        raise Refusal(400, f"{len(images)} fields named 'image': send one image a request")
    if not images:
        names = ", ".join(repr(part.name[:40]) for part in parts[:5]) or "none"
        raise Refusal(400, f"no file with a name in field 'image' (fields found: {names})")
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


def _decoded(content: bytes, deadline_seconds: float) -> bytes:
    """Decode a picture: here, or on a thread next to the other requests if it takes long."""
    # Whatever is in the file, it is bounded what a picture takes of the processor.
    signal.setitimer(signal.ITIMER_PROF, MAX_DECODE_CPU_SECONDS)
    worker.memory[-1] = 1  # for the engine: a picture is on its way
    try:
        image = open_upload(content, worker.settings.max_pixels)
        # What libtiff does with a hostile file in one call, nothing in this thread can end.
        if image.width * image.height <= LARGE_IMAGE_PIXELS and image.format != "TIFF":
            return small_picture(image)
    finally:
        worker.memory[-1] = 0
        signal.setitimer(signal.ITIMER_PROF, 0)
    refusal = Refusal(503, "the picture could not be decoded in time; try again later")
    with gevent.Timeout(deadline_seconds - time.monotonic(), refusal), worker.large_pictures:
        try:
            return gevent.get_hub().threadpool.apply(small_picture, (image,))
        except Refusal:
            # Nothing ends a thread but the end of its process.
            worker.is_stuck = True
            raise


def _decoding_takes_too_long(number: int, frame: object) -> None:
    raise ImageRejected("the picture takes too long to decode", status=413)
