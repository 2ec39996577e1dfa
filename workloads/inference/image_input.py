"""Turns the bytes that a client sent into one small RGB array, whatever these bytes are.

The bytes come from the network, so nothing in them is believed: the format list is closed, the
pixel count is checked before anything is decoded, and large pictures can be told from their header.
The picture is cropped to its central square and resized to 224x224, the usual way of ImageNet
classifiers without their last few percent of border.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, _imaging

IMAGE_SIZE = 224
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # without a list, EPS calls Ghostscript
EXIF_ORIENTATION = 0x0112
EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A decoded picture takes up to 8 bytes a pixel for a moment, and seconds where it is huge.
LARGE_IMAGE_PIXELS = 4_000_000

# The pixel limit is ours and is checked after the header is read; Pillow's own only warns at
# this size and raises at twice as much.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns about oddities of damaged files, each with other numbers: a log that anyone can fill.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _silence_libtiff() -> None:
    """Keep libtiff from writing to standard error, past Python, what it finds in damaged files.

    Pillow has no switch for it, but the library that it is linked with has one. Where that cannot
    be reached (linked in statically, or built without TIFF), the lines stay.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


_silence_libtiff()


class ImageRejected(Exception):
    """The bytes are no picture that is served here.

    Attributes:
        status: The HTTP status to answer with.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        """Keep what is wrong, as one sentence for the client."""
        super().__init__(message)
        self.status = status


def open_image(content: bytes, max_pixels: int) -> Image.Image:
    """Read the header of the picture in ``content``; nothing is decoded yet.

    Args:
        content: A whole image file.
        max_pixels: The most pixels (width x height) that are accepted.

    Raises:
        ImageRejected: Not an image of a known format, damaged, or larger than ``max_pixels``.
    """
    if not content:
        raise ImageRejected("the image is empty; send the bytes of a JPEG or PNG file")
    image = _guarded(lambda: Image.open(io.BytesIO(content), formats=FORMATS))
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected(
            f"the image has {width}x{height} pixels; at most {max_pixels} are accepted", status=413
        )
    # JPEG can decode at 1/2, 1/4 or 1/8 of its size, which is what makes phone pictures cheap.
    _guarded(lambda: image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE)))
    return image


def is_large(image: Image.Image) -> bool:
    """Return whether decoding an opened picture takes so much memory that few may do it at once."""
    return image.width * image.height > LARGE_IMAGE_PIXELS


def small_array(image: Image.Image) -> np.ndarray:
    """Decode an opened picture; return it as uint8 of shape (224, 224, 3), RGB.

    Animated pictures give their first frame; EXIF rotation is applied; transparency is dropped;
    16-bit and floating-point grey values are brought to 8 bits.

    Raises:
        ImageRejected: The picture is damaged.
    """
    return _guarded(lambda: _small_rgb(image))


def _guarded(read: Callable):
    """Run one step of decoding; whatever it raises means that the bytes are bad."""
    try:
        return read()
    # Fed with arbitrary bytes Pillow raises far more than its documented errors (struct.error,
    # IndexError, SyntaxError, zlib.error ...), and each of them is the sender's fault.
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not one of {', '.join(FORMATS)}"
        raise ImageRejected(f"cannot decode the image: {reason}") from error


def _small_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    orientation = _orientation(image)
    if image.mode not in ("RGB", "L", "P", "RGBA", "CMYK", "YCbCr"):
        image = _to_8_bit(image)
    # A copy of a small picture costs a sixth of decoding it, and convert and fit copy always.
    small = image if image.mode == "RGB" else image.convert("RGB")
    if small.size != (IMAGE_SIZE, IMAGE_SIZE):
        # Cropping to the central square before resizing keeps a 20000x1 picture cheap, and
        # rotating the small result is the same as rotating the large original.
        small = ImageOps.fit(small, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    if orientation in EXIF_TRANSPOSITIONS:
        small = small.transpose(EXIF_TRANSPOSITIONS[orientation])
    return np.asarray(small, dtype=np.uint8)


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation; None where there is none that can be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    # Damaged EXIF data raise anything; the picture itself is still good.
    except Exception:
        return None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a picture of 16 or 32 bits a value to 8 bits; leave the other modes to Pillow."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "I":
        values = np.clip(np.asarray(image), 0, 0xFFFF)
        return Image.fromarray((values >> (8 if values.max() > 0xFF else 0)).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else values * 0
        return Image.fromarray(scaled.astype(np.uint8))
    return image
