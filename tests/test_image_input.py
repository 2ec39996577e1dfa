"""Decoding of uploaded pictures to the right pixels; what is refused: hostile_requests.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from workloads.inference.image_input import (
    FORMATS,
    ImageRejected,
    open_image,
    open_upload,
    small_picture,
    to_rgb,
)

MAX_PIXELS = 1_000_000
NOISE = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)


def decoded(content: bytes) -> np.ndarray:
    picture = small_picture(open_upload(content, MAX_PIXELS))
    return np.frombuffer(picture, np.uint8).reshape(224, 224, 3)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*(("RGB", kind) for kind in FORMATS), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"),
     ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("F", "TIFF"), ("LAB", "TIFF")],
)  # fmt: skip
def test_every_format_and_color_mode_keeps_its_brightness(mode, kind):
    pixels = decoded(encoded(Image.fromarray(NOISE).convert(mode), kind))
    assert abs(pixels.mean() - NOISE.mean()) < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    pixels = decoded(encoded(np.full((30, 30), 0x4000, dtype=np.uint16), kind))
    assert pixels.min() == pixels.max() == 0x40


def test_a_picture_of_the_right_size_is_left_as_it_is_and_exif_rotation_is_applied():
    noise = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert np.array_equal(decoded(encoded(noise, "PNG")), noise)
    picture = np.zeros((100, 100, 3), dtype=np.uint8)
    picture[:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: what was above is on the right
    pixels = decoded(encoded(picture, "JPEG", exif=exif))
    assert pixels[:, 200].mean() > 250 and pixels[:, 20].mean() < 5


def test_a_large_jpeg_decodes_small_and_another_large_picture_does_not():
    large = Image.new("RGB", (2100, 2100))
    assert open_upload(encoded(large, "PNG"), 10_000_000).size == (2100, 2100)
    assert max(open_upload(encoded(large, "JPEG"), 10_000_000).size) < 600
    # Its scans are decoded at full size, whatever is asked for.
    assert open_upload(encoded(large, "JPEG", progressive=True), 10_000_000).size == (2100, 2100)


def test_a_file_on_disk_is_read_at_its_own_size_and_not_in_a_programmable_format(tmp_path):
    ramp = np.tile(np.linspace(0, 0xFFFF, 40).astype(np.uint16), (30, 1))
    path = tmp_path / "a.png"
    for kind in ("PNG", "TIFF"):
        path.write_bytes(encoded(ramp, kind))
        image = to_rgb(open_image(path))
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert abs(np.asarray(image).mean() - 127) < 1
    path.write_bytes(encoded(NOISE, "EPS"))
    with pytest.raises(ImageRejected, match="not one of JPEG"):
        open_image(path)
