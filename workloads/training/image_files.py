"""Image files of a dataset: one that cannot be decoded ends the run, named with its path.

None is skipped: a run on fewer images than it says would be another measurement.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workloads.common.errors import UnreadableImageError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_rgb(path: Path) -> Image:
    """Return the decoded image in RGB.

    Raises:
        UnreadableImageError: The file is no image, cut off, or cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    # Decoders raise what they like: OSError, ValueError, SyntaxError, struct.error, bombs.
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnreadableImageError:
    """Return the error for an image that raised ``error``."""
    why = getattr(error, "strerror", None) or str(error).removesuffix(f" {str(path)!r}")
    return UnreadableImageError(
        f"{path} cannot be read as an image ({why}); remove or replace it, none is skipped"
    )
