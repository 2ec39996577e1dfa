"""Feeds the server's image path with mutated files, guided by the code that they reach (Atheris).

    python3 tests/fuzz_images.py --seconds 600          # seeds: every format and color mode
    python3 tests/fuzz_images.py --seconds 5 --corpus FOLDER

Bytes may be refused (`Refusal`, `ImageRejected`) or give a picture of 224x224x3 bytes; anything
else ends the run with another code than 0 and leaves the input as `crash-...` in the corpus folder.
An input that takes over ten seconds or 2 GiB counts as a crash too.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["workloads.inference", "PIL"]):
    import numpy as np
    from PIL import Image

    from workloads.inference.image_input import FORMATS, ImageRejected, open_upload, small_picture
    from workloads.inference.web_app import picture_of
    from workloads.inference.web_process import Refusal


MAX_PIXELS = 1_000_000
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "P", "1", "I;16"),
    "GIF": ("P",),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P"),
    "TIFF": ("RGB", "CMYK", "F", "I;16"),
}
BOUNDARY = b"seed"


def one_input(data: bytes) -> None:
    """Take a body as the server does: as a form, and as the bare file."""
    for content_type in ("", f"multipart/form-data; boundary={BOUNDARY.decode()}"):
        try:
            picture = small_picture(open_upload(picture_of(content_type, data), MAX_PIXELS))
        except (Refusal, ImageRejected):
            continue
        if len(picture) != 224 * 224 * 3:
            raise AssertionError(f"a picture of {len(picture)} bytes")


def write_seeds(folder: Path) -> None:
    """Write a small file of every format and color mode, one of them in a form too."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for kind in FORMATS:
        for mode in MODES[kind]:
            image = Image.fromarray(noise)
            if mode == "I;16":
                image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
            else:
                image = image.convert(mode)
            file = io.BytesIO()
            image.save(file, kind)
            (folder / f"{kind}-{mode}".replace(";", "")).write_bytes(file.getvalue())
    head = b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = b"--" + BOUNDARY + b"\r\n" + head + file.getvalue() + b"\r\n--" + BOUNDARY + b"--\r\n"
    (folder / "form").write_bytes(body)


def main() -> None:
    """Fuzz for a while; Atheris ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, metavar="S")
    parser.add_argument("--corpus", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-images-"))
    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(corpus)
    flags = [
        f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-timeout=10",
        "-rss_limit_mb=2048", "-max_len=8192", f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
