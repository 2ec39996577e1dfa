"""Hostile requests over real sockets: a 4xx that says why, or an answer; nobody else is hurt."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from server_process import ServerProcess, jpeg, running
from urllib3 import encode_multipart_formdata

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(
        tmp_path_factory.mktemp("hostile"), "--max-body-mib", "1", "--max-pixels", "1000000",
        "--max-batch-predict", "8",
    ) as process:  # fmt: skip
        yield process


def encoded(kind: str, mode: str = "RGB", array: np.ndarray = NOISE, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode == "as it is" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def animation() -> bytes:
    frames = [Image.fromarray(np.roll(NOISE, 5 * shift, axis=0)) for shift in range(6)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG file of a few kilobytes that says it has that many pixels, and has them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * min(height * (width + 1), 1 << 24), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))  # fmt: skip


GOOD = {
    "cmyk": encoded("JPEG", "CMYK"),
    "palette": encoded("PNG", "P"),
    "transparent": encoded("PNG", "RGBA"),
    "black and white": encoded("PNG", "1"),
    "16 bit": encoded("PNG", "as it is", NOISE[..., 0].astype(np.uint16) * 257),
    "float": encoded("TIFF", "F"),
    "rotated by EXIF": rotated(),
    "animated": animation(),
    "1x1": encoded("PNG", array=NOISE[:1, :1]),
    "20000x1": encoded("PNG", array=np.zeros((1, 20000, 3), np.uint8)),
    "1x20000": encoded("PNG", array=np.zeros((20000, 1, 3), np.uint8)),
    **{f"right {kind}": encoded(kind) for kind in FORMATS},
}
BAD = {
    "empty": (b"", 400),
    "one byte": (b"\xff", 400),
    "text": (b"<svg onload=alert(1)>", 400),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage", 400),
    "zeros": (b"\0" * 100_000, 400),
    "bomb": (png_bomb(100_000, 100_000), 413),
    "flat bomb": (png_bomb(4_000_000, 1), 413),
    "lying size": (encoded("PNG").replace(struct.pack(">II", 64, 48), b"\0\0\0\0" * 2), 400),
    "too long": (jpeg() * 200, 413),
    **{f"half a {kind}": (encoded(kind)[: len(encoded(kind)) // 4], 400)
       for kind in ("PNG", "WEBP", "TIFF")},
    **{f"head of a {kind}": (encoded(kind)[:12], 400) for kind in FORMATS},
}  # fmt: skip


@pytest.mark.parametrize("way", ["raw", "form"])
@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_answered(server: ServerProcess, name: str, way: str) -> None:
    answer = post(server, GOOD[name], way)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["predictions"]) == 5


@pytest.mark.parametrize("way", ["raw", "form"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_with_a_reason(
    server: ServerProcess, name: str, way: str
) -> None:
    content, status = BAD[name]
    answer = post(server, content, way)
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]
    assert 10 < len(said) < 400
    assert "Traceback" not in said


def post(server: ServerProcess, content: bytes, way: str) -> requests.Response:
    url = f"{server.url}/predict"
    if way == "raw":
        return requests.post(url, data=content, timeout=20)
    body, content_type = encode_multipart_formdata({"image": ("../../a.jpg", content)})
    return requests.post(url, data=body, headers={"Content-Type": content_type}, timeout=20)


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_under_fire_others_are_served_and_nothing_piles_up(server: ServerProcess) -> None:
    """All of it again and again from four sides, beside one client whose requests are right."""
    everything = [*GOOD.values(), *(content for content, _ in BAD.values())]
    over = threading.Event()
    statuses: set[int] = set()

    def fire(start: int) -> None:
        with requests.Session() as session:
            for index in range(start, 10**9):
                if over.is_set():
                    return
                content = everything[index % len(everything)]
                try:
                    answer = session.post(f"{server.url}/predict", data=content, timeout=20)
                except requests.ConnectionError:
                    continue  # a body that is too long may be cut off
                statuses.add(answer.status_code)

    def volley(seconds: float) -> list[float]:
        latencies, good = [], jpeg()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            answer = server.predict(good)
            assert answer.status_code == 200, answer.text
            latencies.append(time.monotonic() - begin)
        return latencies

    shooters = [threading.Thread(target=fire, args=(7 * n,), daemon=True) for n in range(4)]
    for shooter in shooters:
        shooter.start()
    try:
        volley(3.0)  # buffers and caches grow at first
        memory_before, threads_before = (
            resident_mib(server.process.pid),
            threads_of(server.process.pid),
        )
        served = volley(5.0)
        memory_after, threads_after = (
            resident_mib(server.process.pid),
            threads_of(server.process.pid),
        )
    finally:
        over.set()
    for shooter in shooters:
        shooter.join(30)
    assert len(served) > 5
    assert max(served) < 5
    assert statuses <= {200, 400, 413, 503}
    assert {200, 400, 413} <= statuses
    assert memory_after < 1.15 * memory_before
    assert threads_after <= threads_before + 1
    assert "Traceback" not in server.log.read_text()
