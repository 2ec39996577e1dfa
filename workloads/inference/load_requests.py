"""What a load test sends, and when in an open loop it intends to."""

from __future__ import annotations

import io
import math
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IMAGE_SIZE = 224


def encode_images(count: int, seed: int) -> list[bytes]:
    """Return ``count`` JPEG files of random 224x224 RGB noise."""
    import numpy as np
    from PIL import Image

    files = [io.BytesIO() for _ in range(count)]
    shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for file, pixels in zip(files, noise, strict=True):
        Image.fromarray(pixels).save(file, "JPEG")
    return [file.getvalue() for file in files]


def encode_bodies(images: list[bytes], upload: str) -> tuple[list[bytes], str]:
    """Return a request body for each JPEG, and their content type.

    ``upload`` is ``multipart`` (field ``image``, as ``curl -F``) or ``raw`` (the JPEG itself).
    """
    if upload == "raw":
        return images, "image/jpeg"
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    return [head + image + tail for image in images], f"multipart/form-data; boundary={boundary}"


def arrival_offsets(rate: float, arrival: str, duration_seconds: float, seed: int) -> np.ndarray:
    """Return when an open loop intends to send; drawn up front, so that no answer can delay it.

    ``rate`` is in requests a second; ``arrival`` is ``constant`` (request i at i / rate) or
    ``poisson`` (given how many arrive, each does so at any time alike; gaps are exponential).

    Returns:
        Ascending float64 seconds after the start, below ``duration_seconds``, possibly none.
    """
    import numpy as np

    if arrival == "constant":
        # 0.3 s at 10 a second are three requests, whichever way the product was rounded.
        return np.arange(math.ceil(round(rate * duration_seconds, 9))) / rate
    random = np.random.default_rng(seed)
    count = random.poisson(rate * duration_seconds)
    return np.sort(random.uniform(0.0, duration_seconds, count))
