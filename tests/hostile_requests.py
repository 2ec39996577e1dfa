"""What nobody should send to the inference server: odd pictures, what is none, and broken HTTP.

The statuses are those of a server started with ``LIMITS``. ``None`` stands for a connection closed
without an answer, which will do below HTTP.
"""

from __future__ import annotations

import io
import socket
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image
from server_process import jpeg
from urllib3 import encode_multipart_formdata

MAX_BODY_BYTES, MAX_PIXELS = 1 << 20, 1_000_000
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
LIMITS = ("--max-body-mib", "1", "--max-pixels", str(MAX_PIXELS), "--max-batch-predict", "8")
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
# What the lying files say they have of both; NOISE has 64 and 48.
CLAIMED = 16_000
# Longer than any answer of a server that is well; whoever waits so long has found one stuck.
PATIENCE_SECONDS = 60.0


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


def damaged_tiff(compression: str) -> bytes:
    """Return a file whose header is right and whose compressed rows are not."""
    content = bytearray(encoded("TIFF", compression=compression))
    for position in range(100, 9000, 37):
        content[position] ^= 0x5A
    return bytes(content)


def png_of(width: int, height: int, chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + chunks + png_chunk(b"IEND")


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_bomb(width: int, height: int) -> bytes:
    """A PNG file of a few kilobytes that says it has that many pixels, and has them."""
    rows = zlib.compress(b"\0" * min(height * (width + 1), 1 << 24), 9)
    return png_of(width, height, png_chunk(b"IDAT", rows))


def lying(kind: str) -> bytes:
    """Return a whole file of ``NOISE`` whose header claims ``CLAIMED`` x ``CLAIMED`` pixels."""
    little, big = struct.pack("<HH", CLAIMED, CLAIMED), struct.pack(">HH", CLAIMED, CLAIMED)
    words = struct.pack("<II", CLAIMED, CLAIMED)
    entries = [struct.pack("<HHIHH", tag, 4, 1, size, 0) for tag, size in ((256, 64), (257, 48))]
    frame = struct.pack("<BHHHH", 0x2C, 0, 0, 64, 48)
    changes = {  # what to look for, how far behind its beginning to write, and what
        "GIF": [(b"GIF", 6, little), (frame, 5, little)],  # the screen, and the frame
        "JPEG": [(b"\xff\xc0", 5, big)],
        "WEBP": [(b"\x9d\x01\x2a", 3, little)],
        "BMP": [(b"BM", 18, words)],
        "TIFF": [(entry, 8, words[:4]) for entry in entries],
        "PNG": [],
    }
    content = bytearray(encoded(kind))
    for marker, offset, claim in changes[kind]:
        place = content.index(marker) + offset
        content[place : place + len(claim)] = claim
    return _claiming(content, CLAIMED, CLAIMED) if kind == "PNG" else bytes(content)


def lying_animation() -> bytes:
    """Return a WebP animation of one small frame on a canvas that claims far more pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    frame = bytes(6) + three(63) + three(47) + bytes(4) + encoded("WEBP")[12:]
    canvas = b"\x02" + bytes(3) + three(CLAIMED - 1) * 2
    chunks = chunk(b"VP8X", canvas) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame)
    return chunk(b"RIFF", b"WEBP" + chunks)


def _claiming(png: bytes, width: int, height: int) -> bytes:
    """Return the PNG file with another size in its header, all its checksums right."""
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])


ODD_PICTURES = {
    "cmyk": encoded("JPEG", "CMYK"),
    "palette": encoded("PNG", "P"),
    "transparent": encoded("PNG", "RGBA"),
    "black and white": encoded("PNG", "1"),
    "16 bit": encoded("PNG", "as it is", NOISE[..., 0].astype(np.uint16) * 257),
    "float": encoded("TIFF", "F"),
    "rotated by EXIF": rotated(),
    "animated": animation(),
    "1x1": encoded("PNG", array=NOISE[:1, :1]),
    "of the most pixels": encoded("PNG", array=np.zeros((1000, 1000, 3), np.uint8)),
    "20000x1": encoded("PNG", array=np.zeros((1, 20000, 3), np.uint8)),
    "1x20000": encoded("PNG", array=np.zeros((20000, 1, 3), np.uint8)),
    # As browsers show it: the rows that are there, and black.
    "missing rows": _claiming(encoded("PNG"), 64, 480),
    **{f"right {kind}": encoded(kind) for kind in FORMATS},
}
NO_PICTURES = {
    "empty": (b"", 400),
    "one byte": (b"\xff", 400),
    "text": (b"<svg onload=alert(1)>", 400),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage", 400),
    "zeros": (b"\0" * 100_000, 400),
    "bomb": (png_bomb(100_000, 100_000), 413),
    "flat bomb": (png_bomb(4_000_000, 1), 413),
    "0x0": (encoded("PNG").replace(struct.pack(">II", 64, 48), b"\0\0\0\0" * 2), 400),
    "lying animation": (lying_animation(), 413),
    **{f"lying {kind}": (lying(kind), 413) for kind in FORMATS},
    "too long": (jpeg() * 200, 413),
    "damaged LZW": (damaged_tiff("tiff_lzw"), 400),
    "damaged ZIP": (damaged_tiff("tiff_deflate"), 400),
    **{f"a quarter of a {kind}": (encoded(kind)[: len(encoded(kind)) // 4], 400)
       for kind in FORMATS},
    **{f"half a {kind}": (encoded(kind)[: len(encoded(kind)) // 2], 400) for kind in FORMATS},
    **{f"head of a {kind}": (encoded(kind)[:12], 400) for kind in FORMATS},
}  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """One connection to the server and what is sent over it."""

    name: str
    pieces: tuple[bytes, ...]
    statuses: frozenset[int | None]  # the answers that are right, of a server that is not full
    says: str = ""  # what a refusal has to name
    pause_seconds: float = 0.0  # before each further piece: a slow sender
    half_closes: bool = False  # the sending side is closed after the last piece
    leaves: bool = False  # the connection is cut after the last piece, without reading

    def carry_out(
        self, port: int, on_connected: Callable[[], None] = lambda: None
    ) -> tuple[int | None, bytes]:
        """Return status and body of the answer; None and nothing where there was none.

        Raises `TimeoutError` where the server neither answers nor closes the connection.
        """
        with socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as connection:
            on_connected()
            # The server may have closed it before all is sent; its answer can still be read.
            with suppress(ConnectionError):
                for index, piece in enumerate(self.pieces):
                    time.sleep(self.pause_seconds if index else 0.0)
                    connection.sendall(piece)
                if self.half_closes:
                    connection.shutdown(socket.SHUT_WR)
            head, _, body = (b"" if self.leaves else read_all(connection)).partition(b"\r\n\r\n")
            return (int(head.split()[1]) if head else None), body


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    answer = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def post(path: str, body: bytes, content_type: str = "application/octet-stream") -> bytes:
    """Return a right request with that body, after whose answer the connection is closed."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def form(**fields: bytes) -> bytes:
    """Return an upload of files under these names."""
    body, content_type = encode_multipart_formdata(
        {name: ("../../a.jpg", content) for name, content in fields.items()}
    )
    return post("/predict", body, content_type)


def _attack(
    name: str, pieces: bytes | tuple[bytes, ...], *statuses: int | None, **more: object
) -> Attack:
    pieces = (pieces,) if isinstance(pieces, bytes) else pieces
    return Attack(name, pieces, frozenset(statuses), **more)


def picture_attacks() -> list[Attack]:
    """Every picture and what is none, as the bare file and in a form."""
    expected = [(name, content, 200) for name, content in ODD_PICTURES.items()]
    expected += [(name, content, status) for name, (content, status) in NO_PICTURES.items()]
    attacks = []
    for name, content, status in expected:
        # Whoever sends too much may find the connection closed before the end.
        statuses = (status, None) if len(content) > MAX_BODY_BYTES else (status,)
        # Whoever is told the size it claims was read no further than the header.
        says = "pixels" if name.startswith("lying") else ""
        attacks.append(_attack(f"{name}, raw", post("/predict", content), *statuses, says=says))
        attacks.append(_attack(f"{name}, form", form(image=content), *statuses, says=says))
    return attacks


def http_attacks() -> list[Attack]:
    """Wrong paths, methods, headers, bodies, and connections that break off."""
    picture = jpeg()
    good = post("/predict", picture)
    part = len(good) // 2
    sizes = ("0", "-1", "9", "1e9", "1000000000", "NaN", "1.5", "true", "null", '"8"', "[8]", "{}")
    bodies = [(f'{{"batch_size": {size}}}', "a whole number from 1 to 8") for size in sizes]
    broken = ("{", '{"batch_size": ', "[" * 1000, "\0", "\xff\xfe")
    bodies += [(text, "not valid JSON") for text in broken]
    bodies += [(text, "JSON object") for text in ("[]", "7", '"batch_size"')]
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    chunked = b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [
        *[_attack("unknown path", request_line("GET", path), 404)
          for path in ("/nowhere", "/../etc/passwd", "/%00", "/predict/x")],
        _attack("wrong method", request_line("GET", "/predict"), 405),
        _attack("unknown method", request_line("BREW", "/health"), 405),
        *[_attack("bad JSON", json_post(body), 400, says=says) for body, says in bodies],
        _attack("wrong field", form(picture=jpeg()), 400, says="fields found: 'picture'"),
        _attack("the field twice", post("/predict", *encode_multipart_formdata(
            [("image", ("a.jpg", picture)), ("image", ("b.jpg", picture))])), 400,
            says="2 fields named 'image'"),
        _attack("JSON for a picture", post("/predict", b"{}", "application/json"), 400,
                says="not one of"),
        _attack("batch of no type", post("/batch_predict", b'{"batch_size": 3}'), 415,
                says="application/json"),
        _attack("long batch request", json_post('{"batch_size": 3, "x": "%s"}' % ("y" * 1024)),
                413, says="1024 bytes"),
        _attack("several fields", form(image=jpeg(), photo=jpeg(1)), 200),
        _attack("file name in latin-1", form(image=picture).replace(b"/a.jpg", b"/\xe9.jpg"), 200),
        _attack("form without boundary", post("/predict", jpeg(), "multipart/form-data"), 400,
                says="no file"),
        _attack("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        _attack("huge header", b"GET /health HTTP/1.1\r\nX: " + b"x" * 60_000 + b"\r\n\r\n", 431),
        _attack("huge request line", b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n", 414),
        _attack("no version", b"BREW\r\n\r\n", 400),
        _attack("unknown encoding", b"POST /predict HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
                400),
        _attack("half a request line, half closed", b"GET /he", None, half_closes=True),
        _attack("bad length", b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        _attack("two lengths", b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        _attack("bad chunk", chunked + b"ZZ\r\n", 400),
        _attack("chunked upload", chunked.replace(b"HTTP/1.1", b"HTTP/1.1\r\nConnection: close")
                + b"%x\r\n%b\r\n0\r\n\r\n" % (len(picture), picture), 200),
        # Not taken up: the one answer speaks HTTP/1.1.
        _attack("offer of HTTP/2", good.replace(
            b"Connection: close", b"Connection: Upgrade, HTTP2-Settings, close\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk"), 200, half_closes=True),
        _attack("endless body", (chunked, *[chunk] * 60), 413, None),
        _attack("truncated body, half closed", good[:part], 400, half_closes=True),
        _attack("whole body, half closed", good, 200, half_closes=True),
        _attack("truncated body, gone", good[:part], None, leaves=True),
        _attack("whole body, gone", good, None, leaves=True),
        _attack("nothing, half closed", b"", None, half_closes=True),
        _attack("requests ahead", b"GET /health HTTP/1.1\r\n\r\n" * 50
                + request_line("GET", "/health"), 200),
    ]  # fmt: skip


def slow_attacks(seconds: float) -> list[Attack]:
    """Senders that take ``seconds``, longer than the server waits, or say nothing at all."""
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    drops = int(seconds)
    # Who sends on after the answer may find the connection cut before it looks.
    late = (408, None)
    return [
        _attack("dripping body", (head, *[b"x"] * drops), *late, pause_seconds=1.0),
        _attack("dripping header", (b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * drops), *late,
                pause_seconds=1.0),
        _attack("silence", b"", None),
    ]  # fmt: skip


def json_post(text: str) -> bytes:
    """Return a request for a batch with that body."""
    return post("/batch_predict", text.encode("latin-1"), "application/json")


def request_line(method: str, path: str) -> bytes:
    """Return a request without a body."""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
