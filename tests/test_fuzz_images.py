"""A few seconds of the fuzzing of the image path (`fuzz_images.py`); by hand it runs for longer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "fuzz_images.py"
# A program that is started inherits the peak memory of who starts it (getrusage), which the fuzzer
# would take for its own: that of a shell is small, that of these tests is not.
FROM_A_SHELL = ("sh", "-c", '"$@"; exit $?', "sh")


def test_mutated_files_are_refused_or_decoded_but_never_anything_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [*FROM_A_SHELL, sys.executable, str(PROGRAM), "--seconds", "4", "--corpus", str(tmp_path)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob("crash-*"))
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None and int(runs[1]) > 100
    # It is guided: mutations that reached new code were kept beside the seeds.
    seeds = {"form", *(path.name for path in tmp_path.glob("*-*"))}
    assert len(list(tmp_path.iterdir())) > len(seeds)
