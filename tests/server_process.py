"""The inference server as a process of a test: with a stub model, or with a small real one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
from PIL import Image

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "inference_server.py"
STUB = PROJECT_ROOT / "tests" / "stub_server.py"
SMALL = ("--model", "resnet18", "--weights", "none", "--device", "cpu", "--host", "127.0.0.1")


def jpeg(seed: int = 0, size: int = 224) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def png(red: int) -> bytes:
    """A picture that the stub model takes for one of class ``red``."""
    file = io.BytesIO()
    Image.new("RGB", (224, 224), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


class ServerProcess:
    """A server started by hand, ready to answer."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: Path = STUB,
        under: Sequence[str] = (),
        **environment: object,
    ) -> None:
        self.results = folder / "results"
        self.log = folder / "stderr.log"
        with self.log.open("w") as log, (folder / "stdout.log").open("w") as out:
            self.process = subprocess.Popen(
                (*under, sys.executable, str(script), *SMALL, "--port", "0", "--results-dir",
                 str(self.results), *arguments),
                stdout=out, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            )  # fmt: skip
        self.port = self._wait_until_ready()
        self.url = f"http://127.0.0.1:{self.port}"

    def _wait_until_ready(self) -> int:
        deadline = time.monotonic() + 120
        while "ready on port " not in (text := self.log.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.02)
        return int(text.partition("ready on port ")[2].split(":")[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def stats(self) -> dict:
        time.sleep(0.03)  # a request is counted a moment after it was answered
        return requests.get(f"{self.url}/stats", timeout=10).json()

    def predict(self, content: bytes) -> requests.Response:
        return requests.post(f"{self.url}/predict", data=content, timeout=30)

    def batch_predict(self, body: object) -> requests.Response:
        return requests.post(f"{self.url}/batch_predict", json=body, timeout=60)

    def workers(self) -> list[int]:
        """Return the process ids of the web workers."""
        (master,) = children(self.process.pid)
        return sorted(children(master))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@contextmanager
def running(folder: Path, *arguments: str, **options: object) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, *arguments, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
