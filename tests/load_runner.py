"""The load test as a program against the null server, for tests that look at both from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT_ROOT / "workloads" / "inference" / "load_test.py"
NULL_SERVER = PROJECT_ROOT / "tests" / "tools" / "null_server.py"


class NullServer:
    """A null server that answers as its arguments say."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            (sys.executable, str(NULL_SERVER), *arguments), stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def counts(self) -> dict[str, int]:
        """What came: by path and content type, JPEGs among it, connections that posted."""
        return requests.get(f"{self.url}/counts", timeout=10).json()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def null_server(*arguments: str) -> Iterator[NullServer]:
    server = NullServer(*arguments)
    try:
        yield server
    finally:
        server.close()


def load_test(
    folder: Path, url: str, *arguments: str, **how: object
) -> subprocess.CompletedProcess:
    return subprocess.run(
        (sys.executable, str(SCRIPT), "--server", url, "--results-dir", str(folder), *arguments),
        capture_output=True, text=True, check=False, timeout=120, **how,
    )  # fmt: skip


def only_result(folder: Path) -> dict:
    (path,) = folder.glob("load_test_*.json")
    return json.loads(path.read_text())
