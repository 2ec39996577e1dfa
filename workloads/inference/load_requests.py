"""The requests of the load test: pictures, encoded once, and the bytes that carry them."""

from __future__ import annotations

import io
from urllib.parse import urlsplit

from workloads.inference.api_key import header

IMAGE_SIZE = 224


def encode_images(count: int, seed: int) -> list[bytes]:
    """Return ``count`` JPEG files of random 224x224 RGB noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def encode_requests(
    url: str, images: list[bytes], upload: str, api_key: str | None = None
) -> list[bytes]:
    """Return a POST of each image to ``url`` as it goes over the wire.

    Args:
        url: Where the images go.
        images: JPEG files.
        upload: ``multipart`` (field ``image``, as ``curl -F``) or ``raw`` (the JPEG as the body).
        api_key: The server's key, if it wants one.
    """
    return [_post(url, *_body(image, upload), header(api_key)) for image in images]


def _body(image: bytes, upload: str) -> tuple[bytes, str]:
    if upload == "raw":
        return image, "image/jpeg"
    import urllib3

    return urllib3.encode_multipart_formdata({"image": ("image.jpg", image, "image/jpeg")})


def _post(url: str, body: bytes, content_type: str, more_headers: str) -> bytes:
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: gpu-sharing-bench\r\n"
        f"Accept: application/json\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{more_headers}\r\n"
    )
    return head.encode("ascii") + body
