"""The one reader of image files: uploads to the server, and the folders that a training reads.

The bytes may come from the network, so nothing in them is believed: the list of formats is closed,
and what decoding will cost is bounded before it begins, by the pixels that the header claims and,
since a progressive JPEG can repeat its whole picture, by the number of scans.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, _imaging

IMAGE_SIZE = 224
PICTURE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # without a list, EPS calls Ghostscript
# Encoders write about ten. Each costs a pass over all pixels: 1.4 ms at 1999x1999, and a file of a
# megabyte can hold tens of thousands.
MAX_SCANS = 100
START_OF_SCAN = b"\xff\xda"
# Decoding more pixels takes long enough for a server to do it next to its other requests.
LARGE_IMAGE_PIXELS = 4_000_000
TIFF_LENGTHS = 279, 325  # of each strip, of each tile: TIFF 6.0
EXIF_ORIENTATION = 0x0112
MAX_EXIF_BYTES = 1 << 16
EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Own data may have any size. A server sets Pillow's limit too (``web_app.begin``), since a GIF's
# frame, unlike its screen, can be looked at nowhere else before its memory is taken.
Image.MAX_IMAGE_PIXELS = None
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Pillow warns about oddities of damaged files, each with other numbers: a log that anyone can fill.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


# libtiff writes what it finds in damaged files to standard error, past Python; Pillow has no switch
# for it, but the library has one, unless it is linked in statically or left out.
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


class ImageRejected(Exception):
    """No picture that is read here: one sentence for its sender, the HTTP status of an upload."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def open_image(source: bytes | Path, max_pixels: int | None = None) -> Image.Image:
    """Read the header of an image file, whole or by its path; nothing is decoded yet.

    More than ``max_pixels`` (width x height) are refused.

    Raises:
        ImageRejected: Not an image of a known format, damaged, unreadable, or it would cost too
            much to decode.
    """
    if not source:
        raise ImageRejected("the image is empty; send the bytes of a JPEG or PNG file")
    with _bad_bytes_rejected():
        file = source if isinstance(source, Path) else io.BytesIO(source)
        image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ImageRejected(
            f"the image has {width}x{height} pixels; at most {max_pixels} are accepted", status=413
        )
    # A file of one's own may take as long as it likes.
    if isinstance(source, bytes):
        _require_little_work(image, source)
    return image


def _require_little_work(image: Image.Image, content: bytes) -> None:
    """Refuse what makes a decoder read the same bytes again and again."""
    # In compressed data 0xFF is always followed by 0, so these two bytes are a marker.
    scans = content.count(START_OF_SCAN) if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_SCANS:
        raise ImageRejected(
            f"the JPEG has {scans} scans; at most {MAX_SCANS} are accepted", status=413
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with _bad_bytes_rejected():
            claimed_bytes = sum(sum(image.tag_v2.get(tag, ())) for tag in TIFF_LENGTHS)
        if claimed_bytes > len(content):
            raise ImageRejected("the TIFF is damaged: its strips are longer than its file")


def open_upload(content: bytes, max_pixels: int) -> Image.Image:
    """Read the header of a picture that will be classified, as ``open_image`` does.

    JPEG can decode at 1/2, 1/4 or 1/8 of its size, which makes phone pictures cheap; the size of
    the returned picture is the one that will be decoded.
    """
    image = open_image(content, max_pixels)
    # Each scan of a progressive one is a pass over all of it, at whatever size it is decoded.
    if not (image.info.get("progressive") and image.width * image.height > LARGE_IMAGE_PIXELS):
        with _bad_bytes_rejected():
            image.draft("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened picture to 8-bit RGB of its own size.

    Animated pictures give their first frame; EXIF rotation is applied; transparency is dropped;
    16-bit and floating-point gray values are scaled to 8 bits.

    Raises:
        ImageRejected: The picture is damaged.
    """
    with _bad_bytes_rejected():
        return _turned(_rgb(image), image)


def small_picture(image: Image.Image) -> bytes:
    """Decode an opened upload for a classifier: its central square, scaled to 224x224.

    The usual way of ImageNet classifiers, without their last few percent of border.

    Returns:
        uint8 of shape (224, 224, 3), RGB, as bytes.

    Raises:
        ImageRejected: The picture is damaged.
    """
    with _bad_bytes_rejected():
        small = _rgb(image)
        if small.size != (IMAGE_SIZE, IMAGE_SIZE):
            # Cropping to the central square before resizing keeps a 20000x1 picture cheap, and
            # rotating the small result is the same as rotating the large original.
            small = ImageOps.fit(small, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        return _turned(small, image).tobytes()


@contextlib.contextmanager
def _bad_bytes_rejected() -> Iterator[None]:
    """Whatever a step of decoding raises means that the bytes are bad."""
    reason = f"not one of {', '.join(FORMATS)}"
    try:
        yield
    except (MemoryError, ImageRejected):
        raise
    except Image.DecompressionBombError as error:
        raise ImageRejected(f"too many pixels: {error}", status=413) from error
    # Fed with arbitrary bytes Pillow raises far more than its documented errors (struct.error,
    # IndexError, SyntaxError, zlib.error ...), and each of them is the sender's fault.
    except Exception as error:
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = str(error) or type(error).__name__
        raise ImageRejected(f"cannot decode the image: {reason}") from error


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode not in ("RGB", "L", "P", "RGBA", "CMYK", "YCbCr"):
        image = _to_8_bit(image)
    # A copy of a small picture costs a sixth of decoding it, and convert copies always.
    return image if image.mode == "RGB" else image.convert("RGB")


def _turned(image: Image.Image, original: Image.Image) -> Image.Image:
    """Rotate ``image`` as the EXIF data of ``original`` say, where they can be read."""
    # Longer ones fit no JPEG; Pillow before 13 copies what each of their entries claims.
    if len(original.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return image
    try:
        transposition = EXIF_TRANSPOSITIONS.get(original.getexif().get(EXIF_ORIENTATION, 1))
    except ImageRejected:
        raise
    # Damaged EXIF data raise anything; the picture itself is still good.
    except Exception:
        return image
    return image if transposition is None else image.transpose(transposition)


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
